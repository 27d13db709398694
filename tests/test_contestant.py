"""What a contestant answers, within this process."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from saepipe import own_steps
from saepipe.bench_step import activations
from saepipe.contest import Task
from saepipe.contestant import STATUS, _Served

D_IN, D_SAE, TOKENS = 16, 64, 128


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("batches") / "batches.safetensors"
    save_file({str(n): batch for n, batch in enumerate(activations(D_IN, TOKENS, 3, "cpu"))}, path)
    return Task("saepipe", "topk", str(path), D_IN, D_SAE, TOKENS, k=4)


def served(task: Task) -> _Served:
    return _Served(task, own_steps.maker(task))


def test_the_batches_are_of_norm_sqrt_d_in_and_the_same_every_time() -> None:
    first, second = activations(D_IN, TOKENS, 2, "cpu")
    assert first.shape == (TOKENS, D_IN)
    assert first.norm(dim=1).mean().item() == pytest.approx(D_IN**0.5)
    assert not torch.equal(first, second)
    assert torch.equal(next(activations(D_IN, TOKENS, 1, "cpu")), first)


@pytest.mark.parametrize(("name", "l0"), [("topk", 4), ("batchtopk", 4), ("matryoshka", 4)])
def test_it_tells_seconds_l0_and_memory(task: Task, name: str, l0: float) -> None:
    mine = served(replace(task, architecture=name))
    assert mine.seconds(2) > 0
    assert mine.l0(1) == pytest.approx(l0, rel=0.02)
    if STATUS.exists():
        assert 0 <= mine.peak_bytes(1) < 1e10


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated"])
def test_l0_is_put_where_it_is_asked_for_and_stays_there(task: Task, name: str) -> None:
    of_start = served(replace(task, architecture=name)).l0(1)
    mine = served(replace(task, architecture=name, l0=3.0))
    mine.seconds(20)
    assert mine.l0(1) == pytest.approx(3, rel=0.3)  # the quantile is the first batch's
    assert of_start > 20


def test_the_step_is_a_training_step_of_a_learning_rate_that_moves_nothing_much(task: Task) -> None:
    steps = own_steps.maker(task)(served(task)._batches)
    x = served(task)._batches[0]
    first = steps.take(x)
    for _ in range(5):
        last = steps.take(x)
    assert first.tokens == TOKENS
    assert last.terms["mse_loss"].item() == pytest.approx(first.terms["mse_loss"].item(), rel=1e-3)
    assert last.terms["mse_loss"] < first.terms["mse_loss"]


def test_the_product_is_the_encoders(task: Task) -> None:
    product = served(replace(task, library="product"))
    assert product._steps.take(torch.zeros(TOKENS, D_IN)).shape == (TOKENS, D_SAE)
    assert product.seconds(1) > 0
