"""Figures on a tiny model, against SAEs whose figures are known and a computation by hand."""

import numpy as np
import pytest
import small_models
import torch
from torch.nn import functional

from saepipe.config import ModelConfig
from saepipe.edits import Edit
from saepipe.language_model import LanguageModel
from saepipe.measure import measure
from saepipe.saes.standard import StandardConfig, StandardSAE
from saepipe.token_store import Side

HOOK, SEQ, CONTEXTS = "blocks.1.hook_resid_post", 16, 6
TARGET = "blocks.2.hook_mlp_out"
D = small_models.WIDTH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = small_models.make(tmp_path_factory.mktemp("llama"), "llama")
    return LanguageModel.open(ModelConfig(name=str(folder), hooks=[HOOK, TARGET]))


@pytest.fixture(scope="module")
def side() -> Side:
    ids = np.random.default_rng(0).integers(2, small_models.VOCAB, (CONTEXTS, SEQ)).astype(np.int32)
    ids[:, 0], ids[2, 7] = 0, 1
    return Side(ids=ids, documents=np.repeat(np.arange(3, dtype=np.int32), 2)[:, None].repeat(SEQ, 1), special=ids < 2)


def sae_of(scale: float, *, dead: int = 0) -> StandardSAE:
    """Reconstruct x as scale * x, by one latent for each sign of each axis; the last ones never fire."""
    sae = StandardSAE(StandardConfig(d_sae=2 * D + dead, normalize_activations="none"), D)
    axes = torch.cat([torch.eye(D), -torch.eye(D), torch.zeros(dead, D)])
    with torch.no_grad():
        sae.W_enc.copy_(axes.T)
        sae.W_dec.copy_(scale * axes)
    return sae


def test_a_perfect_sae_keeps_everything(model: LanguageModel, side: Side) -> None:
    found = measure(model, sae_of(1.0), side, HOOK, 10**6, batch_prompts=4)
    assert found["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert found["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert found["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert found["kl_div_score"] == pytest.approx(1, abs=1e-5)
    assert found["tokens"] == CONTEXTS * (SEQ - 1) - 1  # without position 0 and the one special token further on
    assert (found["contexts"], found["documents"]) == (CONTEXTS, 3)


def test_an_sae_that_reconstructs_zero_scores_zero(model: LanguageModel, side: Side) -> None:
    found = measure(model, sae_of(0.0), side, HOOK, 10**6, batch_prompts=4)
    assert found["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert found["kl_div_score"] == pytest.approx(0, abs=1e-6)


def test_figures_equal_a_computation_by_hand(model: LanguageModel, side: Side) -> None:
    sae = sae_of(0.8, dead=5)
    found = measure(model, sae, side, HOOK, 10**6, batch_prompts=4)
    ids = torch.from_numpy(side.ids.astype(np.int64))
    counted = torch.from_numpy(~side.special)
    counted[:, 0] = False
    x = model.capture(ids, [HOOK])[HOOK].double()[counted]
    variance = x.square().sum(1).mean() - x.mean(0).square().sum()
    assert found["explained_variance"] == pytest.approx(float(1 - 0.04 * x.square().sum(1).mean() / variance), abs=1e-6)
    assert found["l0"] == pytest.approx(float((x != 0).sum(1).double().mean()))
    assert found["dead_latents"] == 5
    assert found["dead_fraction"] == pytest.approx(5 / (2 * D + 5))

    def scaled(activations: torch.Tensor) -> torch.Tensor:
        return torch.where(counted[..., None], 0.8 * activations, activations)

    for key, logits in (
        ("ce_loss_without_sae", model.logits(ids)),
        ("ce_loss_with_sae", model.logits(ids, {HOOK: scaled})),
    ):
        here = counted[:, :-1]
        loss = functional.cross_entropy(logits[:, :-1][here].double(), ids[:, 1:][here])
        assert found[key] == pytest.approx(float(loss), abs=1e-5)


def test_a_transcoder_is_compared_and_spliced_in_at_its_target(model: LanguageModel, side: Side) -> None:
    """One whose skip connection is the least-squares map from hook to target, which a computation by hand knows."""
    ids = torch.from_numpy(side.ids.astype(np.int64))
    counted = torch.from_numpy(~side.special)
    counted[:, 0] = False
    activations = model.capture(ids, [HOOK, TARGET])
    x, y = (activations[hook].double()[counted] for hook in (HOOK, TARGET))
    weights = torch.linalg.lstsq(x, y).solution
    keys = {"apply_b_dec_to_input": False, "normalize_activations": "none", "skip_connection": True}
    sae = StandardSAE(StandardConfig(d_sae=4, **keys), D, D)
    assert sae.W_skip is not None
    with torch.no_grad():
        sae.W_skip.copy_(weights.T)
    found = measure(model, sae, side, HOOK, 10**6, batch_prompts=4, target_hook=TARGET)
    error = (y - x @ weights).square().sum(1).mean()
    variance = y.square().sum(1).mean() - y.mean(0).square().sum()
    assert found["mse"] == pytest.approx(float(error), rel=1e-4)
    assert found["explained_variance"] == pytest.approx(float(1 - error / variance), abs=1e-5)
    assert found["dead_latents"] == 4

    def replaced(rows: torch.Tensor) -> dict[str, Edit]:
        def edit(activations: torch.Tensor) -> torch.Tensor:
            changed = activations.clone()
            changed[counted] = rows.to(changed.dtype)
            return changed

        return {TARGET: edit}

    here = counted[:, :-1]
    for key, edits in (
        ("ce_loss_without_sae", {}),
        ("ce_loss_with_sae", replaced(x @ weights)),
        ("ce_loss_with_ablation", replaced(torch.zeros_like(y))),
    ):
        loss = functional.cross_entropy(model.logits(ids, edits)[:, :-1][here].double(), ids[:, 1:][here])
        assert found[key] == pytest.approx(float(loss), abs=1e-4)
    assert found["ce_loss_with_ablation"] != pytest.approx(found["ce_loss_with_sae"], abs=1e-3)


def test_batches_do_not_change_the_figures(model: LanguageModel, side: Side) -> None:
    one, all_at_once = (measure(model, sae_of(0.9), side, HOOK, 10**6, batch_prompts=size) for size in (1, 6))
    for key, value in one.items():
        assert value == pytest.approx(all_at_once[key], rel=1e-5), key


def test_no_more_tokens_than_asked_for_are_read(model: LanguageModel, side: Side) -> None:
    assert measure(model, sae_of(1.0), side, HOOK, 2 * SEQ + 3, batch_prompts=4)["contexts"] == 2
    assert measure(model, sae_of(1.0), side, HOOK, 1, batch_prompts=4)["contexts"] == 1


def test_inclusive_figures_leave_nothing_out(model: LanguageModel, side: Side) -> None:
    sae = sae_of(0.9)
    found = measure(model, sae, side, HOOK, 10**6, batch_prompts=4, inclusive=True)
    assert {name: value for name, value in found.items() if not name.startswith("inclusive_")} == measure(
        model, sae, side, HOOK, 10**6, batch_prompts=4
    )
    assert found["inclusive_tokens"] == CONTEXTS * SEQ
    ids = torch.from_numpy(side.ids.astype("int64"))
    clean = model.logits(ids)
    spliced = model.logits(ids, {HOOK: lambda x: 0.9 * x})
    kl = functional.kl_div(spliced.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert found["inclusive_kl_div_with_sae"] == pytest.approx(float(kl.mean()), rel=1e-5)
    ce = functional.cross_entropy(spliced[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["inclusive_ce_loss_with_sae"] == pytest.approx(float(ce), rel=1e-5)
