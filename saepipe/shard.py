"""One shard: a safetensors file whose blocks of rows are hashed one by one, and read so.

`<place>.safetensors`: header of 4096 bytes, `activations` [rows, d], `norm` [rows] float32; as int8 (`saepipe.int8`)
also `row_scale` [rows], `centre` [d] and `scale` [d], float32. Its record (`saepipe.record`) commits it. Blocks are
read with preadv, not mapped: a mapped file that shrinks kills the process.
"""

import itertools
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import xxhash
from jaxtyping import Float32, Shaped
from torch import Tensor

from saepipe.config import STORE_DTYPES
from saepipe.durable import xxh3
from saepipe.errors import DamageError
from saepipe.int8 import Scales
from saepipe.layout import HEADER_BYTES
from saepipe.record import Record, damaged

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORE_DTYPES}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}


def tensor_shapes(rows: int, width: int, dtype: str) -> dict[str, tuple[str, list[int]]]:
    """List a shard's tensors in the order of the file, each with its type and shape."""
    shapes = {"activations": (dtype, [rows, width]), "norm": ("float32", [rows])}
    if dtype == "int8":
        shapes |= {"row_scale": ("float32", [rows]), "centre": ("float32", [width]), "scale": ("float32", [width])}
    return shapes


def offsets(rows: int, width: int, dtype: str) -> dict[str, int]:
    """Return where each tensor begins after the header, and under `end` where the last one ends."""
    found, at = {}, 0
    for name, (kind, shape) in tensor_shapes(rows, width, dtype).items():
        found[name] = at
        at += math.prod(shape) * STORE_DTYPES[kind]
    return {**found, "end": at}


def header(rows: int, width: int, dtype: str, plan: str, place: str) -> bytes:
    """Build the safetensors header, padded with spaces as the format allows so that the data starts at one page."""
    bounds = [*offsets(rows, width, dtype).values()]
    described = {
        name: {"dtype": _CODES[kind], "shape": shape, "data_offsets": [*span]}
        for (name, (kind, shape)), span in zip(
            tensor_shapes(rows, width, dtype).items(), itertools.pairwise(bounds), strict=True
        )
    }
    text = json.dumps({"__metadata__": {"format": "pt", "plan": plan, "place": place}, **described}).encode()
    room = HEADER_BYTES - 8
    assert len(text) <= room
    return room.to_bytes(8, "little") + text.ljust(room)


def raw(rows: Shaped[Tensor, "..."]) -> memoryview:
    """View a tensor as bytes; numpy has no bfloat16."""
    assert rows.is_contiguous()
    assert rows.device.type == "cpu"
    return rows.view(torch.uint8).numpy().reshape(-1).data


class ShardReader:
    """One shard, open for reading, from any number of threads at once."""

    def __init__(self, root: Path, record: Record, *, width: int, dtype: str, block_rows: int) -> None:
        """Open the file and check its header, and as int8 what all blocks share.

        Raises:
            DamageError: The file is missing, its size is not the record's, or its header is damaged.
        """
        self._root, self._record, self._width, self._block_rows = root, record, width, block_rows
        self._lock = threading.Lock()
        self._descriptor = -1
        check_size(root, record.place, record.bytes)
        with self._reading():
            self._descriptor = os.open(root / f"{record.place}.safetensors", os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._offsets = {name: HEADER_BYTES + at for name, at in offsets(record.rows, width, dtype).items()}
        if self._bytes(0, HEADER_BYTES, "its header") != header(record.rows, width, dtype, record.plan, record.place):
            raise self._damaged("is damaged: its header is not the one that was written")
        self.scales: Scales | None = None
        """What an int8 shard's rows are decoded with."""
        if dtype == "int8":
            self.scales = Scales(torch.from_numpy(self._vector("centre")), torch.from_numpy(self._vector("scale")))

    def __del__(self) -> None:
        """Close the file; a thread that still reads from it keeps the reader alive."""
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def norm(self) -> Float32[np.ndarray, " token"]:
        """Read the norm of every row, verified.

        Raises:
            DamageError: The file cannot be read or is damaged there.
        """
        return self._vector("norm")

    def announce(self, block: int) -> None:
        """Have the disk begin to read a block, where the system can be told so, while others are read and hashed."""
        if hasattr(os, "posix_fadvise"):
            size = self._block_rows * (self._offsets["norm"] - self._offsets["activations"]) // self._record.rows
            start = self._offsets["activations"] + block * size
            with suppress(OSError):  # a hint, which a file system may refuse
                os.posix_fadvise(self._descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def read_into(
        self, block: int, out: Shaped[Tensor, "token d_in"], row_scale: Float32[Tensor, " token"] | None = None
    ) -> int:
        """Read a block into the first rows of `out` and check its hash.

        Args:
            block: Number of the block in the shard.
            out: Contiguous CPU tensor (pinned or not) of the shard's type and width, with room for a whole block.
            row_scale: As int8, room for the scale of each of these rows.

        Returns:
            How many rows the block has.

        Raises:
            DamageError: The file cannot be read, ends early, or the block does not match its hash.
        """
        start = block * self._block_rows
        rows = min(self._block_rows, self._record.rows - start)
        state = xxhash.xxh3_64()
        for name, tensor in (("activations", out), ("row_scale", row_scale)):
            if tensor is not None:
                view = raw(tensor[:rows])
                self._fill(view, self._offsets[name] + start * (view.nbytes // rows), f"block {block}")
                state.update(view)
        if state.hexdigest() != self._record.blocks[block]:
            raise self._damaged(f"is damaged: block {block} does not match its hash")
        return rows

    def _vector(self, name: str) -> Float32[np.ndarray, " number"]:
        """Read a whole float32 tensor and check its hash."""
        bounds = [*self._offsets.values()]
        start = self._offsets[name]
        content = self._bytes(start, bounds[bounds.index(start) + 1] - start, name)
        if xxhash.xxh3_64_hexdigest(content) != self._record.tensors.get(name):
            raise self._damaged(f"is damaged: {name} does not match its hash")
        return np.frombuffer(bytearray(content), "<f4")

    def _bytes(self, offset: int, size: int, what: str) -> bytes:
        content = bytearray(size)
        self._fill(memoryview(content), offset, what)
        return bytes(content)

    def _fill(self, view: memoryview, offset: int, what: str) -> None:
        """Read until `view` is full."""
        with self._reading():
            while view:
                count = self._read(view, offset)
                if not count:
                    raise self._damaged(f"ends within {what}")
                view, offset = view[count:], offset + count

    def _read(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        with self._lock:  # Windows: a place and a read cannot be one call
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            chunk = os.read(self._descriptor, len(view))
        view[: len(chunk)] = chunk
        return len(chunk)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._damaged(f"cannot be read ({error.strerror})") from None

    def _damaged(self, what: str) -> DamageError:
        return damaged(self._root, self._record.place, what)


def check_size(root: Path, place: str, expected: int) -> None:
    """Check that a shard file is there in its full size.

    Raises:
        DamageError: Names the shard, what is wrong, and the cure.
    """
    try:
        size = (root / f"{place}.safetensors").stat().st_size
    except OSError as error:
        raise damaged(root, place, f"cannot be read ({error.strerror})") from None
    if size != expected:
        raise damaged(root, place, f"has {size} bytes instead of {expected}")


def verify(root: Path, record: Record) -> None:
    """Read a whole shard file and compare its size and hash with the record.

    Raises:
        DamageError: Names the shard, what is wrong, and the cure.
    """
    check_size(root, record.place, record.bytes)
    try:
        digest = xxh3(root / f"{record.place}.safetensors")
    except OSError as error:
        raise damaged(root, record.place, f"cannot be read ({error.strerror})") from None
    if digest != record.xxh3:
        raise damaged(root, record.place, "does not match the hash in its record")
