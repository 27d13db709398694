"""What the machine can do at most (of a round, the best counts): products of matrices, copies in memory, its disk."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from saepipe.bench_figure import Figure
from saepipe.bench_step import chosen_device
from saepipe.config import RunConfig

_SIDE = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices."""
_COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Bytes of a copy: many times what a cache holds."""
_CHUNK_BYTES = 4 << 20
_TIMES = 5
"""Products or copies of a round."""


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Measure them; the disk is that of `bench.dir`, and is read after the page cache has forgotten the file."""
    device = chosen_device(config)
    rounds = range(config.bench.rounds)
    return [*_products(device, rounds), _copy(device, rounds), *_disk(folder, int(config.bench.gb * 1e9), rounds)]


def _products(device: str, rounds: range) -> Iterator[Figure]:
    side = _SIDE[device]
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)  # to get memory anew would take time as well
        rates = [2 * side**3 / 1e12 / _seconds(partial(torch.mm, a, b, out=out), device) for _ in rounds]
        name = f"limit, product of matrices of {side} x {side}, {str(dtype).removeprefix('torch.')}"
        yield Figure(name, rates, {"side": side}, unit="TFLOP/s")


def _copy(device: str, rounds: range) -> Figure:
    source = torch.ones(_COPIED_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    rates = [2 * source.nbytes / 1e9 / _seconds(lambda: target.copy_(source), device) for _ in rounds]
    return Figure("limit, copy in memory, read and written", rates, {"bytes": source.nbytes}, unit="GB/s")


def _seconds(work: Callable[[], object], device: str) -> float:
    """Return the least time that the work takes."""
    seconds = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _disk(folder: Path, size: int, rounds: range) -> Iterator[Figure]:
    """Write a file and read it, one thread in order."""
    path, chunk = folder / "limit", memoryview(os.urandom(_CHUNK_BYTES))
    buffer = bytearray(_CHUNK_BYTES)
    written, read = [], []
    for _ in rounds:
        with path.open("wb", buffering=0) as file:
            begin = time.perf_counter()
            for start in range(0, size, _CHUNK_BYTES):
                file.write(chunk[: size - start])
            os.fsync(file.fileno())
            written.append(size / 1e9 / (time.perf_counter() - begin))
            forgotten = hasattr(os, "posix_fadvise")
            if forgotten:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                continue
        read.append(size / 1e9 / (time.perf_counter() - begin))
        path.unlink()
    yield Figure("limit, writing to the disk, with fsync", written, {"bytes": size}, unit="GB/s")
    if forgotten:
        yield Figure("limit, reading from the disk", read, {"bytes": size}, unit="GB/s")
