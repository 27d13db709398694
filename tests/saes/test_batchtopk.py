"""The choice of the largest latents of a batch, and the threshold that follows it."""

import pytest
import torch

from saepipe.ranks import ALONE
from saepipe.saes.base import Step
from saepipe.saes.batchtopk import BatchTopKConfig, BatchTopKSAE, kth_largest, smallest_kept


def largest(parts: list[torch.Tensor], count: int) -> list[list[int]]:
    smallest, places = smallest_kept(parts, count, ALONE)
    return [there[part[there] >= smallest].tolist() for part, there in zip(parts, places, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 50, 1000, 4000, 20_000])
def test_largest_are_those_of_a_full_sort(count: int, dtype: torch.dtype) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(count)).to(dtype)
    order = values.argsort(descending=True)
    smallest = values[order[: count or 1]].clamp(min=torch.finfo(dtype).tiny).min() if count else torch.inf
    expected = (values >= smallest).nonzero().flatten().tolist()
    assert largest([values], count) == [expected]
    halves = largest([values[:6000], values[6000:]], count)
    assert halves == [[i for i in expected if i < 6000], [i - 6000 for i in expected if i >= 6000]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kth_largest_of_any_size(dtype: torch.dtype) -> None:
    values = torch.cat(
        [torch.tensor([1e-38, 3e38, 1.0, 1.0]), torch.rand(500) * 10.0 ** torch.randint(-30, 30, (500,))]
    )
    values = values.to(dtype)
    for k in (1, 2, 3, 100, 503, 504):
        assert kth_largest(values, k, ALONE) == values.sort(descending=True).values[k - 1]


def test_where_the_sample_misleads_none_is_missed() -> None:
    values = torch.zeros(10_000)
    values[::257] = torch.arange(1.0, 40)  # all that is sampled is large, and nothing else is
    values[1:2000:7] = 0.5
    # the 100th is one of the many halves, and all that equal it are kept
    assert largest([values], 100) == [(values > 0).nonzero().flatten().tolist()]


def test_a_batch_that_keeps_nothing_leaves_the_threshold() -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=16, k=0.01), 4)
    sae.initialise(torch.Generator().manual_seed(0))
    sae.threshold.fill_(0.25)
    x = torch.randn(8, 4)
    losses = sae.loss(x, x, Step())
    losses.total.backward()
    sae.after_step(losses)
    assert (losses.fired.sum(), losses.notes["topk_threshold"], sae.threshold) == (0, 0, 0.25)
