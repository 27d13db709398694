import pytest
import torch
from torch import Tensor

from saepipe import sparse

TOKENS, D_IN, D_SAE, K = 37, 6, 20, 4


def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, K), (TOKENS, D_IN), (D_SAE, D_IN), (D_SAE,), (TOKENS, D_IN), (TOKENS, K)]
    values, x, rows, bias, grad_out, grad_values = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    indices = torch.rand(TOKENS, D_SAE - 3, generator=generator).topk(K).indices  # the last 3 latents never occur
    return values, indices, x, rows, bias, grad_out, grad_values


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_decode_and_its_gradients_equal_the_dense_product(dtype: torch.dtype, limit: float) -> None:
    values, indices, _, rows, _, grad_out, _ = tensors(dtype)
    leaves = [values.requires_grad_(), rows.requires_grad_()]
    found = sparse.decode(values, indices, rows)
    dense = torch.zeros(TOKENS, D_SAE, dtype=dtype).scatter(1, indices, values) @ rows
    torch.testing.assert_close(found, dense, rtol=limit, atol=limit)
    expected = torch.autograd.grad(dense, leaves, grad_out)
    for mine, theirs in zip(torch.autograd.grad(found, leaves, grad_out), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=limit, atol=limit)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradients_of_selected_pre_activations_equal_the_dense_product(dtype: torch.dtype, limit: float) -> None:
    _, indices, x, rows, bias, _, grad_values = tensors(dtype)
    centre = x.mean(0)
    leaves = [tensor.requires_grad_() for tensor in (centre, rows, bias)]
    dense = ((x - centre) @ rows.T + bias).gather(1, indices)
    found = sparse.select(dense.detach(), indices, (x - centre).detach(), rows, bias, centre=centre)
    assert torch.equal(found, dense)
    expected = torch.autograd.grad(dense, leaves, grad_values)
    for mine, theirs in zip(torch.autograd.grad(found, leaves, grad_values), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_in_the_groups_with_the_largest_maximum(dtype: torch.dtype) -> None:
    values = torch.randn(50, 32 * 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0] = 1.0  # all tie
    values[1, :32] += 100  # all in one group
    for k in (1, 7, 40):
        found, indices = sparse.largest_by_groups(values, k)
        assert torch.equal(found, values.gather(1, indices))
        assert all(len(row.unique()) == k for row in indices)
        assert torch.equal(found.sort(1).values, values.topk(k).values.sort(1).values)


def test_gradients_are_the_same_bits_with_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(512, 64, generator=generator), torch.randn(256, 64, generator=generator)
    indices = torch.rand(512, 256, generator=generator).topk(16).indices
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [rows.clone().requires_grad_(), torch.zeros(256).requires_grad_()]
            pre = sparse.select((x @ rows.T).gather(1, indices).relu(), indices, x, *leaves)
            values = torch.relu(pre)
            decoded = sparse.decode(values, indices, leaves[0])
            found.append(torch.autograd.grad((decoded - x).square().sum(), leaves))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))
