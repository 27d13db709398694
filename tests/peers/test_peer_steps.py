"""The steps that saepipe's are timed beside train: they lower the loss, at the L0 that was asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saepipe import peer_steps
from saepipe.bench_step import activations
from saepipe.contest import Task

D_IN, D_SAE, TOKENS = 16, 64, 256
ALL = [(name, library) for name in peer_steps._OF_SAELENS for library in peer_steps.offered(name)]


def task(library: str, architecture: str, **keys: Any) -> Task:
    return Task(library, architecture, "", D_IN, D_SAE, TOKENS, k=4, **keys)


@pytest.mark.parametrize(("architecture", "library"), ALL)
def test_a_step_trains(architecture: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(peer_steps._MODULES[library].partition(".")[0])
    monkeypatch.setattr(peer_steps, "LR", 1e-3)
    batches = list(activations(D_IN, TOKENS, 2, "cpu"))
    keys = {"sae": {"matryoshka_widths": [8, 24]}} if architecture == "matryoshka" else {}
    steps = peer_steps.maker(task(library, architecture, **keys))(batches)

    def loss(done: Any) -> float:
        term = done if isinstance(done, float) else done.fvu if library == "sparsify" else done.losses["mse_loss"]
        return float(term.detach() if isinstance(term, Tensor) else term)

    first = loss(steps.take(batches[0]))
    for _ in range(30):
        done = steps.take(batches[0])
    assert loss(done) < first
    if architecture in ("topk", "batchtopk", "matryoshka"):
        assert steps.l0(done) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_l0_is_put_where_it_is_asked_for(architecture: str) -> None:
    pytest.importorskip("sae_lens")
    batches = list(activations(D_IN, TOKENS, 1, "cpu"))
    steps = peer_steps.maker(task("SAELens", architecture, l0=3.0))(batches)
    for _ in range(5):
        done = steps.take(batches[0])
    assert steps.l0(done) == pytest.approx(3, abs=0.05)


def test_matryoshka_has_the_widths_that_saepipes_has() -> None:
    pytest.importorskip("sae_lens")
    batches = list(activations(D_IN, TOKENS, 1, "cpu"))
    done = peer_steps.maker(task("SAELens", "matryoshka", sae={"matryoshka_widths": [8, 24]}))(batches).take(batches[0])
    assert {name for name in done.losses if name.startswith("inner")} == {"inner_mse_loss_8", "inner_mse_loss_24"}
    assert torch.isfinite(done.loss)
