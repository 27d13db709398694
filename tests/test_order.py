import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from saepipe.order import Blocks, Order, Place
from saepipe.permutation import Permutation, derive_key

KEY = derive_key("tests")


def make_blocks(n_shards: int = 7, *, kept: float = 0.8) -> Blocks:
    """Blocks of 8 rows in shards of 3 blocks, the last of 5 rows; two blocks keep no row."""
    block_rows, sizes = 8, np.tile([8, 8, 5], n_shards)
    # scattered without numpy's generators, whose numbers may change with its version
    scattered = np.arange(len(sizes) * block_rows).reshape(-1, block_rows) * 2_654_435_761 % 2**32 < kept * 2**32
    mask = (np.arange(block_rows) < sizes[:, None]) & scattered
    mask[4] = mask[5] = False
    return Blocks(
        block_rows=block_rows,
        shard=np.repeat(np.arange(n_shards), 3),
        number=np.tile(np.arange(3), n_shards),
        first_row=np.cumsum(sizes) - sizes,
        kept=mask.sum(axis=1),
        bits=np.packbits(mask, axis=1),
    )


@dataclass(frozen=True)
class Shape:
    """How a stream is divided."""

    lanes: int
    batch_tokens: int
    window_tokens: int

    def order(self, blocks: Blocks) -> Order:
        return Order(blocks, KEY, lanes=self.lanes, batch_tokens=self.batch_tokens, window_tokens=self.window_tokens)


SHAPES = [
    Shape(lanes=1, batch_tokens=5, window_tokens=17),
    Shape(lanes=3, batch_tokens=6, window_tokens=30),
    Shape(lanes=4, batch_tokens=8, window_tokens=31),  # windows end within batches
    Shape(lanes=4, batch_tokens=20, window_tokens=8),  # several windows in a batch
    Shape(lanes=4, batch_tokens=8, window_tokens=1),  # windows of one row
    Shape(lanes=2, batch_tokens=2, window_tokens=10_000),  # a window holds all
    Shape(lanes=6, batch_tokens=96, window_tokens=50),  # one batch an epoch
]


def reference(blocks: Blocks, shape: Shape, batch: int) -> list[int]:
    """The definition in the module's docstring, written again row by row."""
    masks = np.unpackbits(blocks.bits, axis=1).astype(bool)
    total = int(masks.sum())
    lane_rows, b = total // shape.lanes, shape.batch_tokens // shape.lanes
    epoch, i = divmod(batch, lane_rows // b)
    n = len(masks)
    new_order = Permutation(derive_key("blocks", KEY, epoch), n)(np.arange(n))
    sequence = [int(blocks.first_row[j] + row) for j in new_order for row in np.flatnonzero(masks[j])]
    found = []
    for lane in range(shape.lanes):
        mine = sequence[lane * lane_rows : (lane + 1) * lane_rows]
        width = max(1, shape.window_tokens // shape.lanes)
        shift = width * lane // shape.lanes
        places: list[int] = []
        for w in itertools.count():
            rows = mine[max(0, w * width - shift) : max(0, (w + 1) * width - shift)]
            if not rows:
                break
            shuffle = Permutation(derive_key("rows", KEY, epoch, lane, w), len(rows))
            places += [rows[p] for p in shuffle(np.arange(len(rows)))]
        found += places[i * b : (i + 1) * b]
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_written_definition(shape: Shape) -> None:
    blocks = make_blocks()
    order = shape.order(blocks)
    n = order.batches_per_epoch
    for batch in sorted({0, n // 2, n - 1, n, 2 * n + n // 3}):
        assert order.rows_of(batch).tolist() == reference(blocks, shape, batch), batch


def test_golden_order() -> None:
    """Checkpoints depend on it: a change here resumes every run on other rows."""
    order = Shape(lanes=4, batch_tokens=8, window_tokens=31).order(make_blocks())
    assert order.rows_of(0).tolist() == [84, 90, 108, 110, 43, 120, 13, 14]
    three_epochs = np.concatenate([order.rows_of(batch) for batch in range(3 * order.batches_per_epoch)])
    assert (
        hashlib.sha256(three_epochs.astype("<i8").tobytes()).hexdigest()
        == "ade53ca28b23c57beefa2aac30765527a7b17de4663fb2e3e5691297a534ae2e"
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_epoch_takes_kept_rows_once_and_leaves_few_out(shape: Shape) -> None:
    blocks = make_blocks()
    order = shape.order(blocks)
    mask = np.unpackbits(blocks.bits, axis=1).astype(bool)
    kept = (blocks.first_row[:, None] + np.arange(blocks.block_rows))[mask]
    for epoch in range(3):
        batches = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        rows = np.concatenate([order.rows_of(batch) for batch in batches])
        assert len(rows) == len(batches) * shape.batch_tokens
        assert len(np.unique(rows)) == len(rows)
        assert np.isin(rows, kept).all()
        assert len(kept) - len(rows) < shape.batch_tokens + shape.lanes


def test_epochs_leave_other_rows_out() -> None:
    order = Shape(lanes=4, batch_tokens=20, window_tokens=40).order(make_blocks())
    left_out = []
    for epoch in range(10):
        batches = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        taken = np.concatenate([order.rows_of(batch) for batch in batches])
        left_out.append(set(range(147)) - set(taken.tolist()))
    never = set.intersection(*left_out)
    mask = np.unpackbits(order.blocks.bits, axis=1).astype(bool)
    assert len(left_out[0]) > len(never)
    assert len(never) == 147 - mask.sum()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_are_named_in_the_order_in_which_batches_need_them(shape: Shape) -> None:
    order = shape.order(make_blocks())
    for lanes in (range(shape.lanes), range(shape.lanes - 1, shape.lanes)):
        for start in sorted({0, 1, order.batches_per_epoch // 2, order.batches_per_epoch - 1}):
            needed: list[Place] = []
            for batch in range(start, start + 2 * order.batches_per_epoch):
                epoch, index = divmod(batch, order.batches_per_epoch)
                for lane, row in itertools.product(lanes, range(order.lane_batch)):
                    place = Place(epoch, lane, order.window_index(lane, index * order.lane_batch + row))
                    if place not in needed:
                        needed.append(place)
            assert list(itertools.islice(order.windows_from(start, lanes), len(needed))) == needed


def test_lanes_change_windows_one_after_the_other() -> None:
    """Else all lanes would read a window at once, and the step would wait for all of them."""
    shape = Shape(lanes=8, batch_tokens=16, window_tokens=1024)
    order = shape.order(make_blocks(n_shards=800))
    assert order.batches_per_epoch > 500
    # between the first windows, read at once, and the end of the epoch
    changes = [
        [lane for lane in range(8) if order.window_index(lane, 2 * batch) != order.window_index(lane, 2 * batch - 1)]
        for batch in range(1, order.batches_per_epoch)
    ]
    busy = [batch for batch, lanes in enumerate(changes) if lanes]
    assert max(map(len, changes)) == 1
    assert set(np.diff(busy)) == {8}  # 128 rows a window, 2 rows a batch, 8 lanes


@pytest.mark.parametrize("window_tokens", [1024, 4096])
def test_rows_that_are_neighbours_on_disk_are_apart_in_the_stream(window_tokens: int) -> None:
    """A batch of 64 rows draws from its window as if from a hat."""
    order = Shape(lanes=4, batch_tokens=64, window_tokens=window_tokens).order(make_blocks(n_shards=400, kept=1))
    pairs = 0
    for batch in range(50):
        rows = np.sort(order.rows_of(batch))
        pairs += int((np.diff(rows) == 1).sum())
    # 64 rows of `window_tokens`, mostly in whole blocks: a row's neighbour is in the batch by chance only
    expected = 50 * 64 * 64 / window_tokens
    assert pairs < 1.5 * expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batches_that_have_rows_of_a_window(shape: Shape) -> None:
    order = shape.order(make_blocks())
    found: dict[Place, set[int]] = {}
    for batch in range(3 * order.batches_per_epoch):
        epoch, index = divmod(batch, order.batches_per_epoch)
        for lane, row in itertools.product(range(shape.lanes), range(order.lane_batch)):
            place = Place(epoch, lane, order.window_index(lane, index * order.lane_batch + row))
            found.setdefault(place, set()).add(batch)
    for place, batches in found.items():
        assert set(order.batches_of(place)) == batches
    assert max(map(len, found.values())) <= order.window_batches
