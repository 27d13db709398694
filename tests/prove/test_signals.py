"""Signals to ranks, and ranks that are killed: all of them end, soon, and the run goes on from where it was."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import small_runs
import small_store
import torch

from saepipe import checkpoints
from saepipe.lock import hold

TIMES = int(os.environ.get("PROVE_KILLS", "10"))
STEPS = 1200
PATIENCE_S = 20

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    small_store.build(folder)
    return folder


@pytest.fixture(scope="module")
def whole(store: Path) -> Path:
    """A run of two ranks that nobody disturbs."""
    run = store.parent / "whole"
    small_runs.finish(overrides(store, run))
    return run


def overrides(store: Path, run: Path, steps: int = STEPS) -> list[str]:
    more = ["trainer.devices=2", "train.checkpoint_every_steps=50", f"store.dir={store}", f"run.dir={run}"]
    return small_runs.keys("batchtopk", steps, *more)


def ranks(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes that train, the first rank first."""
    found = [
        child for child in psutil.Process(process.pid).children() if "resource_tracker" not in str(child.cmdline())
    ]
    return sorted(found, key=lambda child: (child.create_time(), child.pid))


def wait_for_checkpoint(run: Path, process: "subprocess.Popen[str]") -> None:
    before, deadline = checkpoints.newest(run / "checkpoints"), time.monotonic() + 120
    while checkpoints.newest(run / "checkpoints") == before and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def ended(process: "subprocess.Popen[str]", children: list[psutil.Process]) -> tuple[str, float]:
    """Wait for all to end; return what was printed and how long that took."""
    begin = time.monotonic()
    output, _ = process.communicate(timeout=PATIENCE_S)
    psutil.wait_procs(children, timeout=max(0.1, PATIENCE_S - (time.monotonic() - begin)))
    assert not any(child.is_running() for child in children), "a rank hangs"
    return output, time.monotonic() - begin


def assert_same(run: Path, whole: Path) -> None:
    one, other = small_runs.tensors(run), small_runs.tensors(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sigterm_to_one_rank_stops_both_and_changes_no_bit(store: Path, whole: Path, tmp_path: Path) -> None:
    run, slowest = tmp_path / "x", 0.0
    for number in range(TIMES):
        process = small_runs.launch(overrides(store, run))
        wait_for_checkpoint(run, process)
        children = ranks(process)
        assert len(children) == 2
        children[number % 2].send_signal(signal.SIGTERM)
        output, took_s = ended(process, children)
        slowest = max(slowest, took_s)
        assert process.returncode == 143, output
        assert "Traceback" not in output
        stopped = int(re.search(r"stopped at step ([\d,]+)", output)[1].replace(",", ""))  # type: ignore[index]
        assert small_runs.state(run)["steps_done"] == stopped
    print(f"{TIMES} times SIGTERM to one of two ranks: both ended within {slowest:.1f} s")
    small_runs.finish(overrides(store, run))
    assert_same(run, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT", "SIGUSR1"][: 4 if TIMES >= 10 else 2])
def test_a_signal_to_all_ranks_or_to_their_parent(store: Path, whole: Path, tmp_path: Path, name: str) -> None:
    run, number = tmp_path / "x", getattr(signal, name)
    for twice in (False, True):
        process = small_runs.launch(overrides(store, run))
        wait_for_checkpoint(run, process)
        children = ranks(process)
        if number == signal.SIGINT:  # as a terminal's Ctrl-C: to all of them
            for each in [*children, process]:
                each.send_signal(number)
        elif twice:
            for each in [*children, *children]:
                each.send_signal(number)
        else:
            process.send_signal(number)
        output, _ = ended(process, children)
        assert process.returncode == 128 + number, output
        assert "Traceback" not in output
    small_runs.finish(overrides(store, run))
    assert_same(run, whole)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(
    store: Path, tmp_path: Path, devices: int, name: str
) -> None:
    run, number = tmp_path / "x", getattr(signal, name)
    for tenths in range(6, 6 + 4 * TIMES, 4):  # from the first imports until the ranks meet
        process = small_runs.launch([*overrides(store, run), f"trainer.devices={devices}"], new_session=True)
        time.sleep(tenths / 10)
        children = [child for child in psutil.Process(process.pid).children() if child.is_running()]
        if process.poll() is None:
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # a terminal's goes to all
        output, _ = ended(process, children)
        assert process.returncode == 128 + number, (tenths, output)
        assert "Traceback" not in output, (tenths, output)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (0, signal.SIGTERM),
        (1, signal.SIGKILL),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_ends_before_the_first_step_takes_the_others_along(
    store: Path, tmp_path: Path, victim: int, number: int
) -> None:
    for tenths in (5, 15):
        process = small_runs.launch(overrides(store, tmp_path / "x"))
        while len(ranks(process)) < 2 and process.poll() is None:
            time.sleep(0.02)
        time.sleep(tenths / 10)
        children = ranks(process)
        children[victim].send_signal(number)
        output, _ = ended(process, children)
        if number == signal.SIGTERM:
            assert process.returncode == 143, output
        else:
            assert process.returncode == 2
            assert f"rank {victim} of 2 was killed (SIGKILL)" in output
        assert "Traceback" not in output


@pytest.mark.parametrize("victim", ["first", pytest.param("second", marks=pytest.mark.long), "parent"])
def test_a_rank_that_is_killed_takes_the_others_along(store: Path, whole: Path, tmp_path: Path, victim: str) -> None:
    run = tmp_path / "x"
    process = small_runs.launch(overrides(store, run))
    wait_for_checkpoint(run, process)
    children = ranks(process)
    {"first": children[0], "second": children[-1], "parent": process}[victim].send_signal(signal.SIGKILL)
    output, _ = ended(process, children)
    assert process.returncode == (-9 if victim == "parent" else 2), output
    if victim != "parent":
        assert "was killed (SIGKILL); the same command goes on from the last checkpoint" in output
        assert "Traceback" not in output
    small_runs.finish(overrides(store, run))
    assert_same(run, whole)


def test_under_torchrun_a_point_that_one_rank_refuses_ends_the_sweep(store: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    typed = [*small_runs.keys("topk", 40), f"store.dir={store}", f"run.dir={tmp_path}"]
    typed = [text for text in typed if not text.startswith("sae.k=")]
    environment = os.environ | {"PYTHONPATH": str(small_runs.ROOT)}
    with hold(tmp_path / "sae.k=2", key="run.dir"):  # which the first rank alone would find out
        done = subprocess.run(
            [*torchrun, "-m", "saepipe.train", "-m", *typed, "sae.k=2,3"],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode
    assert "sae.k=2: run.dir=" in done.stderr
    assert not (tmp_path / "sae.k=3" / "summary.json").exists()


def test_torchrun_starts_the_ranks_as_well(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "x"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    typed = [key for key in overrides(store, run) if not key.startswith("trainer.devices")]
    environment = os.environ | {"PYTHONPATH": str(small_runs.ROOT)}
    done = subprocess.run([*torchrun, "-m", "saepipe.train", *typed], env=environment, cwd=tmp_path)
    assert done.returncode == 0
    assert_same(run, whole)


def test_a_run_goes_on_with_another_number_of_ranks(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "x"
    process = small_runs.launch(overrides(store, run))
    wait_for_checkpoint(run, process)
    process.send_signal(signal.SIGTERM)
    ended(process, ranks(process))
    for devices in (1, 4, 3):
        process = small_runs.launch([*overrides(store, run), f"trainer.devices={devices}"])
        wait_for_checkpoint(run, process)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 143
    small_runs.finish(overrides(store, run))
    losses = [float(small_runs.state(folder)["last_metrics"]["losses/overall_loss"]) for folder in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
