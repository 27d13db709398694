import functools
import hashlib
import itertools
import logging
import math
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_store import CONTEXT_SIZE, build, numbered, row_numbers

from saepipe.config import StreamConfig
from saepipe.errors import UserError
from saepipe.order import Blocks, Order
from saepipe.parallel import threads
from saepipe.permutation import derive_key
from saepipe.shard import DTYPES
from saepipe.store import Store
from saepipe.stream import Stream

HOOK = "blocks.0.hook_mlp_out"
CONTEXTS = 1600
ROWS = CONTEXTS * CONTEXT_SIZE
BLOCK_ROWS = 64


def make_store(folder: Path, *, width: int = 4, dtype: str = "bfloat16", rows: int = ROWS) -> Store:
    """Write a store whose rows carry the number of their token in the text."""
    return numbered(folder, hooks={HOOK: width}, block_rows={HOOK: BLOCK_ROWS}, rows=rows, dtype=dtype)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Every test leaves as many threads as it found."""
    before, deadline = set(threading.enumerate()), time.monotonic() + 60
    yield
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        time.sleep(0.001)  # what drops an iterator does not wait for its threads
    assert set(threading.enumerate()) <= before


def make_config(**changes: object) -> StreamConfig:
    return StreamConfig(**{"batch_tokens": 960, "window_tokens": 3000, "prefetch_batches": 2, **changes})  # type: ignore[arg-type]


def take(stream: Stream, n: int, start: int = 0) -> list[torch.Tensor]:
    return list(itertools.islice(stream.iterate(start), n))


def tokens_of(store: Store, rows: np.ndarray) -> np.ndarray:
    """Return the token that each row, by its number in natural order, belongs to."""
    return np.concatenate([store.plan.row_tokens(shard) for shard in range(store.plan.n_shards)])[rows]


# ---- what the batches hold


@pytest.mark.parametrize(
    ("filtered", "prefetch"), [*((True, prefetch) for prefetch in range(5)), (False, 0), (False, 4)]
)
def test_batches_hold_the_rows_that_rows_of_tells(store: Store, *, filtered: bool, prefetch: int) -> None:
    stream = Stream(store, make_config(prefetch_batches=prefetch), exclude_special_tokens=filtered)
    expected = told(store, filtered)
    for rows, tokens in zip(expected, take(stream, len(expected)), strict=True):
        assert tokens.shape == (960, 4)
        assert tokens.dtype == torch.bfloat16
        np.testing.assert_array_equal(row_numbers(tokens), rows)


@functools.cache
def told(store: Store, filtered: bool) -> list[np.ndarray]:
    """Return the tokens of an epoch and three batches more, as `rows_of` tells."""
    stream = Stream(store, make_config(), exclude_special_tokens=filtered)
    return [tokens_of(store, stream.rows_of(batch)) for batch in range(stream.batches_per_epoch + 3)]


@pytest.mark.parametrize("filtered", [True, False])
def test_an_epoch_is_all_ordinary_rows_but_less_than_a_batch_and_a_row_a_lane(store: Store, *, filtered: bool) -> None:
    stream = Stream(store, make_config(), exclude_special_tokens=filtered)
    taken = np.concatenate([row_numbers(tokens) for tokens in take(stream, stream.batches_per_epoch)])
    assert len(np.unique(taken)) == len(taken)
    wanted = np.arange(ROWS)[store.tokens.train.ordinary(np.arange(ROWS))] if filtered else np.arange(ROWS)
    assert np.isin(taken, wanted).all()
    assert len(wanted) - len(taken) < 960 + 24


@pytest.mark.parametrize(("dtype", "width"), [("float32", 3), ("bfloat16", 3), ("float16", 2), ("bfloat16", 6)])
def test_rows_of_every_size_arrive_whole(tmp_path: Path, dtype: str, width: int) -> None:
    store = make_store(tmp_path, dtype=dtype, width=width, rows=1500)
    stream = Stream(store, make_config(), exclude_special_tokens=False)
    (tokens,) = take(stream, 1)
    numbers = tokens_of(store, stream.rows_of(0))
    np.testing.assert_array_equal(row_numbers(tokens), numbers)
    assert tokens.dtype == DTYPES[dtype]
    assert tokens.shape == (960, width)
    np.testing.assert_array_equal(tokens[:, 2:].float().numpy(), np.repeat(numbers[:, None] % 7 + 1, width - 2, axis=1))


def test_the_key_is_the_one_in_the_definition(store: Store) -> None:
    stream = Stream(store, make_config(seed=3), exclude_special_tokens=True)
    key = derive_key("stream", store.plan.identity, HOOK, "", 3, 960, 3000, 24, "special=out")
    blocks = Blocks.of(store.plan, [HOOK], store.ordinary)
    order = Order(blocks, key, lanes=24, batch_tokens=960, window_tokens=3000)
    for batch in (0, stream.batches_per_epoch):
        np.testing.assert_array_equal(stream.rows_of(batch), order.rows_of(batch))


def digest(stream: Stream) -> str:
    rows = [stream.rows_of(batch) for batch in (0, 1, stream.batches_per_epoch, 1000)]
    return hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("filtered", "keys", "expected"),
    [
        (False, {}, "6fbb3986f19916ab"),
        (True, {}, "c9f2e3d2e7d373cb"),
        (True, {"positions": [1, 5], "max_norm": 2.0, "seed": 7}, "8562722a2306e35a"),
    ],
)
def test_golden_stream(store: Store, *, filtered: bool, keys: dict[str, object], expected: str) -> None:
    """Checkpoints depend on it: a change here resumes every run on other rows."""
    stream = Stream(store, make_config(batch_tokens=480, **keys), exclude_special_tokens=filtered)
    assert digest(stream) == expected


@pytest.mark.parametrize("change", [{"seed": 1}, {"window_tokens": 3001}, {"lanes": 12}, {"batch_tokens": 984}])
def test_another_stream_has_another_order(store: Store, change: dict[str, int]) -> None:
    first = Stream(store, make_config(), exclude_special_tokens=False).rows_of(0)
    second = Stream(store, make_config(**change), exclude_special_tokens=False).rows_of(0)
    assert len(np.intersect1d(first, second)) < 500  # of 960; the same rows would be all of them


def test_lanes_follow_from_the_batch(store: Store) -> None:
    lanes = {
        batch: Stream(store, make_config(batch_tokens=batch), exclude_special_tokens=True).lanes for batch in LANES
    }
    assert lanes == LANES


LANES = {3072: 24, 4096: 64, 1000: 8, 999: 1}


# ---- ranks and resuming


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8])
def test_ranks_share_out_the_batches_of_one_rank(store: Store, world_size: int) -> None:
    config = make_config(batch_tokens=3072, window_tokens=6000)
    alone = Stream(store, config, exclude_special_tokens=True)
    n = alone.batches_per_epoch + 1
    ranks = [
        take(Stream(store, config, exclude_special_tokens=True, rank=rank, world_size=world_size), n)
        for rank in range(world_size)
    ]
    for batch, whole in enumerate(take(alone, n)):
        lanes = [ranks[lane % world_size][batch].chunk(24 // world_size)[lane // world_size] for lane in range(24)]
        assert torch.equal(torch.cat(lanes), whole)


@pytest.mark.parametrize(("prefetch", "window_tokens"), [(0, 3000), (3, 1000), (3, 100_000)])
def test_resuming_anywhere_gives_the_rest(store: Store, prefetch: int, window_tokens: int) -> None:
    config = make_config(prefetch_batches=prefetch, window_tokens=window_tokens)
    stream = Stream(store, config, exclude_special_tokens=True)
    n = stream.batches_per_epoch + 4
    whole = take(stream, n)
    for start in range(1, n, 2):
        rest = whole[start : start + 4]
        for expected, tokens in zip(rest, take(stream, len(rest), start), strict=True):
            assert torch.equal(tokens, expected)


def test_resuming_far_on_reads_the_needed_windows_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(
        store, make_config(prefetch_batches=0, batch_tokens=480, window_tokens=24), exclude_special_tokens=True
    )
    read = []
    original = store.read_block_into
    monkeypatch.setattr(store, "read_block_into", lambda *where: read.append(where) or original(*where))
    start = 1_000_000 * stream.batches_per_epoch + 5
    (tokens,) = take(stream, 1, start)
    np.testing.assert_array_equal(row_numbers(tokens), tokens_of(store, stream.rows_of(start)))
    # windows of one row, each in one block
    assert len(read) == 480


# ---- memory


@pytest.mark.parametrize(("world_size", "prefetch"), [(1, 4), (4, 1), (1, 0)])
def test_memory_is_the_window_and_what_is_ahead_and_ready(
    store: Store, monkeypatch: pytest.MonkeyPatch, world_size: int, prefetch: int
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    config = make_config(batch_tokens=240, window_tokens=9600, prefetch_batches=prefetch)
    stream = Stream(store, config, exclude_special_tokens=False, world_size=world_size)
    batches = stream.iterate()
    most = 0
    for _ in range(2 * stream.batches_per_epoch):
        next(batches)
        most = max(most, sum(tensor.nbytes for ref in list(made) if (tensor := ref()) is not None))
    batches.close()
    lanes, row_bytes = 24 // world_size, 4 * 2
    readers = min(threads(), max(1, lanes // 12)) if prefetch else 0
    # A window begins and ends within a batch; the lanes' windows begin at most `apart` batches one after the other.
    apart = math.ceil(41 / lanes)
    rows = (41 + readers * apart + prefetch + 2) * 10 * lanes + 1 + readers * BLOCK_ROWS
    assert lanes * 400 * row_bytes < most <= (rows + BLOCK_ROWS) * row_bytes


# ---- errors and threads


ERRORS = [
    ({"hook": "blocks.0.hook_mlp"}, 1, f"stream.hook=.*{HOOK}"),
    ({"batch_tokens": 24_000}, 1, f"stream.batch_tokens=24000 .* {ROWS} rows .* {ROWS}"),
    ({"batch_tokens": 22_000, "lanes": 11}, 1, "the largest batch is 12793"),
    ({}, 5, "stream.lanes=24 .* 1 or 2 or 3 or 4 or 6 or 8 or 12 or 24 ranks"),
]


@pytest.mark.parametrize(("change", "world_size", "expected"), ERRORS)
def test_errors_name_the_key_and_the_cure(
    store: Store, change: dict[str, int | str], world_size: int, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        Stream(store, make_config(**change), exclude_special_tokens=False, world_size=world_size)


def test_a_store_of_several_hooks_asks_which(tmp_path: Path) -> None:
    several = build(tmp_path / "store")
    with pytest.raises(UserError, match=r"stream.hook=null .* blocks.0.hook_resid_post, blocks.1"):
        Stream(several, make_config(), exclude_special_tokens=True)
    assert (
        Stream(several, make_config(hook="blocks.1.hook_resid_post", batch_tokens=8), exclude_special_tokens=True).d_in
        == 4
    )


def test_the_largest_batch_is_possible(store: Store) -> None:
    stream = Stream(store, make_config(batch_tokens=ROWS, prefetch_batches=1), exclude_special_tokens=False)
    assert stream.batches_per_epoch == 1
    (tokens,) = take(stream, 1)
    np.testing.assert_array_equal(np.sort(row_numbers(tokens)), np.arange(ROWS))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_a_damaged_block_reaches_no_batch(store: Store, tmp_path: Path, prefetch: int) -> None:
    shutil.copytree(store.folder, tmp_path / "store")
    path = tmp_path / "store" / HOOK / "000005.safetensors"
    content = bytearray(path.read_bytes())
    content[4096 + 7 * BLOCK_ROWS * 8 + 37] ^= 1
    path.write_bytes(content)
    damaged = Store.open(tmp_path / "store")
    stream = Stream(damaged, make_config(prefetch_batches=prefetch), exclude_special_tokens=True)
    spoiled = damaged.plan.row_tokens(5, 7 * BLOCK_ROWS, 8 * BLOCK_ROWS)
    batches = stream.iterate()
    seen: list[int] = []
    with pytest.raises(UserError, match=r"000005.safetensors is damaged"):
        seen.extend(number for tokens in batches for number in row_numbers(tokens))
    assert seen
    assert not np.isin(seen, spoiled).any()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("end", ["close", "drop", "break"])
def test_threads_end_with_the_iterator(store: Store, end: str) -> None:
    before = threading.active_count()
    config = make_config(prefetch_batches=3, lanes=10)  # one reader
    batches = Stream(store, config, exclude_special_tokens=True).iterate()
    assert threading.active_count() == before  # none before the first batch is asked for
    next(batches)
    assert threading.active_count() == before + 2
    if end == "close":
        batches.close()
    elif end == "break":
        for _ in batches:
            break
    del batches
    deadline = time.monotonic() + 20  # what drops it does not wait for them
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


def test_no_thread_where_nothing_is_prefetched(store: Store) -> None:
    before = threading.active_count()
    batches = Stream(store, make_config(prefetch_batches=0), exclude_special_tokens=True).iterate()
    next(batches)
    assert threading.active_count() == before


def test_a_process_ends_with_an_open_iterator(store: Store) -> None:
    """Its threads neither keep the interpreter from ending nor fail while it does."""
    script = (
        "import sys, threading; from saepipe.config import StreamConfig; from saepipe.store import Store; "
        "from saepipe.stream import Stream; "
        "stream = Stream(Store.open(sys.argv[1]), StreamConfig(batch_tokens=960), exclude_special_tokens=True); "
        # held where it is dropped only after the modules that closing needs are taken down
        "threading.held = stream.iterate(); next(threading.held)"
    )
    command = [sys.executable, "-c", script, str(store.folder)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_an_epoch_leaves_out_is_said_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saepipe.stream")
    stream = Stream(store, make_config(), exclude_special_tokens=False)
    batches = stream.iterate(start=5)
    for _ in range(2 * 13):
        next(batches)
    batches.close()
    (record,) = caplog.records
    assert "13 batches an epoch; 320 rows fill no batch of an epoch, other ones in every epoch" in record.getMessage()


def test_the_disk_is_told_of_every_block_before_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    announce, read = Store.announce, Store.read_block_into

    def tell(self: Store, hook: str, shard: int, block: int) -> None:
        told.append((shard, block))
        announce(self, hook, shard, block)

    def check(self: Store, hook: str, shard: int, block: int, *args: Any) -> int:
        assert (shard, block) in told
        return read(self, hook, shard, block, *args)

    monkeypatch.setattr(Store, "announce", tell)
    monkeypatch.setattr(Store, "read_block_into", check)
    stream = Stream(store, make_config(prefetch_batches=0), exclude_special_tokens=False)
    take(stream, stream.batches_per_epoch)
    assert len(set(told)) == sum(store.plan.n_blocks(HOOK, shard) for shard in range(store.plan.n_shards))
