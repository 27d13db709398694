"""The choice of the largest latents of a batch, and the threshold that follows it."""

import pytest
import torch

from saepipe.ranks import ALONE, Ranks
from saepipe.saes.base import Step
from saepipe.saes.batchtopk import BatchTopKConfig, BatchTopKSAE, candidates, kth_largest, smallest_kept


def largest(values: torch.Tensor, count: int) -> list[int]:
    smallest, places = smallest_kept(values, count, ALONE)
    return places[values[places] >= smallest].tolist()


def by_sorting(values: torch.Tensor, count: int) -> list[int]:
    """Choose the largest; of those that tie last all, or in bfloat16 none, where that is nearer to count."""
    positive = values[values > 0].sort(descending=True).values
    if not count or not len(positive):
        return []
    last = positive[min(count, len(positive)) - 1]
    above, reached = int((values > last).sum()), int((values >= last).sum())
    exclusive = (
        values.dtype == torch.bfloat16 and above > 0 and count < len(positive) and count - above < reached - count
    )
    return ((values > last) if exclusive else (values >= last)).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 50, 1000, 4000, 20_000])
def test_largest_are_those_of_a_full_sort(count: int, dtype: torch.dtype) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(count)).to(dtype)
    expected = by_sorting(values, count)
    assert largest(values, count) == expected
    found = candidates(iter(values.split(3000)), count)
    assert len(largest(found, count)) == len(expected)
    if count and dtype != torch.bfloat16:
        assert len(found) == min(count, int((values > 0).sum()))


def test_those_that_tie_are_kept_or_in_bfloat16_dropped_where_that_is_nearer() -> None:
    values = torch.tensor([4.0, 3, 2, 2, 2, 1, -1, 2, 2])  # five twos
    assert [len(largest(values, count)) for count in range(1, 9)] == [1, 2, 7, 7, 7, 7, 7, 8]
    assert [len(largest(values.bfloat16(), count)) for count in range(1, 9)] == [1, 2, 2, 2, 7, 7, 7, 8]
    assert len(largest(torch.ones(10, dtype=torch.bfloat16), 3)) == 10  # rather than none


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
    # the 300th is one of the many halves, and all that equal it are kept
    assert largest(values, 300) == (values > 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("k", [0.35, 0.7, 1.9, 3.3])
def test_any_number_of_ranks_keeps_as_many(k: float) -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=16, k=k), 4)
    counts = {sae._count(120 // world, Step(ranks=Ranks(0, world))) for world in (1, 2, 3, 4, 6, 12)}
    assert counts == {int(k * 120)}


def test_a_batch_that_keeps_nothing_leaves_the_threshold() -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=16, k=0.01), 4)
    sae.initialise(torch.Generator().manual_seed(0))
    sae.threshold.fill_(0.25)
    x = torch.randn(8, 4)
    losses = sae.loss(x, x, Step())
    losses.total.backward()
    sae.after_step(losses)
    assert (losses.fired.sum(), losses.notes["topk_threshold"], sae.threshold) == (0, 0, 0.25)
