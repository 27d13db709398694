"""The memory of batches is used again when nobody has them any more, and not before."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_store import numbered

from saepipe.config import StreamConfig
from saepipe.store import Store
from saepipe.stream import Batch, Stream

NARROW, WIDE = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
PREFETCH = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    hooks, block_rows = {NARROW: 5, WIDE: 12}, {NARROW: 128, WIDE: 16}
    return numbered(tmp_path_factory.mktemp("store"), hooks=hooks, block_rows=block_rows, rows=4500)


def make_stream(store: Store, target: str | None = None) -> Stream:
    sizes = {"batch_tokens": 240, "window_tokens": 1500, "lanes": 6, "prefetch_batches": PREFETCH}
    config = StreamConfig(hook=NARROW, target_hook=target, **sizes)  # type: ignore[arg-type]
    return Stream(store, config, exclude_special_tokens=True)


def places(batches: Iterator[Batch]) -> set[int]:
    """Return where the next 60 batches lie, each of which is dropped at once."""
    return {side.data_ptr() for batch in itertools.islice(batches, 60) for side in sides(batch)}


def sides(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


@pytest.mark.parametrize("target", [None, WIDE])
@pytest.mark.parametrize("kept", [1, 2, 4, 30])
def test_batches_that_are_kept_stay_as_they_are(store: Store, target: str | None, kept: int) -> None:
    """However many the consumer keeps, and for however long."""
    batches = make_stream(store, target).iterate()
    first = [next(batches) for _ in range(kept)]
    copies = [[side.clone() for side in sides(batch)] for batch in first]
    later = list(itertools.islice(batches, 3 * make_stream(store).batches_per_epoch))
    batches.close()
    for batch, expected in zip(first, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(sides(batch), expected, strict=True))
    again = itertools.islice(make_stream(store, target).iterate(kept), len(later))
    assert all(
        torch.equal(a, b)
        for a, b in zip(map(sides, later), map(sides, again), strict=True)
        for a, b in zip(a, b, strict=True)
    )


def test_a_batch_that_is_dropped_gives_its_memory_to_a_later_one(store: Store) -> None:
    batches = make_stream(store).iterate()
    assert len(places(batches)) < 40


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch[1][:1],
        lambda batch: batch[0].view(torch.int16)[3],
        lambda batch: batch[1].view(torch.uint8).numpy(),
    ],
)
def test_any_part_of_a_batch_keeps_the_memory_of_all_of_it(store: Store, keep: Callable[[Batch], object]) -> None:
    batches = make_stream(store, WIDE).iterate()
    batch = next(batches)
    kept, taken = keep(batch), {side.data_ptr() for side in batch}
    value = torch.as_tensor(kept).clone()
    del batch
    assert not places(batches) & taken
    assert torch.equal(torch.as_tensor(kept), value)
    del kept
    assert places(batches) & taken


def test_a_batch_outlives_the_stream(tmp_path: Path) -> None:
    store = numbered(tmp_path, hooks={NARROW: 5}, block_rows={NARROW: 128}, rows=4500)
    batches = make_stream(store).iterate()
    batch = next(batches)
    expected = batch.clone()
    batches.close()
    del batches, store
    assert torch.equal(batch, expected)
