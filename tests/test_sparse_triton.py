"""The kernels in Triton's interpreter, which needs no GPU; tests/gpu has them on one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with torch's CUDA builds"
)

CHECK = """
import torch
from saepipe import sparse_triton

generator = torch.Generator().manual_seed(0)
tokens, d_sae, width = 9, 23, 300  # more columns than a program takes, and no multiple of them


def normal(*shape):
    return torch.randn(*shape, generator=generator).requires_grad_()


def check(values, indices, offsets):
    rows, grad = normal(d_sae, width), normal(tokens, width).detach()
    dense = torch.zeros(tokens, d_sae)
    places = sparse_triton.Places.of(indices, offsets, d_sae)
    dense = dense.index_put((places.tokens, places.indices), values.flatten(), accumulate=True)
    found, expected = sparse_triton.decode(values, indices, rows, offsets), dense @ rows
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pairs = [torch.autograd.grad(out, [values, rows], grad) for out in (found, expected)]
    for mine, theirs in zip(*pairs):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    _, sums = sparse_triton.sum_by_latent(values.detach().flatten(), places, grad)
    torch.testing.assert_close(sums, dense.detach().sum(0), rtol=1e-5, atol=1e-5)


k = 18  # more places than a program takes at once
check(normal(tokens, k), torch.rand(tokens, d_sae - 2, generator=generator).topk(k).indices, None)
ragged = torch.tensor([0, 0, 3, 20, 20, 21, 40, 40, 41])  # some tokens have none
indices = torch.cat([torch.randperm(d_sae, generator=generator)[:n] for n in (0, 3, 17, 0, 1, 19, 0, 1, 2)])
check(normal(43), indices, ragged)
rows, factors = normal(5, 1100).detach(), normal(5).detach()
assert torch.equal(sparse_triton.scaled(rows, factors, torch.float32), rows * factors[:, None])
check(normal(0), indices[:0], torch.zeros(tokens, dtype=torch.int64))
"""


def test_kernels_equal_the_dense_product() -> None:
    # In a process of its own: what Triton compiles for is settled when it is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
