"""The whole graph on this machine: submitted, run in the background, looked at, cancelled."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.sweep_folder import SweepFolder

ROOT = Path(__file__).parents[2]
FINAL = {"done", "failed", "cancelled"}
TINY = ["+experiment=demo", "store.tokens=20000", "store.shard_tokens=4096", "store.shuffle_tokens=8192"]
TINY += ["stream.batch_tokens=768", "stream.window_tokens=8192", "sae.d_sae=64", "train.tokens=15360"]
TINY += ["evaluate.tokens=1000", "analyze.tokens=1000", "analyze.latents=4", "optim.lr_warm_up_steps=0"]
TINY += ["optim.lr_decay_steps=0"]


pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]


def run(folder: Path, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "checkout")},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for name in ("saepipe", "launch", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    yield tmp_path
    for runs in (tmp_path / "runs").glob("*"):
        if runs.is_dir():
            run(tmp_path, "launch.cancel", str(runs))  # else what hangs would hang on


def status(folder: Path, runs: str) -> list[dict[str, Any]]:
    done = run(folder, "launch.status", runs, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def wait(folder: Path, runs: str, until: Any = None) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 240
    while True:
        lines = status(folder, runs)
        if until(lines) if until else all(line["state"] in FINAL for line in lines):
            return lines
        assert time.monotonic() < deadline, run(folder, "launch.status", runs).stdout
        time.sleep(0.5)


def test_a_sweep_runs_in_the_background_with_the_code_it_was_submitted_with(folder: Path) -> None:
    done = run(folder, "launch.submit", *TINY, "sae=topk", "sae.k=4,8")
    assert done.returncode == 0, done.stderr
    for path in (folder / "checkout").rglob("*.py"):
        path.write_text("raise SystemExit('edited')\n")
    shutil.rmtree(folder / "checkout")
    shutil.copytree(ROOT / "launch", folder / "checkout" / "launch")
    shutil.copytree(ROOT / "saepipe", folder / "checkout" / "saepipe")
    shutil.copytree(ROOT / "conf", folder / "checkout" / "conf")
    lines = wait(folder, "runs/demo")
    assert [(line["stage"], line["state"]) for line in lines] == [
        *(("tokenise", "done"), ("cache", "done"), ("train", "done"), ("train", "done")),
        *(("evaluate", "done"), ("evaluate", "done"), ("collect", "done")),
    ], lines
    with (folder / "runs/demo/sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sae.k"], row["state"]) for row in rows] == [("4", "evaluated"), ("8", "evaluated")]
    assert (folder / "runs/demo/pareto.html").exists()
    logs = run(folder, "launch.logs", "runs/demo", "sae.k=8").stdout
    assert "training topk, 64 latents" in logs
    assert "explained variance" in logs
    wrong = run(folder, "launch.logs", "runs/demo", "sae.k=9")
    assert wrong.returncode == 2
    assert "did you mean" in wrong.stderr
    again = run(folder, "launch.submit", *TINY, "sae=topk", "sae.k=4,8,16")  # what is done is not done again
    assert again.returncode == 0, again.stderr
    lines = wait(folder, "runs/demo")
    newest = SweepFolder.newest(folder / "runs/demo")
    assert [(stage.name, task.title) for stage in newest.stages for task in stage.tasks] == [
        *(("train", "sae.k=16"), ("evaluate", "sae.k=16"), ("collect", "sweep")),
    ]
    assert [line["state"] for line in lines] == ["done"] * 9  # with what the first one did
    assert len((folder / "runs/demo/sweep.csv").read_text().splitlines()) == 4
    assert "torch==" in newest.lock.read_text()


def test_a_point_that_fails_holds_up_its_own_evaluation_alone_and_cancelling_ends_all(folder: Path) -> None:
    broken = folder / "runs" / "demo" / "sae.k=4"
    done = run(folder, "launch.submit", *TINY, "sae=topk", "sae.k=4,8", "train.tokens=153600000")
    assert done.returncode == 0, done.stderr
    refused = run(folder, "launch.submit", *TINY, "sae=topk", "sae.k=4,8", "train.tokens=153600000")
    assert refused.returncode == 2
    assert "jobs of an earlier submission in the queue" in refused.stderr
    wait(folder, "runs/demo", lambda lines: lines[2]["state"] == "running" and "train" in lines[2]["last"])
    assert run(folder, "launch.cancel", "runs/demo").returncode == 0
    lines = wait(folder, "runs/demo")
    assert [line["state"] for line in lines] == ["done", "done", *["cancelled"] * 5]
    shutil.rmtree(broken)
    broken.write_text("no folder")
    done = run(folder, "launch.submit", *TINY, "sae=topk", "sae.k=4,8", "run.name=other")
    assert done.returncode == 0, done.stderr
    other = folder / "runs" / "other" / "sae.k=4"
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("no folder")
    lines = wait(folder, "runs/other")
    states = {(line["stage"], line["title"]): (line["state"], line["why"]) for line in lines}
    assert states["train", "sae.k=4"][0] == "failed"
    assert str(other) in states["train", "sae.k=4"][1]
    assert states["evaluate", "sae.k=4"][0] == "cancelled"
    assert states["evaluate", "sae.k=8"][0] == states["collect", "sweep"][0] == "done"
