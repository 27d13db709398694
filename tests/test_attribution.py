"""Attributions add up, and are what one finds by hand."""

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_hooked import HOOK, IDS, by_hand, make, opened
from torch import Tensor

from saepipe.attribution import by_gradient, direct
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.saes.base import SAE

PROMPT, TARGET, AGAINST = IDS[:1], 7, 11
LAST = f"blocks.{small_models.LAYERS - 1}.hook_resid_post"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    more = {"gemma2": {"final_logit_softcapping": 3.0}}
    return {kind: small_models.make(folder / kind, kind, **more.get(kind, {})) for kind in ("llama", "gpt2", "gemma2")}


CASES = [("plain", "llama"), ("plain", "gpt2"), ("plain", "gemma2"), ("compatible", "gpt2"), ("bridge", "llama")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> HookedSAETransformer:
    way, kind = request.param
    return opened(way, folders[kind])


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> HookedSAETransformer:
    return opened("plain", folders["llama"])


def logit(model: HookedSAETransformer, changes: dict[str, Any] | None = None, position: int = -1) -> float:
    """The difference of two logits, before a cap."""
    logits = by_hand(model, changes or {}, PROMPT)[0, position, [TARGET, AGAINST]].double()
    cap = getattr(model.hf_model.config.get_text_config(), "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    return float(logits[0] - logits[1])


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_mlp_out", LAST])
@pytest.mark.parametrize("position", [-1, 4])
def test_direct_parts_add_up_to_the_logit(model: HookedSAETransformer, hook: str, position: int) -> None:
    sae = make(hook)
    sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(1))
    found = direct(model, sae, PROMPT, TARGET, AGAINST, position=position)
    expected = logit(model, position=position)
    assert found.logit == pytest.approx(expected, abs=1e-4)
    assert found.total == pytest.approx(expected, abs=1e-4)
    assert float(found.latents.abs().max()) > 1e-4
    if hook == LAST:
        assert found.others == pytest.approx(0, abs=1e-5)


def by_the_norm(model: HookedSAETransformer, part: Tensor) -> Tensor:
    """What something in the last residual stream adds to the difference, with the norm's scale as it is."""
    view = model.hf_model
    config = view.config.get_text_config()
    stream = model.run_with_cache(PROMPT, names_filter=[LAST])[1][LAST][0, -1]
    norm = view.transformer.ln_f if config.model_type == "gpt2" else view.model.norm
    weight = 1 + norm.weight if config.model_type == "gemma2" else norm.weight
    if config.model_type == "gpt2":
        part, stream = part - part.mean(-1, keepdim=True), stream - stream.mean()
    eps = getattr(config, "rms_norm_eps", None) or config.layer_norm_epsilon
    scale = (stream.square().mean() + eps).sqrt()
    return (part / scale * weight) @ (view.lm_head.weight[TARGET] - view.lm_head.weight[AGAINST])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_each_direct_part_is_read_off_through_the_norm_as_it_is(kind: str, folders: dict[str, Path]) -> None:
    model, sae = opened("plain", folders[kind]), make()
    sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(1))
    found = direct(model, sae, PROMPT, TARGET, AGAINST)
    x = model.run_with_cache(PROMPT, names_filter=[HOOK])[1][HOOK][0, -1]
    f = sae.encode(x)
    with torch.no_grad():
        torch.testing.assert_close(found.activations, f)
        torch.testing.assert_close(found.latents, f * by_the_norm(model, sae.W_dec), atol=1e-5, rtol=1e-4)
        assert found.error == pytest.approx(float(by_the_norm(model, x - sae.decode(f))), abs=1e-4)
        assert found.bias == pytest.approx(float(by_the_norm(model, sae.b_dec)), abs=1e-5)


def test_a_single_logit_needs_no_other(llama: HookedSAETransformer) -> None:
    found = direct(llama, make(), PROMPT, TARGET)
    assert found.total == pytest.approx(llama(PROMPT)[0, -1, TARGET].item(), abs=1e-4)


def test_tokens_are_named_by_their_text(llama: HookedSAETransformer) -> None:
    id = llama.to_single_token(" brown")
    found = direct(llama, make(), "the quick", " brown")
    assert found.logit == direct(llama, make(), "the quick", id).logit


def latents_replaced(sae: SAE, change: Any) -> dict[str, Any]:
    """Replace latents at all but special tokens, with the error term kept."""

    def edit(x: Tensor) -> Tensor:
        f = sae.encode(x)
        return x + (change(f.clone()) - f) @ sae.W_dec

    return {HOOK: edit}


def test_a_gradient_is_the_finite_difference(model: HookedSAETransformer) -> None:
    sae = make()
    found = by_gradient(model, sae, PROMPT, TARGET, AGAINST)
    assert found.logit == pytest.approx(logit(model), abs=1e-4)
    strongest = found.latents.abs().flatten().topk(3).indices.tolist()
    for position, latent in [divmod(number, 24) for number in strongest]:

        def scaled(share: float, position: int = position, latent: int = latent) -> float:
            def change(f: Tensor) -> Tensor:
                f[0, position, latent] *= share
                return f

            return logit(model, latents_replaced(sae, change))

        slope = (scaled(1.01) - scaled(0.99)) / 0.02
        assert float(found.latents[position, latent]) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_integrated_gradients_add_up_to_what_all_latents_do(model: HookedSAETransformer) -> None:
    sae = make()
    found = by_gradient(model, sae, PROMPT, TARGET, AGAINST, steps=12)
    assert found.without == pytest.approx(logit(model, latents_replaced(sae, torch.zeros_like)), abs=1e-4)
    assert found.total == pytest.approx(found.logit - found.without, abs=0.02 * abs(found.logit - found.without) + 1e-3)
    one = by_gradient(model, sae, PROMPT, TARGET, AGAINST)
    assert abs(one.total - (one.logit - one.without)) > abs(found.total - (found.logit - found.without))


def test_only_latents_up_to_the_position_have_an_effect(llama: HookedSAETransformer) -> None:
    found = by_gradient(llama, make(), PROMPT, TARGET, position=4)
    assert found.latents[:5].any()
    assert not found.latents[5:].any()


def test_special_tokens_have_no_effect(llama: HookedSAETransformer) -> None:
    found = by_gradient(llama, make(), "the quick", " brown", steps=2)
    assert not found.latents[0].any()
    assert found.latents[1:].any()


@pytest.mark.parametrize(
    ("call", "keys", "said"),
    [
        (direct, {"target": " quick brown"}, "target: string=' quick brown' is 3 tokens"),
        (direct, {"target": 7, "against": 320}, "against=320 is no token of"),
        (direct, {"target": 7, "position": 9}, "position=9 is none of the prompt's 9; give one from 0 to 8"),
        (direct, {"prompt": IDS, "target": 7}, "prompt holds 2 prompts; give one at a time"),
        (direct, {"prompt": "fox " * 99, "target": 7}, "more than the 64 that"),
        (by_gradient, {"target": 7, "steps": 0}, "steps=0 takes no gradient"),
    ],
)
def test_what_has_no_meaning_is_refused(
    llama: HookedSAETransformer, call: Any, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        call(llama, make(), **{"prompt": PROMPT, **keys})


def test_a_hook_that_does_not_write_to_the_stream_has_no_direct_part(llama: HookedSAETransformer) -> None:
    sae = make("blocks.1.attn.hook_z")
    with pytest.raises(UserError, match=r"hook_z is no hook point that writes to the residual stream"):
        direct(llama, sae, PROMPT, TARGET)
    assert by_gradient(llama, sae, PROMPT, TARGET).latents.any()
