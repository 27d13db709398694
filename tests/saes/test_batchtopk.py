"""The choice of the largest latents of a batch, and the threshold that follows it."""

import pytest
import torch

from saepipe.saes.batchtopk import BatchTopKConfig, BatchTopKSAE, largest


@pytest.mark.parametrize("count", [0, 1, 50, 1000, 4000, 20_000])
def test_largest_are_those_of_a_full_sort(count: int) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(count))
    order = values.argsort(descending=True)[:count]
    assert largest(values, count).tolist() == sorted(order[values[order] > 0].tolist())


def test_where_the_sample_misleads_none_is_missed() -> None:
    values = torch.zeros(10_000)
    values[::257] = torch.arange(1.0, 40)  # all that is sampled is large, and nothing else is
    values[1:2000:7] = 0.5
    # the 100th is one of the many halves, and all that equal it are kept
    assert largest(values, 100).tolist() == (values > 0).nonzero().flatten().tolist()


def test_a_batch_that_keeps_nothing_leaves_the_threshold() -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=16, k=0.01), 4)
    sae.initialise(torch.Generator().manual_seed(0))
    sae.threshold.fill_(0.25)
    x = torch.randn(8, 4)
    losses = sae.loss(x, x, step=0, dead=torch.zeros(0, dtype=torch.int64))
    losses.total.backward()
    sae.after_step(losses)
    assert (losses.fired.sum(), losses.notes["topk_threshold"], sae.threshold) == (0, 0, 0.25)
