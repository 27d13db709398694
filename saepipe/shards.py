"""One shard: a safetensors file that is hashed block by block, and the record that commits it.

- `<place>.safetensors`: header of 4096 bytes, `activations` [rows, d], `norm` [rows] float32
- `<place>.json`: size, hash of the file and of each block, sums over the ordinary rows, its own hash

The record is written after the shard, so a shard without a record that fits does not exist for a writer, and is an
error for a reader. Blocks are read with preadv, not mapped: a mapped file that shrinks kills the process.
"""

import base64
import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from saepipe.durable import disk_errors, read_sealed, replacing, seal, write_sealed, xxh3
from saepipe.errors import UserError
from saepipe.plan import HEADER_BYTES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# A row this many times longer than the median is a massive activation: it would own the mean and the norm scale.
_MASSIVE = 10


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard."""

    plan: str
    """Identity of the plan."""
    place: str
    """Path of the shard in the store, without its ending: a shard in the place of another is noticed."""
    rows: int
    """Rows in the shard."""
    bytes: int
    """Size of the file."""
    xxh3: str
    """Hash of the file."""
    blocks: list[str]
    """Hash of each block of rows of `activations`."""
    counted: int
    """Rows in the sums: the ordinary ones up to ten times the shard's median norm."""
    sum_norm: float
    """Sum of their norms."""
    sum: Float64[np.ndarray, " d_in"]
    """Sum of the counted rows."""
    sum_squares: Float64[np.ndarray, " d_in"]
    """Sum of their squares."""

    @classmethod
    def load(cls, root: Path, place: str, plan: str) -> "Record":
        """Read the record of a place.

        Raises:
            UserError: It is missing, damaged, or belongs to another place or plan.
        """
        path = root / f"{place}.json"
        try:
            document = read_sealed(path, cure=_cure(root, place))
        except (FileNotFoundError, NotADirectoryError):
            raise damaged(root, place, "has no record") from None
        if document.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise damaged(root, place, "has a record of another format")
        if document["plan"] != plan or document["place"] != place:
            raise damaged(root, place, "has a record that belongs to another shard or store")
        document["sum"] = np.frombuffer(base64.b64decode(document["sum"]), "<f8")
        document["sum_squares"] = np.frombuffer(base64.b64decode(document["sum_squares"]), "<f8")
        return cls(**document)

    def save(self, root: Path) -> None:
        """Write the record beside its shard."""
        write_sealed(root / f"{self.place}.json", self._document())

    @cached_property
    def digest(self) -> str:
        """The record's own hash."""
        return seal(self._document())

    def _document(self) -> dict[str, Any]:
        document = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # As decimals, two vectors of d numbers would be most of the record and of the time to read it
        for key in ("sum", "sum_squares"):
            document[key] = base64.b64encode(document[key].astype("<f8").tobytes()).decode()
        return document


def damaged(root: Path, place: str, what: str) -> UserError:
    """Build the error for a shard that cannot be used."""
    return UserError(f"{root / place}.safetensors {what}; {_cure(root, place)}")


def _cure(root: Path, place: str) -> str:
    name = Path(place).name
    return f"delete {name}.safetensors and {name}.json there, then run the same `python -m saepipe.cache` command again"


# ---- writing


def write_shard(
    root: Path,
    place: str,
    activations: Float[Tensor, "token d_in"],
    ordinary: Bool[np.ndarray, " token"],
    *,
    plan: str,
    block_rows: int,
    model_dtype: str | None = None,
) -> Record:
    """Write a shard, and then its record, without which the shard does not count.

    Args:
        root: Folder of the store.
        place: Path of the shard in it, without its ending.
        activations: The rows, on the CPU, in the type to store.
        ordinary: Which rows are neither special tokens nor at position 0.
        plan: Identity of the plan.
        block_rows: Rows per block.
        model_dtype: Type that the language model computed the rows in, which an error then need not blame.

    Raises:
        UserError: Rows that are not finite, or no space on the disk.
    """
    norm = _norms(activations)
    bad = int((~np.isfinite(norm)).sum())
    if bad:
        dtype = str(activations.dtype).removeprefix("torch.")
        cure = (
            "the model's own weights or activations are not finite: give another model.name or another hook"
            if dtype == model_dtype == "float32"
            else "set model.dtype=float32 (or bfloat16) and store.dtype=bfloat16 (or float32), with another store.dir"
        )
        raise UserError(f"model.hooks: {bad} of {len(norm)} rows of {place} are not finite in {dtype}; {cure}")
    data = _raw(activations)
    block_bytes = block_rows * activations.shape[1] * activations.itemsize
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    whole = xxhash.xxh3_64()
    with disk_errors("store.dir", root):
        # An old record must never stand beside a new shard
        (root / f"{place}.json").unlink(missing_ok=True)
        with replacing(root / f"{place}.safetensors") as file:
            for part in (_header(activations, plan, place), data, norm.data):
                whole.update(part)
                file.write(part)
        record = Record(
            plan=plan,
            place=place,
            rows=len(norm),
            bytes=HEADER_BYTES + data.nbytes + norm.nbytes,
            xxh3=whole.hexdigest(),
            blocks=[xxhash.xxh3_64_hexdigest(block) for block in blocks],
            **_sums(activations, norm, ordinary),
        )
        record.save(root)
    return record


def _header(activations: Float[Tensor, "token d_in"], plan: str, place: str) -> bytes:
    """Build the safetensors header, padded with spaces as the format allows so that the data starts at one page."""
    rows, width = activations.shape
    split = rows * width * activations.itemsize
    text = json.dumps(
        {
            "__metadata__": {"format": "pt", "plan": plan, "place": place},
            "activations": {"dtype": _CODES[activations.dtype], "shape": [rows, width], "data_offsets": [0, split]},
            "norm": {"dtype": "F32", "shape": [rows], "data_offsets": [split, split + 4 * rows]},
        }
    ).encode()
    room = HEADER_BYTES - 8
    assert len(text) <= room
    return room.to_bytes(8, "little") + text.ljust(room)


def _norms(activations: Float[Tensor, "token d_in"]) -> Float32[np.ndarray, " token"]:
    """Return the length of each row; not finite where the row is not, or where it is too long for float32."""
    norm = np.empty(len(activations), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start, rows in _chunks(activations):
            norm[start : start + len(rows)] = np.sqrt(np.einsum("td,td->t", rows, rows))
    return norm


def _sums(
    activations: Float[Tensor, "token d_in"], norm: Float32[np.ndarray, " token"], ordinary: Bool[np.ndarray, " token"]
) -> dict[str, Any]:
    """Sum the ordinary rows and their squares in float64."""
    counted = ordinary.copy()
    if counted.any():
        counted &= norm <= _MASSIVE * np.median(norm[counted])
    total, squares = np.zeros(activations.shape[1]), np.zeros(activations.shape[1])
    for start, rows in _chunks(activations):
        rows = rows[counted[start : start + len(rows)]]
        total += rows.sum(axis=0)
        squares += np.einsum("td,td->d", rows, rows)
    return {
        "counted": int(counted.sum()),
        "sum_norm": float(norm[counted].sum(dtype=np.float64)),
        "sum": total,
        "sum_squares": squares,
    }


def _chunks(activations: Float[Tensor, "token d_in"]) -> Iterator[tuple[int, Float64[np.ndarray, "chunk d_in"]]]:
    """Go through the rows in float64, as many at a time as stay in the cache (2 MiB), each with its first's number.

    All in NumPy: torch would spread such short work over threads, which took 20 times as long on a busy machine, and
    whose number would show in the last bits of a sum.
    """
    step = max(1, (1 << 18) // activations.shape[1])
    for start in range(0, len(activations), step):
        rows = activations[start : start + step]
        if rows.dtype == torch.bfloat16:  # the upper half of a float32
            bits = rows.view(torch.uint16).numpy().astype(np.uint32) << 16
            yield start, bits.view(np.float32).astype(np.float64)
        else:
            yield start, rows.numpy().astype(np.float64)


def _raw(rows: Float[Tensor, "token d_in"]) -> memoryview:
    """View rows as bytes; numpy has no bfloat16."""
    assert rows.is_contiguous()
    assert rows.device.type == "cpu"
    return rows.view(torch.uint8).numpy().reshape(-1).data


# ---- reading


class ShardReader:
    """One shard, open for reading, from any number of threads at once."""

    def __init__(self, root: Path, record: Record, *, block_rows: int) -> None:
        """Open the file.

        Raises:
            UserError: The file is missing, or its size is not the record's.
        """
        self._root, self._record, self._block_rows = root, record, block_rows
        self._lock = threading.Lock()
        self._descriptor = -1
        check_size(root, record.place, record.bytes)
        try:
            self._descriptor = os.open(root / f"{record.place}.safetensors", os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise damaged(root, record.place, f"cannot be read ({error.strerror})") from None

    def __del__(self) -> None:
        """Close the file; a thread that still reads from it keeps the reader alive."""
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, block: int, out: Float[Tensor, "token d_in"]) -> int:
        """Read a block into the first rows of `out` and check its hash.

        Args:
            block: Number of the block in the shard.
            out: Contiguous CPU tensor (pinned or not) of the shard's type and width, with room for a whole block.

        Returns:
            How many rows the block has.

        Raises:
            UserError: The file cannot be read, ends early, or the block does not match its hash.
        """
        start = block * self._block_rows
        rows = min(self._block_rows, self._record.rows - start)
        view = _raw(out[:rows])
        try:
            complete = self._fill(view, HEADER_BYTES + start * out.shape[1] * out.itemsize)
        except OSError as error:
            raise damaged(self._root, self._record.place, f"cannot be read ({error.strerror})") from None
        if not complete:
            raise damaged(self._root, self._record.place, f"ends within block {block}")
        if xxhash.xxh3_64_hexdigest(view) != self._record.blocks[block]:
            raise damaged(self._root, self._record.place, f"is damaged: block {block} does not match its hash")
        return rows

    def _fill(self, view: memoryview, offset: int) -> bool:
        """Read until `view` is full; False where the file ends first."""
        while view:
            if hasattr(os, "preadv"):
                count = os.preadv(self._descriptor, [view], offset)
            else:  # Windows: a place and a read cannot be one call
                with self._lock:
                    os.lseek(self._descriptor, offset, os.SEEK_SET)
                    chunk = os.read(self._descriptor, len(view))
                count = len(chunk)
                view[:count] = chunk
            if not count:
                return False
            view, offset = view[count:], offset + count
        return True


def check_size(root: Path, place: str, expected: int) -> None:
    """Check that a shard file is there in its full size.

    Raises:
        UserError: Names the shard, what is wrong, and the cure.
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
        UserError: Names the shard, what is wrong, and the cure.
    """
    check_size(root, record.place, record.bytes)
    try:
        digest = xxh3(root / f"{record.place}.safetensors")
    except OSError as error:
        raise damaged(root, record.place, f"cannot be read ({error.strerror})") from None
    if digest != record.xxh3:
        raise damaged(root, record.place, "does not match the hash in its record")
