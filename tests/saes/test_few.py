"""Few active latents make a step sparse; nothing but rounding depends on it."""

import math
from typing import Any

import pytest
import torch
from small_saes import D_OUT, D_SAE, DEAD, TOKENS, data, make, make_transcoder, targets
from torch import Tensor

from saepipe import saes, sparse
from saepipe.config import OptimConfig
from saepipe.point import Point
from saepipe.saes.base import Losses, Step

ALL, NONE = 2.0, -1.0  # shares up to which a step is sparse

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "ghost": ("standard", {"dead_method": "ghost"}),
    "step": ("jumprelu", {"bandwidth": 0.5}),
    "narrow": ("jumprelu", {"bandwidth": 1e-3}),
    "input": ("jumprelu", {"bandwidth": 0.5, "ste_to_input": True}),
    "tanh": ("jumprelu", {"bandwidth": 0.5, "sparsity_loss": "tanh", "pre_act_loss_coefficient": 0.1}),
    "quadratic": ("jumprelu", {"bandwidth": 0.5, "sparsity_loss": "quadratic", "target_l0": 3.0}),
}


def taken(
    share: float, case: str, patch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float64, kind: str = ""
) -> tuple[Losses, dict[str, Tensor]]:
    """Take one step's loss and gradients."""
    patch.setattr(sparse, "FEW", share)
    name, keys = CASES[case]
    x = y = data().to(dtype)
    if kind == "transcoder":
        sae, y = make_transcoder(name, dtype, **keys), targets(D_OUT).to(dtype)
    else:
        sae = make(name, dtype, apply_b_dec_to_input=kind == "centred", **keys)
    losses = sae.loss(x, y, Step(dead=DEAD))
    names, weights = zip(*sae.named_parameters(), strict=True)
    return losses, dict(zip(names, torch.autograd.grad(losses.total, weights), strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["centred", "as it is", "transcoder"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_dense_ones(
    case: str, kind: str, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dense, expected), (few, found) = (taken(share, case, monkeypatch, dtype, kind) for share in (NONE, ALL))
    assert 0 < float(dense.l0) < D_SAE
    assert torch.equal(few.fired, dense.fired)
    for term, value in dense.terms.items():
        torch.testing.assert_close(few.terms[term], value, rtol=limit, atol=limit)
    torch.testing.assert_close(few.reconstruction, dense.reconstruction, rtol=limit, atol=limit)
    for name, gradient in expected.items():
        assert gradient.any(), name
        distance = (found[name] - gradient).norm() / gradient.norm()
        assert distance <= limit, f"{name}: {distance:.1e}"


@pytest.mark.parametrize("case", ["standard", "gated", "narrow"])
def test_only_few_active_latents_are_looked_at_one_by_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    decode = sparse.decode

    def watched(values: Tensor, *others: Any) -> Tensor:
        looked_at.append(len(values))
        return decode(values, *others)

    monkeypatch.setattr(sparse, "decode", watched)
    active = int(taken(NONE, case, monkeypatch)[0].fired.sum())
    share = active / (TOKENS * D_SAE)
    taken(0.9 * share, case, monkeypatch)
    assert not looked_at
    taken(1.1 * share, case, monkeypatch)
    assert active <= max(looked_at) < 1.1 * active


def test_a_sample_looks_at_all_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_SAMPLED", 0)
    for d_sae in (256, 257, 16 * 257, 263):
        active = torch.zeros(300, d_sae)
        active[:, 1::2] = 1.0  # half of them, and none of those that a step of d_sae would come to
        monkeypatch.setattr(sparse, "FEW", 0.4)
        assert sparse.few(active) is None
        monkeypatch.setattr(sparse, "FEW", 0.6)
        found = sparse.few(active)
        assert found is not None
        assert len(found.values) == int(active.sum())


@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu", "batchtopk", "matryoshka", "topk"])
@pytest.mark.parametrize("where", ["input", "encoder", "bias", "decoder"])
def test_what_is_not_a_number_is_not_lost(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "FEW", 1.0)
    cls = saes.architecture(name)
    keys = {"k": 2} if "k" in cls.config_class.__dataclass_fields__ else {}
    sae = cls(cls.config_class(d_sae=64, apply_b_dec_to_input=False, **keys), 8, 5)
    sae.initialise(torch.Generator().manual_seed(0))
    point = Point(sae, OptimConfig(), total_steps=10)
    point.make_optimizer()
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 8, generator=draw), torch.randn(32, 5, generator=draw)
    point.take_step(x, y, 0, measure=False)
    assert not point.broken
    bad = {"input": x, "encoder": sae.W_enc, "bias": sae.get_parameter(sae.latent_parameters[0]), "decoder": sae.W_dec}
    with torch.no_grad():
        bad[where][(7,) if where == "bias" else (3, 4)] = math.nan
    point.take_step(x, y, 1, measure=False)
    assert point.broken


def test_no_active_latent_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "FEW", ALL)
    for name in ("standard", "gated", "jumprelu"):
        sae, x = make(name), data()
        with torch.no_grad():
            sae.get_parameter(sae.latent_parameters[0]).sub_(1000)
        losses = sae.loss(x, x, Step())
        losses.total.backward()
        assert losses.l0 == 0
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in sae.parameters()), name
