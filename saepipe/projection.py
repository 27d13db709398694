"""What a store will cost, said before anything is written, and refused where disk, quota or memory cannot hold it."""

import ctypes
import logging
import math
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from saepipe import durable
from saepipe.config import STORE_DTYPES, RunConfig
from saepipe.durable import disk_errors
from saepipe.errors import UserError
from saepipe.language_model import LanguageModel
from saepipe.layout import HEADER_BYTES, row_bytes
from saepipe.plan import HELD_OUT_ROWS

log = logging.getLogger(__name__)

_TIMING_S = 1.0
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Projection:
    """The costs of a store."""

    rows: int
    """Training rows per hook."""
    bytes: int
    """Size of the finished store."""
    missing_bytes: int
    """What is still to be written of it."""
    seconds: float
    """Time that is left, divided among the workers."""
    tokens_per_s: float
    """Speed of one worker."""
    workers: int
    """How many there are."""


def project(config: RunConfig, model: LanguageModel, *, workers: int) -> Projection:
    """Work out the costs, say them, and refuse what cannot be.

    Args:
        config: The run.
        model: Its language model, which is timed on random tokens for about a second.
        workers: Processes that will divide the work.

    Raises:
        UserError: Too little disk, quota or memory; names the keys to change, with values.
    """
    wanted, disk = config.store, room(config, model)
    memory = _check_memory(config, sum(model.width(hook) for hook in config.model.hooks), disk.rows)
    speed = tokens_per_s(config, model)
    seconds = disk.missing_bytes / disk.bytes * disk.rows / speed / workers
    log.info(
        f"store.dir={wanted.dir}: {wanted.tokens:,} tokens of {', '.join(config.model.hooks)}, about "
        f"{duration(seconds)} at {speed:,.0f} tokens/s{f' for each of {workers} workers' if workers > 1 else ''} "
        f"({model.capture_path} on {model.device}), {disk.bytes / 1e9:.3g} GB on disk "
        f"({disk.free_bytes / 1e9:.3g} GB free), {memory / 1e9:.3g} GB of memory per worker to shuffle in"
    )
    return Projection(wanted.tokens, round(disk.bytes), round(disk.missing_bytes), seconds, speed, workers)


@dataclass(frozen=True)
class Room:
    """What a store needs of its disk."""

    rows: int
    """Rows per hook, with those held out."""
    bytes: float
    """Size of the finished store."""
    missing_bytes: float
    """What is still to be written of it."""
    free_bytes: int
    """What the disk has."""


def room(config: RunConfig, model: LanguageModel) -> Room:
    """Work out what a store needs of its disk; the model's weights are not loaded for it.

    Raises:
        UserError: The disk, or a quota, has not that much; names the keys to change, with values.
    """
    wanted, share = config.store, config.data.held_out
    folder = Path(wanted.dir)
    rows = wanted.tokens + round(min(HELD_OUT_ROWS, wanted.tokens * share / (1 - share)))
    header = HEADER_BYTES / wanted.shard_tokens
    token = 10 if config.data.chat_template else 9  # id, document, mask, role
    widths = [model.width(hook) for hook in config.model.hooks]
    per_row = sum(row_bytes(width, wanted.dtype) + header for width in widths) + token
    with disk_errors("store.dir", folder):
        there = _bytes_below(folder)
        free = _free(folder)
    missing = max(0.0, rows * per_row - there)
    _check_disk(folder, missing, free, per_row)
    return Room(rows, rows * per_row, missing, free)


def _bytes_below(folder: Path) -> int:
    """Add up the shards that are there; another worker may just be writing one."""
    size = 0
    for path in durable.files_below(folder):
        if path.suffix == ".safetensors":
            with suppress(FileNotFoundError):
                size += path.stat().st_size
    return size


def _check_disk(folder: Path, missing: float, free: int, per_row: float) -> None:
    fitting = int(0.9 * free / per_row)
    fewer = f"store.tokens={fitting}, store.dtype=int8, or " if fitting else ""
    if missing > free:
        raise UserError(
            f"store.dir={folder} needs {missing / 1e9:.3g} GB more and its disk has {free / 1e9:.3g} GB free; try "
            f"{fewer}a store.dir on another disk"
        )
    with disk_errors("store.dir", folder):
        if not can_reserve(_existing(folder), round(missing)):
            raise UserError(
                f"store.dir={folder} needs {missing / 1e9:.3g} GB more, which its disk does not give you although "
                f"{free / 1e9:.3g} GB are free (a quota?); try fewer store.tokens, store.dtype=int8, or a store.dir on "
                "another disk"
            )


def can_reserve(folder: Path, size: int) -> bool:
    """Ask a file system for room and give it back at once: only so does it tell of a quota, whatever kind it has.

    True where it cannot be asked: without fallocate (macOS, Windows, some network file systems), and in memory.
    """
    if not sys.platform.startswith("linux") or not size or _kind(folder) in _IN_MEMORY:
        return True
    path = durable.temporary(folder / "room")
    try:
        with path.open("xb") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.fallocate(file.fileno(), _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size)) == 0:
                return True
            return ctypes.get_errno() not in durable.FULL
    finally:
        path.unlink(missing_ok=True)


def _kind(folder: Path) -> str:
    """Return the type of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    resolved = folder.resolve()
    above = [(place, kind) for place, kind in mounts if resolved.is_relative_to(place.replace("\\040", " "))]
    return max(reversed(above), key=lambda mount: len(mount[0]), default=("", ""))[1]  # of one place the last counts


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _check_memory(config: RunConfig, width: int, rows: int) -> float:
    """Return what a worker shuffles in: one group is written while the next is captured."""
    store = config.store
    buffered = config.model.dtype if store.dtype == "int8" else store.dtype  # as `groups.GroupWriter` keeps rows
    memory = 2 * min(store.shuffle_tokens, rows) * width * STORE_DTYPES[buffered]
    if memory * config.cache.workers > memory_bytes():
        raise UserError(
            f"store.shuffle_tokens={store.shuffle_tokens} needs {memory * config.cache.workers / 1e9:.3g} GB of memory "
            f"for cache.workers={config.cache.workers} and the machine has {memory_bytes() / 1e9:.3g} GB; halve it "
            "(and store.shard_tokens), run fewer workers here, or cache fewer model.hooks at a time"
        )
    return memory


def memory_bytes() -> float:
    """Return the machine's memory; without limit where it cannot be asked (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def tokens_per_s(config: RunConfig, model: LanguageModel) -> float:
    """Time the model on random tokens: whole batches, or as many contexts as take a second."""
    hooks, seq = config.model.hooks, config.data.context_size

    def seconds(contexts: int) -> float:
        ids = torch.randint(model.vocab_size, (contexts, seq), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        for found in model.capture(ids, hooks).values():
            found.cpu()  # waits for the device
        return time.perf_counter() - start

    seconds(1)  # what is set up at the first call does not count
    contexts = 1
    while (last := seconds(contexts)) < _TIMING_S and contexts < config.store.batch_prompts:
        contexts = min(4 * contexts, config.store.batch_prompts)
    times = [last]
    while sum(times) < _TIMING_S and len(times) < 10:
        times.append(seconds(contexts))
    return contexts * seq / min(times)


def duration(seconds: float) -> str:
    """Word a time in its fitting unit."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1.5 else f"{seconds:.0f} s"
