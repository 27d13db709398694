"""The stream against plain reading: an epoch of shuffled, verified rows, and one thread's pass through its files."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from saepipe.bench_figure import Figure, speed
from saepipe.bench_store import LARGER, WIDTH, of_random_rows, shard_files, synthetic
from saepipe.config import RunConfig
from saepipe.shard import DTYPES, raw
from saepipe.store import Store
from saepipe.stream import Batch, Stream

_READ_BYTES = 4 << 20


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Stream epochs, and read the same files, from the page cache and then from the disk.

    The plain reading is one thread's, in pieces of 4 MiB, into a buffer of the window's size that is used over and
    over. Where files cannot be dropped from the page cache (macOS, Windows), the second figure is left out.
    """
    store = synthetic(config, folder, LARGER * config.bench.gb)
    stream = Stream(store, of_random_rows(config.stream), exclude_special_tokens=config.data.exclude_special_tokens)
    window = min(config.stream.window_tokens, store.rows) * WIDTH * DTYPES[config.store.dtype].itemsize
    plain = _Plain(shard_files(store), raw(torch.ones(max(window, _READ_BYTES), dtype=torch.uint8)))
    rounds, rows = range(config.bench.rounds), stream.batches_per_epoch * config.stream.batch_tokens

    def pair(plain_s: float, stream_s: float) -> tuple[float, float]:
        return store.rows / plain_s, rows / stream_s

    plain.read()
    with closing(stream.iterate()) as batches:  # an epoch in the midst of others, with windows that are used again
        next(batches)
        warm = [pair(_timed(plain.read), _timed(lambda: _take(batches, stream))) for _ in rounds]
    figures = [_figure("from the page cache", warm, 0.3, store)]
    if hasattr(os, "posix_fadvise"):
        cold = [pair(plain.cold(plain.read), plain.cold(lambda: _first_epoch(stream))) for _ in rounds]
        figures.append(_figure("from the disk", cold, 0.9, store))
    return figures


def _figure(way: str, found: list[tuple[float, float]], bar: float, store: Store) -> Figure:
    plain, streamed = (statistics.median(side) for side in zip(*found, strict=True))
    gb = store.plan.total_bytes / store.rows / 1e9
    return Figure(
        f"stream, rows/s over plain reading, both {way}",
        [mine / theirs for theirs, mine in found],
        {
            "stream_rows_per_s": streamed,
            "sequential_rows_per_s": plain,
            "stream_gb_per_s": streamed * gb,
            "sequential_gb_per_s": plain * gb,
            "rows": store.rows,
        },
        at_least=bar,
        told=speed(streamed),
    )


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _take(batches: Iterator[Batch], stream: Stream) -> None:
    for _ in islice(batches, stream.batches_per_epoch):
        pass


def _first_epoch(stream: Stream) -> None:
    with closing(stream.iterate()) as batches:
        _take(batches, stream)


class _Plain:
    """Plain reading of files."""

    def __init__(self, files: list[Path], view: memoryview) -> None:
        self._files, self._view = files, view

    def read(self) -> None:
        """Read the files from beginning to end into the buffer, which begins anew where it is full."""
        at = 0
        for path in self._files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(self._view[at : at + _READ_BYTES]):
                    at = at + count if at + count + _READ_BYTES <= len(self._view) else 0

    def cold(self, work: Callable[[], object]) -> float:
        """Time what reads the files after the page cache has forgotten them."""
        for path in self._files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # only what is on the disk can be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        return _timed(work)
