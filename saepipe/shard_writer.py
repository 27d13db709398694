"""Writing a shard: its bytes, its hashes, and the sums that the store's statistics are made of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from saepipe.durable import disk_errors, replacing
from saepipe.errors import UserError
from saepipe.int8 import Scales
from saepipe.layout import HEADER_BYTES
from saepipe.record import Record
from saepipe.shard import header, raw, tensor_shapes

# A row this many times longer than the median is a massive activation: it would own the mean and the norm scale.
_MASSIVE = 10


def write_shard(
    root: Path,
    place: str,
    activations: Float[Tensor, "token d_in"],
    ordinary: Bool[np.ndarray, " token"],
    *,
    plan: str,
    block_rows: int,
    dtype: str,
    model_dtype: str | None = None,
) -> Record:
    """Write a shard, and then its record, without which the shard does not count.

    Another process may write the same shard at the same time: both write the same bytes, and neither is ever seen half.

    Args:
        root: Folder of the store.
        place: Path of the shard in it, without its ending.
        activations: The rows, on the CPU, in the type to store (for int8: in any floating-point type).
        ordinary: Which rows are neither special tokens nor at position 0.
        plan: Identity of the plan.
        block_rows: Rows per block.
        dtype: Type on disk.
        model_dtype: Type that the language model computed the rows in, which an error then need not blame.

    Raises:
        UserError: Rows that are not finite, or no space on the disk.
    """
    norm = _norms(activations)
    if bad := int((~np.isfinite(norm)).sum()):
        raise _not_finite(f"{bad} of {len(norm)} rows of {place}", activations.dtype, model_dtype)
    sums = _sums(activations, norm, ordinary)
    parts = _parts(activations, norm, sums, dtype)
    start = header(len(norm), activations.shape[1], dtype, plan, place)
    record = Record(
        plan=plan,
        place=place,
        rows=len(norm),
        bytes=HEADER_BYTES + sum(part.nbytes for part in parts.values()),
        **_hashes(start, parts, block_rows, len(norm)),
        **sums,
    )
    with disk_errors("store.dir", root):
        known = _known_digest(root, place, plan) == record.digest
        if not known:  # an old record must never stand beside a new shard
            (root / f"{place}.json").unlink(missing_ok=True)
        with replacing(root / f"{place}.safetensors") as file:
            file.write(start)
            for part in parts.values():
                file.write(part)
        if not known:
            record.save(root)
    return record


def _known_digest(root: Path, place: str, plan: str) -> str | None:
    try:
        return Record.load(root, place, plan).digest
    except UserError:
        return None


def _not_finite(which: str, dtype: torch.dtype, model_dtype: str | None) -> UserError:
    name = str(dtype).removeprefix("torch.")
    cure = (
        "the model's own weights or activations are not finite: give another model.name or another hook"
        if name == model_dtype == "float32"
        else "set model.dtype=float32 (or bfloat16) and store.dtype=bfloat16 (or float32), with another store.dir"
    )
    return UserError(f"model.hooks: {which} are not finite in {name}; {cure}")


def _parts(
    activations: Float[Tensor, "token d_in"], norm: Float32[np.ndarray, " token"], sums: dict[str, Any], dtype: str
) -> dict[str, memoryview]:
    """Return the bytes of each tensor, in the order of the file."""
    if dtype != "int8":
        return {"activations": raw(activations), "norm": norm.data}
    counted = max(sums["counted"], 1)
    scales = Scales.of(sums["sum"] / counted, sums["sum_squares"] / counted)
    values, row_scale = np.empty(activations.shape, np.int8), np.empty_like(norm)
    for start, rows in _chunks(activations):
        stop = start + len(rows)
        values[start:stop], row_scale[start:stop] = scales.encode(rows)
    arrays = (values.reshape(-1), norm, row_scale, scales.centre.numpy(), scales.scale.numpy())
    return dict(
        zip(tensor_shapes(len(norm), activations.shape[1], dtype), (array.data for array in arrays), strict=True)
    )


def _hashes(start: bytes, parts: dict[str, memoryview], block_rows: int, rows: int) -> dict[str, Any]:
    """Hash the file, each block (all that its rows are read from), and what the blocks do not cover, by tensor."""
    whole, blocks = xxhash.xxh3_64(start), []
    for part in parts.values():
        whole.update(part)
    in_blocks = [name for name in ("activations", "row_scale") if name in parts]
    for first in range(0, rows, block_rows):
        state = xxhash.xxh3_64()
        for name in in_blocks:
            row_bytes = parts[name].nbytes // rows
            state.update(parts[name].cast("B")[first * row_bytes : (first + block_rows) * row_bytes])
        blocks.append(state.hexdigest())
    others = {name: xxhash.xxh3_64_hexdigest(part) for name, part in parts.items() if name not in in_blocks}
    return {"xxh3": whole.hexdigest(), "blocks": blocks, "tensors": others}


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
