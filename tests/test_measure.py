"""Figures on a tiny model, against SAEs whose figures are known and a computation by hand."""

from typing import Any

import numpy as np
import pytest
import small_models
import torch
from torch.nn import functional

from saepipe.config import ModelConfig
from saepipe.edits import Edit
from saepipe.language_model import LanguageModel
from saepipe.measure import Subject, measure
from saepipe.saes.base import SAE
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


def figures(
    model: LanguageModel, sae: SAE, side: Side, most_tokens: int, *, target_hook: str = HOOK, **how: Any
) -> dict[str, Any]:
    (found,) = measure(model, [Subject(sae, HOOK, target_hook)], side, most_tokens, **how)
    return found.compute(sae)


def flat(found: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Name every number by its path."""
    numbers: dict[str, Any] = {}
    for key, value in found.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        numbers |= flat(inner, f"{prefix}{key}/") if isinstance(inner, dict) else {f"{prefix}{key}": value}
    return numbers


def test_a_perfect_sae_keeps_everything(model: LanguageModel, side: Side) -> None:
    found = figures(model, sae_of(1.0), side, 10**6, batch_prompts=4)
    assert found["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert found["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert found["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert found["kl_div_score"] == pytest.approx(1, abs=1e-5)
    assert found["tokens"] == CONTEXTS * (SEQ - 1) - 1  # without position 0 and the one special token further on
    assert (found["contexts"], found["documents"]) == (CONTEXTS, 3)


def test_an_sae_that_reconstructs_zero_scores_zero(model: LanguageModel, side: Side) -> None:
    found = figures(model, sae_of(0.0), side, 10**6, batch_prompts=4)
    assert found["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert found["kl_div_score"] == pytest.approx(0, abs=1e-6)


def test_figures_equal_a_computation_by_hand(model: LanguageModel, side: Side) -> None:
    sae = sae_of(0.8, dead=5)
    found = figures(model, sae, side, 10**6, batch_prompts=4)
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
    found = figures(model, sae, side, 10**6, batch_prompts=4, target_hook=TARGET)
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
    one, all_at_once = (figures(model, sae_of(0.9), side, 10**6, batch_prompts=size) for size in (1, 6))
    assert one.keys() == all_at_once.keys()
    for key, value in flat(one).items():
        assert value == pytest.approx(flat(all_at_once)[key], rel=1e-5, abs=2e-5), key


def test_shares_of_several_processes_add_up_to_one_reading(model: LanguageModel, side: Side) -> None:
    subject = Subject(sae_of(0.9, dead=3), HOOK, HOOK)
    (whole,) = measure(model, [subject], side, 10**6, batch_prompts=2, inclusive=True)
    first, second, third = (
        measure(model, [subject], side, 10**6, batch_prompts=2, inclusive=True, share=(part, 3))[0] for part in range(3)
    )
    first.merge(second)
    first.merge(third)
    for key, value in flat(whole.compute(subject.sae)).items():
        assert flat(first.compute(subject.sae))[key] == pytest.approx(value, rel=1e-12), key


def test_saes_that_are_measured_together_are_measured_as_alone(model: LanguageModel, side: Side) -> None:
    keys = {"apply_b_dec_to_input": False, "normalize_activations": "none"}
    transcoder = StandardSAE(StandardConfig(d_sae=8, **keys), D, D)
    subjects = [Subject(sae_of(0.9), HOOK, HOOK), Subject(transcoder, HOOK, TARGET), Subject(sae_of(0.5), HOOK, HOOK)]
    together = measure(model, subjects, side, 10**6, batch_prompts=4)
    for subject, found in zip(subjects, together, strict=True):
        (alone,) = measure(model, [subject], side, 10**6, batch_prompts=4)
        assert flat(found.compute(subject.sae)) == pytest.approx(flat(alone.compute(subject.sae)), nan_ok=True)


def test_what_the_mean_leaves_is_measured_beside_what_zeros_leave(model: LanguageModel, side: Side) -> None:
    """An SAE that always gives the mean of the activations scores 0 against mean ablation, and not against zeros."""
    ids = torch.from_numpy(side.ids.astype(np.int64))
    counted = torch.from_numpy(~side.special)
    counted[:, 0] = False
    constant = sae_of(0.0)
    with torch.no_grad():
        constant.b_dec.copy_(model.capture(ids, [HOOK])[HOOK][counted].mean(0))
    found = figures(model, constant, side, 10**6, batch_prompts=4)
    assert found["ce_loss_score_mean_ablation"] == pytest.approx(0, abs=1e-5)
    assert found["kl_div_score_mean_ablation"] == pytest.approx(0, abs=1e-5)
    assert abs(found["ce_loss_score"]) > 1e-3
    assert found["explained_variance"] == pytest.approx(0, abs=1e-5)


def test_intervals_over_documents_hold_the_figures(model: LanguageModel, side: Side) -> None:
    found = figures(model, sae_of(0.9), side, 10**6, batch_prompts=4)
    for name in ("l0", "explained_variance", "ce_loss_score", "kl_div_score", "mse"):
        low, high = found["confidence"][name]
        assert low <= found[name] <= high, name
    assert found["confidence"]["mse"][0] < found["confidence"]["mse"][1]


def test_dense_latents_shrinkage_and_histograms(model: LanguageModel, side: Side) -> None:
    found = figures(model, sae_of(0.8, dead=5), side, 10**6, batch_prompts=4)
    assert found["l2_ratio"] == pytest.approx(0.8, abs=1e-6)
    assert found["relative_reconstruction_bias"] == pytest.approx(0.8, abs=1e-6)
    assert found["l2_norm_out"] == pytest.approx(0.8 * found["l2_norm_in"], rel=1e-6)
    assert found["dense_latents"] > D  # of each pair of signs at least one
    assert sum(found["histograms"]["log10_density"]["counts"]) == 2 * D
    norms = found["histograms"]["decoder_norm"]
    assert (norms["counts"][0], norms["counts"][-1]) == (5, 2 * D)
    assert norms["edges"][-1] == pytest.approx(0.8)
    assert found["nearest_cosine"] == pytest.approx(0, abs=1e-6)


def test_contexts_longer_than_the_sample_are_sampled(
    model: LanguageModel, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saepipe.measure.SAMPLE_TOKENS", SEQ - 1)
    found = figures(model, sae_of(1.0), side, 10**6, batch_prompts=4)
    assert found["nearest_cosine"] == figures(model, sae_of(1.0), side, 1, batch_prompts=4)["nearest_cosine"]


def test_no_more_tokens_than_asked_for_are_read(model: LanguageModel, side: Side) -> None:
    assert figures(model, sae_of(1.0), side, 2 * SEQ + 3, batch_prompts=4)["contexts"] == 2
    assert figures(model, sae_of(1.0), side, 1, batch_prompts=4)["contexts"] == 1


def test_inclusive_figures_leave_nothing_out(model: LanguageModel, side: Side) -> None:
    sae = sae_of(0.9)
    found = figures(model, sae, side, 10**6, batch_prompts=4, inclusive=True)
    assert {name: value for name, value in found.items() if not name.startswith("inclusive_")} == figures(
        model, sae, side, 10**6, batch_prompts=4
    )
    assert found["inclusive_tokens"] == CONTEXTS * SEQ
    ids = torch.from_numpy(side.ids.astype("int64"))
    clean = model.logits(ids)
    spliced = model.logits(ids, {HOOK: lambda x: 0.9 * x})
    kl = functional.kl_div(spliced.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert found["inclusive_kl_div_with_sae"] == pytest.approx(float(kl.mean()), rel=1e-5)
    ce = functional.cross_entropy(spliced[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["inclusive_ce_loss_with_sae"] == pytest.approx(float(ce), rel=1e-5)
