"""Rows of one hook or of two come out of the windows as they went into the store."""

import functools
import hashlib
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import numbered, row_numbers

from saepipe.config import StreamConfig
from saepipe.errors import UserError
from saepipe.store import Store
from saepipe.stream import Batch, Stream

NARROW, WIDE = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
HOOKS, BLOCK_ROWS = {NARROW: 5, WIDE: 12}, {NARROW: 128, WIDE: 16}
DTYPES = ["bfloat16", "float32", "int8"]
PAIRS = [(NARROW, WIDE), (WIDE, NARROW)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    return {
        dtype: numbered(
            tmp_path_factory.mktemp(dtype), hooks=HOOKS, block_rows=BLOCK_ROWS, rows=4500, dtype=dtype, chat=True
        )
        for dtype in DTYPES
    }


@functools.cache
def rows_of(store: Store, hook: str) -> torch.Tensor:
    """Return all rows of a hook, in natural order, block by block."""
    plan = store.plan
    places = [(shard, block) for shard in range(plan.n_shards) for block in range(plan.n_blocks(hook, shard))]
    return torch.cat([store.read_block(hook, *place) for place in places])


def make_stream(store: Store, hook: str, target: str | None, **keys: object) -> Stream:
    sizes = {"batch_tokens": 480, "window_tokens": 1500, "lanes": 6} | keys
    config = StreamConfig(hook=hook, target_hook=target, **sizes)  # type: ignore[arg-type]
    return Stream(store, config, exclude_special_tokens=True)


def take(stream: Stream) -> list[Batch]:
    return list(itertools.islice(stream.iterate(), stream.batches_per_epoch + 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hook", "target"), PAIRS)
def test_a_pair_is_of_the_same_tokens(stores: dict[str, Store], dtype: str, hook: str, target: str) -> None:
    store = stores[dtype]
    for keys in ({}, {"max_norm": 1.1, "positions": [2, 6], "roles": ["user", "assistant"], "prefetch_batches": 0}):
        stream = make_stream(store, hook, target, **keys)
        assert (stream.d_in, stream.d_out) == (HOOKS[hook], HOOKS[target])
        x_rows, y_rows = rows_of(store, hook), rows_of(store, target)
        for number, (x, y) in enumerate(take(stream)):
            rows = torch.from_numpy(stream.rows_of(number))
            assert x.dtype == y.dtype == (torch.float32 if dtype == "int8" else x_rows.dtype)
            assert torch.equal(x, x_rows[rows])
            assert torch.equal(y, y_rows[rows])
            if dtype != "int8":
                np.testing.assert_array_equal(row_numbers(x), row_numbers(y))


@pytest.mark.parametrize("hook", HOOKS)
def test_rows_out_of_int8_are_those_of_read_block(stores: dict[str, Store], hook: str) -> None:
    stream = make_stream(stores["int8"], hook, None)
    rows = rows_of(stores["int8"], hook)
    for number, x in enumerate(take(stream)):
        assert torch.equal(x, rows[torch.from_numpy(stream.rows_of(number))])


def test_ranks_share_out_pairs(stores: dict[str, Store]) -> None:
    alone = make_stream(stores["int8"], NARROW, WIDE)
    config = StreamConfig(hook=NARROW, target_hook=WIDE, batch_tokens=480, window_tokens=1500, lanes=6)
    ranks = [
        next(Stream(stores["int8"], config, exclude_special_tokens=True, rank=rank, world_size=3).iterate(2))
        for rank in range(3)
    ]
    for side, whole in enumerate(next(alone.iterate(2))):
        lanes = [ranks[lane % 3][side].chunk(2)[lane // 3] for lane in range(6)]
        assert torch.equal(torch.cat(lanes), whole)


@pytest.mark.parametrize(("hook", "target"), PAIRS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_damaged_block_of_the_target_reaches_no_batch(
    stores: dict[str, Store], tmp_path: Path, dtype: str, hook: str, target: str
) -> None:
    folder = shutil.copytree(stores[dtype].folder, tmp_path / "store")
    path = folder / target / "000001.safetensors"
    content = bytearray(path.read_bytes())
    content[4096 + 40 * stores[dtype].width(target) * (1 if dtype == "int8" else 2)] ^= 1
    path.write_bytes(content)
    store = Store.open(folder)
    size = BLOCK_ROWS[target]
    spoiled = store.plan.shard_start(1) + np.arange(40 // size * size, 40 // size * size + size)
    stream = make_stream(store, hook, target)
    assert np.isin(spoiled, np.concatenate([stream.rows_of(batch) for batch in range(stream.batches_per_epoch)])).any()
    seen: list[np.ndarray] = []
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged: block ")):
        seen.extend(stream.rows_of(number) for number, _ in enumerate(stream.iterate()))
    assert not np.isin(spoiled, np.concatenate([[-1], *seen])).any()
    next(make_stream(store, hook, None).iterate()).sum()  # the hook alone is sound


def test_the_target_may_be_the_hook_itself(stores: dict[str, Store]) -> None:
    stream = make_stream(stores["bfloat16"], WIDE, WIDE)
    assert (stream.target_hook, stream.d_out) == (None, 12)
    assert isinstance(next(stream.iterate()), torch.Tensor)
    with pytest.raises(UserError, match=r"stream.target_hook=blocks.1.hook_mlp_in is not known; did you mean blocks.1"):
        make_stream(stores["bfloat16"], WIDE, "blocks.1.hook_mlp_in")


def test_golden_pair(stores: dict[str, Store]) -> None:
    """Checkpoints depend on it: a change here resumes every run on other rows."""
    stream = make_stream(stores["bfloat16"], NARROW, WIDE)
    rows = [stream.rows_of(batch) for batch in (0, 1, stream.batches_per_epoch, 1000)]
    assert hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()[:16] == "b4b3c063277b5bb1"
