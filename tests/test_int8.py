"""What 8 bits keep of rows, whatever the rows are like."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_store import build

from saepipe import int8
from saepipe.errors import UserError
from saepipe.int8 import Scales
from saepipe.record import Record
from saepipe.shard import ShardReader
from saepipe.shard_writer import write_shard
from saepipe.store import Store

N, WIDTH, BLOCK_ROWS = 600, 64, 128
PLAN = "ab" * 32


def gaussian(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, WIDTH))


def outlier_channel() -> np.ndarray:
    rows = gaussian()
    rows[:, 5] *= 50
    return rows


def large_means() -> np.ndarray:
    return gaussian() + 1000 * np.random.default_rng(1).standard_normal(WIDTH)


def sinks() -> np.ndarray:
    """Three rows a thousand times longer, in few channels, as attention sinks are."""
    rows = gaussian()
    for row in (3, 77, 300):
        rows[row, [9, 40]] = 1000 * np.sqrt(WIDTH) * np.array([0.9, -0.4])
    return rows


def constant_channels() -> np.ndarray:
    rows = gaussian()
    rows[:, 7], rows[:, 8] = 3.5, 0
    return rows


KINDS = {
    "gaussian": gaussian,
    "outlier channel": outlier_channel,
    "large means": large_means,
    "sinks": sinks,
    "constant channels": constant_channels,
    "zeros": lambda: np.zeros((N, WIDTH)),
    "one constant": lambda: np.full((N, WIDTH), -2.5),
    "tiny": lambda: gaussian() * 1e-20,
    "huge": lambda: gaussian() * 1e20,
    "one row": lambda: gaussian()[:1],
    "no scale at all": lambda: gaussian() * np.logspace(-6, 6, WIDTH),
}


def write(folder: Path, rows: np.ndarray, ordinary: np.ndarray | None = None) -> Record:
    counted = np.ones(len(rows), bool) if ordinary is None else ordinary
    values = torch.from_numpy(rows.astype(np.float32))
    return write_shard(folder, "hook/000000", values, counted, plan=PLAN, block_rows=BLOCK_ROWS, dtype="int8")


def reader(folder: Path, record: Record) -> ShardReader:
    return ShardReader(folder, record, width=record.sum.shape[0], dtype="int8", block_rows=BLOCK_ROWS)


def read(folder: Path, record: Record) -> tuple[np.ndarray, np.ndarray, Scales]:
    """Return the rows, each row's step in units of the channel's scale, and the scales."""
    shard = reader(folder, record)
    scales = shard.scales
    assert scales is not None
    parts, steps = [], []
    for block in range(len(record.blocks)):
        values, row_scale = torch.empty(BLOCK_ROWS, WIDTH, dtype=torch.int8), torch.empty(BLOCK_ROWS)
        n = shard.read_into(block, values, row_scale)
        parts.append(int8.decode(values[:n], row_scale[:n], scales))
        steps.append(row_scale[:n])
    return torch.cat(parts).numpy(), torch.cat(steps).numpy(), scales


def nmse(found: np.ndarray, rows: np.ndarray, mean: np.ndarray | float = 0) -> float:
    return float(((found - rows) ** 2).sum() / ((rows - mean) ** 2).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_at_most_half_a_step(tmp_path: Path, kind: str) -> None:
    rows = KINDS[kind]().astype(np.float32)
    found, row_scale, scales = read(tmp_path, write(tmp_path, rows))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    step = row_scale[:, None].astype(np.float64) * scales.scale.numpy()
    rounding = 1e-6 * (np.abs(rows) + np.abs(scales.centre.numpy()))  # of float32
    assert (np.abs(found.astype(np.float64) - rows) <= step / 2 + rounding).all()


@pytest.mark.parametrize(
    ("kind", "most"),
    [("gaussian", 1e-4), ("outlier channel", 1e-4), ("large means", 1e-4), ("constant channels", 1e-4), ("tiny", 1e-4)],
)
def test_little_of_the_variance_is_lost(tmp_path: Path, kind: str, most: float) -> None:
    rows = KINDS[kind]()
    found, _, _ = read(tmp_path, write(tmp_path, rows))
    assert nmse(found, rows, rows.mean(0)) < most
    for channel in np.flatnonzero(rows.std(0)):  # nor of any channel's own
        part = slice(None), slice(channel, channel + 1)
        assert nmse(found[part], rows[part], rows[part].mean()) < 3 * most


def test_sinks_cost_the_other_rows_nothing_and_themselves_little(tmp_path: Path) -> None:
    rows = sinks()
    long = np.linalg.norm(rows, axis=1) > 100
    assert long.sum() == 3
    found, _, _ = read(tmp_path / "with", write(tmp_path / "with", rows))
    assert nmse(found[~long], rows[~long]) < 1e-4
    for row in np.flatnonzero(long):
        assert nmse(found[row], rows[row]) < 1e-4


def test_a_constant_channel_stays_constant(tmp_path: Path) -> None:
    rows = constant_channels()
    found, _, _ = read(tmp_path, write(tmp_path, rows))
    np.testing.assert_array_equal(found[:, 7:9], np.broadcast_to([3.5, 0], (N, 2)))
    (tmp_path / "zeros").mkdir()
    found, row_scale, _ = read(tmp_path / "zeros", write(tmp_path / "zeros", KINDS["zeros"]()))
    assert not found.any()
    assert not row_scale.any()


def test_a_zero_row_among_others_is_nearly_zero(tmp_path: Path) -> None:
    rows = large_means()
    rows[10] = 0
    found, _, _ = read(tmp_path, write(tmp_path, rows))
    assert nmse(found[10] + 1, rows[10] + 1) < 100  # its distance from the mean is thousand times the others'
    assert np.linalg.norm(found[10]) < 0.01 * np.linalg.norm(rows[11])


def test_a_shard_without_a_row_to_count(tmp_path: Path) -> None:
    rows = gaussian() * 7
    found, _, scales = read(tmp_path, write(tmp_path, rows, np.zeros(N, bool)))
    assert not scales.centre.any()
    assert (scales.scale == 1).all()
    assert nmse(found, rows) < 1e-4


def test_bytes_are_the_same_whatever_the_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    rows = np.tile(sinks(), (10, 8))  # more than one chunk
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            write(tmp_path / str(threads), rows)
    finally:
        torch.set_num_threads(before)
    for name in ("000000.safetensors", "000000.json"):
        assert (tmp_path / "1" / "hook" / name).read_bytes() == (tmp_path / "2" / "hook" / name).read_bytes()


def test_the_safetensors_library_opens_it_and_the_formula_gives_the_rows(tmp_path: Path) -> None:
    rows = outlier_channel()
    found, _, _ = read(tmp_path, write(tmp_path, rows))
    file = load_file(tmp_path / "hook" / "000000.safetensors")
    assert {name: tensor.dtype for name, tensor in file.items()} == {
        "activations": torch.int8,
        **dict.fromkeys(("norm", "row_scale", "centre", "scale"), torch.float32),
    }
    centre, scale, row_scale, q = (file[name].double() for name in ("centre", "scale", "row_scale", "activations"))
    assert q.abs().max() == 127
    np.testing.assert_allclose(centre + scale * row_scale[:, None] * q, found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(file["norm"].double(), torch.from_numpy(rows).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["activations", "row_scale", "centre", "scale", "norm"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    record = write(tmp_path, gaussian())
    path = tmp_path / "hook" / "000000.safetensors"
    content = bytearray(path.read_bytes())
    sizes = {"activations": N * WIDTH, "norm": 4 * N, "row_scale": 4 * N, "centre": 4 * WIDTH, "scale": 4 * WIDTH}
    at = 4096
    for part, size in sizes.items():
        if part == name:
            break
        at += size
    content[at + 13] ^= 1  # in row 0, or 3
    path.write_bytes(content)
    what = "block 0" if name in ("activations", "row_scale") else name
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged: {what} does not match its hash; write it ag")):
        reader(tmp_path, record).norm() if name == "norm" else read(tmp_path, record)


def test_a_store_of_int8_gives_float32_rows_near_the_truth(tmp_path: Path) -> None:
    exact, rounded = build(tmp_path / "exact", dtype="float32"), build(tmp_path / "rounded", dtype="int8")
    store = Store.open(rounded.folder)
    for hook in store.hooks:
        for held_out, shards in ((False, store.plan.n_shards), (True, store.plan.n_held_out_shards)):
            for shard in range(shards):
                for block in range(store.plan.n_blocks(hook, shard, held_out=held_out)):
                    rows = store.read_block(hook, shard, block, held_out=held_out)
                    truth = exact.read_block(hook, shard, block, held_out=held_out)
                    assert rows.dtype == torch.float32
                    assert nmse(rows.numpy(), truth.numpy()) < 1e-2  # a few rows of six channels
        assert torch.equal(store.statistics(hook).mean, exact.statistics(hook).mean)
