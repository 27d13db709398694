import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from saepipe.errors import UserError
from saepipe.record import Record
from saepipe.shard import ShardReader, verify
from saepipe.shard_writer import write_shard

PLAN, BLOCK_ROWS = "ab" * 32, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(n: int = 50, width: int = 5, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(root: Path, activations: torch.Tensor, place: str = "hook/000000", **changes: object) -> Record:
    ordinary = np.arange(len(activations)) % 8 != 0
    dtype = str(activations.dtype).removeprefix("torch.")
    options = {"ordinary": ordinary, "plan": PLAN, "block_rows": BLOCK_ROWS, "dtype": dtype} | changes
    return write_shard(root, place, activations, **options)  # type: ignore[arg-type]


def open_reader(root: Path, record: Record, width: int = 5, dtype: str = "bfloat16") -> ShardReader:
    return ShardReader(root, record, width=width, dtype=dtype, block_rows=BLOCK_ROWS)


def read(root: Path, record: Record, like: torch.Tensor) -> torch.Tensor:
    reader = open_reader(root, record, like.shape[1], str(like.dtype).removeprefix("torch."))
    blocks = []
    for block in range(len(record.blocks)):
        buffer = torch.empty(BLOCK_ROWS, like.shape[1], dtype=like.dtype)
        blocks.append(buffer[: reader.read_into(block, buffer)])
    return torch.cat(blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 50])
def test_gives_back_the_same_bytes(tmp_path: Path, dtype: torch.dtype, n: int) -> None:
    activations = rows(n, dtype=dtype)
    record = write(tmp_path, activations)
    assert torch.equal(read(tmp_path, record, activations), activations)
    again = Record.load(tmp_path, "hook/000000", PLAN)
    assert again.digest == record.digest
    np.testing.assert_array_equal(again.sum, record.sum)
    assert len(again.blocks) == -(-n // BLOCK_ROWS)
    verify(tmp_path, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_opens_it(tmp_path: Path, dtype: torch.dtype) -> None:
    activations = rows(7, 3, dtype)  # 42 bytes of bfloat16: norm is not aligned
    record = write(tmp_path, activations)
    path = tmp_path / "hook" / "000000.safetensors"
    loaded = load_file(path)
    assert torch.equal(loaded["activations"], activations)
    torch.testing.assert_close(loaded["norm"], activations.double().norm(dim=1).float())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "plan": PLAN, "place": "hook/000000"}
    content = path.read_bytes()
    assert content[4096 : 4096 + 3 * activations.itemsize] == activations[0].view(torch.uint8).numpy().tobytes()
    assert len(content) == record.bytes


def test_two_writes_are_byte_identical_whatever_the_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            write(tmp_path / str(threads), rows(5000, 24))
    finally:
        torch.set_num_threads(before)
    for name in ("000000.safetensors", "000000.json"):
        assert (tmp_path / "1" / "hook" / name).read_bytes() == (tmp_path / "2" / "hook" / name).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_of_the_ordinary_rows_that_are_not_massive(tmp_path: Path, dtype: torch.dtype) -> None:
    activations = rows(4000, 300, dtype=dtype)  # more rows than one chunk
    activations[3] *= 11
    activations[5] *= 9
    activations[8] *= 5000  # position 0 in `write`
    record = write(tmp_path, activations)
    counted = np.arange(4000) % 8 != 0
    counted[3] = False
    expected = activations.double().numpy()[counted]
    assert record.counted == counted.sum() == 3499
    np.testing.assert_allclose(record.sum, expected.sum(0), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(record.sum_squares, (expected**2).sum(0), rtol=1e-12)
    assert record.sum_norm == pytest.approx(np.linalg.norm(expected, axis=1).sum(), rel=1e-6)


def test_a_shard_of_special_tokens_only_has_empty_sums(tmp_path: Path) -> None:
    record = write(tmp_path, rows(20), ordinary=np.zeros(20, bool))
    assert (record.counted, record.sum_norm) == (0, 0.0)
    assert not record.sum.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_rows_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    activations = rows(dtype=dtype)
    activations[7, 2] = value
    activations[49] = value
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"model.hooks: 2 of 50 rows of hook/000000 are not finite in {name}; set"):
        write(tmp_path, activations)
    assert not list(tmp_path.rglob("*.*"))


def test_refuses_float16_that_overflowed(tmp_path: Path) -> None:
    large = (rows(dtype=torch.float32) + 70_000).to(torch.float16)
    with pytest.raises(UserError, match=r"50 of 50 rows .* float16; .* store.dtype=bfloat16"):
        write(tmp_path, large)


def test_keeps_values_whose_squares_overflow_float32(tmp_path: Path) -> None:
    activations = rows(dtype=torch.float32) * 1e25
    record = write(tmp_path, activations)
    assert torch.equal(read(tmp_path, record, activations), activations)
    assert np.isfinite(record.sum_norm)


def test_an_exception_within_the_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "a broken disk")

    write(tmp_path, rows(seed=1))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="a broken disk"):
        write(tmp_path, rows())
    # The old record is gone, so the old shard counts for nothing
    assert [path.name for path in (tmp_path / "hook").iterdir()] == ["000000.safetensors"]


@pytest.mark.parametrize("preadv", [True, False])
def test_threads_read_one_shard_at_once(tmp_path: Path, preadv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not preadv:
        monkeypatch.delattr(os, "preadv")
    activations = rows(1000, 64)
    record = write(tmp_path, activations)
    reader = open_reader(tmp_path, record, 64)

    def read_one(block: int) -> bool:
        buffer = torch.empty(BLOCK_ROWS, 64, dtype=torch.bfloat16)
        n = reader.read_into(block, buffer)
        return torch.equal(buffer[:n], activations[block * BLOCK_ROWS :][:BLOCK_ROWS])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_one, [block % 63 for block in range(630)]))


# ---- faults

FAULTS = {
    "flip": "is damaged: block 1 does not match its hash",
    "zeros": "is damaged: its header is not the one that was written",
    "header flip": "is damaged: its header is not the one that was written",
    "swap": "is damaged: its header is not the one that was written",
    "cut": f"has {4096 + 50 * 14 - 1} bytes instead of {4096 + 50 * 14}",
    "longer": f"has {4096 + 50 * 14 + 1} bytes instead of {4096 + 50 * 14}",
    "deleted": "cannot be read (No such file or directory)",
    "swap both": "has a record that belongs to another shard or store",
    "other plan": "has a record that belongs to another shard or store",
    "no record": "has no record",
    "record flip": "000000.json is damaged (its content does not match its own hash)",
    "record cut": "000000.json is damaged (its content does not match its own hash)",
    "record zeros": "000000.json is damaged (its content does not match its own hash)",
}


def inflict(fault: str, folder: Path) -> None:
    """Do harm to shard 000000."""
    shard, record = folder / "000000.safetensors", folder / "000000.json"
    path = record if fault.startswith("record") else shard
    content = path.read_bytes()
    if fault.endswith("flip"):
        at = 4000 if fault == "header flip" else 4096 + 16 * 10 if path is shard else content.index(b'"rows": 50') + 8
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif fault.endswith("zeros"):
        path.write_bytes(b"\0" * len(content))
    elif fault.endswith("cut"):
        path.write_bytes(content[:-1] if path is shard else content[: len(content) // 2])
    elif fault == "longer":
        path.write_bytes(content + b"\0")
    elif fault in ("swap", "swap both"):
        for suffix in ("safetensors", "json")[: 1 + fault.endswith("both")]:
            (folder / f"000000.{suffix}").rename(folder / "kept")
            (folder / f"000001.{suffix}").rename(folder / f"000000.{suffix}")
            (folder / "kept").rename(folder / f"000001.{suffix}")
    elif fault == "other plan":
        write(folder.parent, rows(), plan="cd" * 32)
    elif fault == "deleted":
        shard.unlink()
    elif fault == "no record":
        record.unlink()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_names_the_shard_the_fault_and_the_cure(tmp_path: Path, fault: str) -> None:
    for shard in (0, 1):
        write(tmp_path, rows(seed=shard), f"hook/{shard:06d}")
    inflict(fault, tmp_path / "hook")
    with pytest.raises(UserError, match=re.escape(FAULTS[fault])) as error:
        read(tmp_path, Record.load(tmp_path, "hook/000000", PLAN), rows())
    assert str(tmp_path / "hook" / "000000.") in str(error.value)
    assert str(error.value).endswith(f"; write it again with `python -m saepipe.shards repair {tmp_path}`")


def test_verify_notices_a_change_in_every_part_of_the_file(tmp_path: Path) -> None:
    record = write(tmp_path, rows())
    path = tmp_path / "hook" / "000000.safetensors"
    content = path.read_bytes()
    for at in (3, 100, 4000, 4096, len(content) - 1):  # size, header, padding, activations, norm
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(UserError, match="does not match the hash in its record"):
            verify(tmp_path, record)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    record = write(tmp_path, rows())
    reader = open_reader(tmp_path, record)
    os.truncate(tmp_path / "hook" / "000000.safetensors", 4096 + 200)
    buffer = torch.empty(BLOCK_ROWS, 5, dtype=torch.bfloat16)
    assert reader.read_into(0, buffer) == BLOCK_ROWS
    with pytest.raises(UserError, match="ends within block 1"):
        reader.read_into(1, buffer)


def test_a_reader_closes_its_file(tmp_path: Path) -> None:
    record = write(tmp_path, rows())
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc to count open files")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        open_reader(tmp_path, record)
    assert len(list(descriptors.iterdir())) == before
    shutil.rmtree(tmp_path / "hook")
