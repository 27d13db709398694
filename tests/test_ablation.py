"""Ablation takes a latent's row of the decoder away, and nothing else."""

from typing import Any

import pytest
import torch
from small_finished import HOOK
from small_hooked import by_hand, make
from torch import Tensor

from saepipe.ablation import ablation_effects
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer, load_model
from saepipe.reading import Texts
from saepipe.saes.base import SAE

TEXTS = ["GET /index.html HTTP/1.1", "Dear Sir or Madam,", "def add(a, b):", "Once upon a time"]


@pytest.fixture(scope="module")
def model() -> HookedSAETransformer:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def sae(model: HookedSAETransformer) -> SAE:
    sae = make(HOOK, 128)
    with torch.no_grad():
        sae.b_enc[0] = -1e6
        sae.W_dec.mul_(10)
    return sae


def losses(model: HookedSAETransformer, text: str, changes: dict[str, Any]) -> Tensor:
    """Loss of what follows each token but the first."""
    ids = model.to_tokens(text)
    return -by_hand(model, changes, ids)[0, 1:-1].log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0]


def without_row(sae: SAE, latent: int) -> dict[str, Any]:
    """Have the decoder go without a row, from position 1 on, with what the SAE lacks kept."""
    W_dec = sae.W_dec.detach().clone()
    W_dec[latent] = 0

    def edit(x: Tensor) -> Tensor:
        f = sae.encode(x)
        removed = x - sae.decode(f) + f @ W_dec + sae.b_dec
        return torch.cat([x[:, :1], removed[:, 1:]], 1)

    return {HOOK: edit}


def test_it_is_a_forward_pass_without_the_row_of_the_decoder(model: HookedSAETransformer, sae: SAE) -> None:
    effects = ablation_effects(model, sae, [3, 0, 8], Texts(model, TEXTS).batches(3))
    assert [effect.latent for effect in effects] == [3, 0, 8]
    active_somewhere = 0
    for effect in effects:
        rise = torch.cat(
            [losses(model, text, without_row(sae, effect.latent)) - losses(model, text, {}) for text in TEXTS]
        )
        caches = [model.run_with_cache(text, names_filter=[HOOK])[1][HOOK] for text in TEXTS]
        active = torch.cat([sae.encode(x)[0, 1:-1, effect.latent] > 0 for x in caches])
        assert effect.tokens == len(rise)
        assert effect.active == int(active.sum())
        assert effect.ce_increase == pytest.approx(float(rise.mean()), abs=1e-5)
        if effect.ce_increase:
            assert effect.ce_interval is not None
            low, high = effect.ce_interval
            assert low < effect.ce_increase < high
        if effect.active:
            assert effect.ce_increase_where_active == pytest.approx(float(rise[active].mean()), abs=1e-4)
            active_somewhere += abs(effect.ce_increase) > 1e-3
    assert active_somewhere


def test_the_interval_is_over_texts(model: HookedSAETransformer, sae: SAE) -> None:
    latents, texts = range(1, 24), Texts(model, TEXTS[:1] * 3).batches(2)
    for effect in ablation_effects(model, sae, latents, texts):  # of which none differs from another
        if effect.active:
            assert effect.ce_interval == pytest.approx([effect.ce_increase] * 2, abs=1e-6)
    alone = ablation_effects(model, sae, latents, Texts(model, TEXTS[:1]).batches(1))
    assert all(effect.ce_interval is None for effect in alone)


def test_a_silent_latent_has_no_effect(model: HookedSAETransformer, sae: SAE) -> None:
    (effect,) = ablation_effects(model, sae, [0], Texts(model, TEXTS).batches(9))
    assert (effect.ce_increase, effect.ce_interval, effect.active) == (0.0, None, 0)
    assert effect.ce_increase_where_active != effect.ce_increase_where_active


def test_a_latent_that_is_named_twice_is_refused(model: HookedSAETransformer, sae: SAE) -> None:
    with pytest.raises(
        UserError, match=r"latents=\[3, 3\] names a latent more than once"
    ):  # its rises would be added up
        ablation_effects(model, sae, [3, 3], [])


def test_a_latent_that_the_sae_lacks_is_refused(model: HookedSAETransformer, sae: SAE) -> None:
    with pytest.raises(UserError, match="latents=24 is none of the SAE's 24"):
        ablation_effects(model, sae, [24], Texts(model, TEXTS).batches(9))
