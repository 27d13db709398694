"""The train verb on a GPU: the same bits after a kill, in a grid and in every rerun."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest
import small_runs
import small_store
import torch
from test_job import assert_same_run

from saepipe import checkpoints, entry
from saepipe.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STEPS = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "store"
    small_store.build(folder)
    return folder


def keys(store: Path, run: Path, case: str, *more: str) -> list[str]:
    name, own = small_runs.cases()[case]
    every = ["trainer.accelerator=gpu", "train.log_every_steps=20", "train.checkpoint_every_steps=20"]
    every += ["stream.lanes=4", *own, *more]
    return small_runs.keys(name, STEPS, *every, f"store.dir={store}", f"run.dir={run}")


def trained(store: Path, run: Path, case: str, *more: str) -> Path:
    train(entry.load_config("train", keys(store, run, case, *more)))
    return run


@pytest.mark.parametrize("case", small_runs.last_cases())
def test_a_rerun_and_a_resumed_run_end_in_the_same_bits(case: str, store: Path, tmp_path: Path) -> None:
    whole = trained(store, tmp_path / "whole", case)
    assert "NVIDIA" in json.loads((whole / "summary.json").read_text())["device"]
    assert_same_run(trained(store, tmp_path / "again", case), whole)
    with small_runs.interrupted(33):
        trained(store, tmp_path / "stopped", case)
    assert_same_run(trained(store, tmp_path / "stopped", case), whole)


@pytest.mark.parametrize("case", ["topk-auxk", "batchtopk-auxk"])
def test_a_killed_run_ends_in_the_same_bits(case: str, store: Path, tmp_path: Path) -> None:
    more = [f"train.tokens={2000 * small_runs.BATCH}"]
    whole = trained(store, tmp_path / "whole", case, *more)
    killed, folder = tmp_path / "killed", tmp_path / "killed" / "checkpoints"
    process = small_runs.launch(keys(store, killed, case, *more))
    deadline = time.monotonic() + 120
    while checkpoints.newest(folder) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert_same_run(trained(store, killed, case, *more), whole)


@pytest.mark.parametrize(
    ("case", "key", "values"), [("topk-auxk", "k", (2, 3)), ("gated-none", "l1_coefficient", (1, 2))]
)
def test_a_grid_is_its_points_alone(case: str, key: str, values: tuple[int, int], store: Path, tmp_path: Path) -> None:
    trained(store, tmp_path / "grid", case, f"grid.{key}=[{values[0]},{values[1]}]")
    for value in values:
        alone = trained(store, tmp_path / f"alone-{value}", case, f"sae.{key}={value}")
        assert_same_run(tmp_path / "grid" / f"sae.{key}={value}", alone)


def test_a_world_of_one_rank_over_nccl_ends_in_the_same_bits(store: Path, tmp_path: Path) -> None:
    ranks = keys(store, tmp_path / "ranks", "batchtopk-auxk", "trainer.strategy=ddp")
    small_runs.finish(ranks)
    assert_same_run(tmp_path / "ranks", trained(store, tmp_path / "alone", "batchtopk-auxk"))


@pytest.mark.parametrize("case", small_runs.last_cases())
def test_bfloat16_comes_near_float32(case: str, store: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        run = trained(store, tmp_path / precision, case, f"trainer.precision={precision}", "train.log_every_steps=1")
        assert {value.dtype for name, value in small_runs.tensors(run).items() if name.startswith("sae.W")} == {
            torch.float32
        }
        with (run / "metrics.csv").open(newline="") as file:
            losses[precision] = [float(row["losses/mse_loss"]) for row in csv.DictReader(file)]
    first, last = (sum(losses["bf16-mixed"][at]) / 10 for at in (slice(10), slice(-10, None)))
    assert last < 0.95 * first
    assert last == pytest.approx(sum(losses["32-true"][-10:]) / 10, rel=0.1)
