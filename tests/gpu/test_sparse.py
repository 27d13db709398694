"""The kernels on a GPU: equal to the dense product, the same bits each time, and the top k of `topk`."""

import pytest
import torch
from torch import Tensor

from saepipe import sparse

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, D_SAE, K = 700, 200, 3000, 20


def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def inputs(*, ragged: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Values, indices, offsets, rows and what is summed by latent; latent 0 is on every token, the last on none."""
    draw = generator()
    indices = torch.rand(TOKENS, D_SAE - 1, device="cuda", generator=draw).topk(K).indices
    indices[:, 0] = 0
    indices[:, 1:] = indices[:, 1:].clamp(min=1)
    rows, x = (torch.randn(n, WIDTH, device="cuda", generator=draw) for n in (D_SAE, TOKENS))
    values = torch.randn(TOKENS, K, device="cuda", generator=draw)
    if not ragged:
        return values, indices, None, rows, x
    kept = torch.rand(TOKENS, K, device="cuda", generator=draw) < 0.5
    kept[5:9] = False
    return values[kept], indices[kept], kept.sum(1).cumsum(0) - kept.sum(1), rows, x


def dense(values: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        tokens = torch.arange(TOKENS, device="cuda").repeat_interleave(K)
    else:
        tokens = torch.searchsorted(offsets, torch.arange(len(values), device="cuda"), right=True) - 1
    spread = torch.zeros(TOKENS, D_SAE, dtype=torch.float64, device="cuda")
    return spread.index_put((tokens, indices.flatten()), values.flatten().double(), accumulate=True)


def close(mine: Tensor, theirs: Tensor) -> None:
    assert (mine.double() - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_and_its_gradients_equal_the_dense_product(ragged: bool) -> None:
    values, indices, offsets, rows, grad = inputs(ragged=ragged)
    leaves = [values.requires_grad_(), rows.requires_grad_()]
    found, expected = sparse.decode(values, indices, rows, offsets), dense(values, indices, offsets) @ rows.double()
    close(found, expected)
    mine, theirs = torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad.double())
    close(mine[0], theirs[0].double())
    close(mine[1], theirs[1].double())
    assert torch.equal(mine[1][-1], torch.zeros(WIDTH, device="cuda"))


@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_of_selected_pre_activations_equal_the_dense_product(ragged: bool) -> None:
    grad, indices, offsets, rows, x = inputs(ragged=ragged)
    bias, centre = torch.zeros(D_SAE, device="cuda"), torch.zeros(WIDTH, device="cuda")
    leaves = [each.requires_grad_() for each in (rows, bias, centre)]
    pre = sparse.select(torch.zeros_like(grad), indices, x, rows, bias, offsets, centre)
    found, spread = torch.autograd.grad(pre, leaves, grad), dense(grad, indices, offsets)
    for mine, theirs in zip(
        found, (spread.T @ x.double(), spread.sum(0), -(spread @ rows.double()).sum(0)), strict=True
    ):
        close(mine, theirs)


def test_every_run_gives_the_same_bits() -> None:
    values, indices, offsets, rows, grad = inputs(ragged=True)
    leaves = [values.requires_grad_(), rows.requires_grad_()]

    def once() -> list[Tensor]:
        out = sparse.decode(values, indices, rows, offsets)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    first = once()
    for _ in range(20):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(once(), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_rows_are_rounded_once(dtype: torch.dtype) -> None:
    _, _, _, rows, _ = inputs(ragged=False)
    factors = torch.randn(D_SAE, device="cuda", generator=generator())
    assert torch.equal(sparse.scaled(rows, factors, dtype), (rows * factors[:, None]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 32, 64])
def test_the_largest_are_those_of_topk(dtype: torch.dtype, k: int) -> None:
    values = torch.randn(333, 16384, device="cuda", generator=generator()).to(dtype)
    found, indices = sparse.largest(values, k)
    assert torch.equal(found, values.gather(1, indices))
    assert all(len(row.unique()) == k for row in indices)
    assert torch.equal(found.sort(1).values, values.topk(k).values.sort(1).values)
