"""Somebody who works on a login node: a copy of the checkout, the verbs, and what they look at."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from launch.status import status

ROOT = Path(__file__).parents[2]
FINAL = ("done", "failed", "cancelled")
PREEMPTIONS = int(os.environ.get("CLUSTER_PREEMPTIONS", "1"))
FULL = PREEMPTIONS >= 3
"""Whether there is time for sizes in earnest."""

CLUSTER = ["slurm=example", "slurm.partition=low", "slurm.gres=null", "slurm.time_min=10", "slurm.signal_delay_s=10"]
CLUSTER += ["slurm.cpus_per_rank=1"]
TINY = ["+experiment=demo", "sae.d_sae=128", "stream.batch_tokens=768", "stream.window_tokens=49152"]
TINY += ["optim.lr_warm_up_steps=5", "optim.lr_decay_steps=5", "train.checkpoint_every_steps=100000"]
TINY += ["evaluate.tokens=3000", "analyze.tokens=3000", "analyze.latents=4"]

Lines = list[dict[str, Any]]


@dataclass
class Desk:
    """Somebody who works on a login node.

    Args:
        folder: Where they work.
        environment: What reaches the cluster.
    """

    folder: Path
    environment: dict[str, str]
    checkout: Path = field(init=False)

    def __post_init__(self) -> None:
        self.checkout = self.folder / "checkout"
        for name in ("saepipe", "launch", "conf"):
            shutil.copytree(ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        # One thread, as the ranks of CLUSTER have: another number sums in another order.
        self.environment = {**self.environment, "PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1"}

    def run(self, module: str, *arguments: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        return self.call(sys.executable, "-m", module, *arguments, timeout=timeout)

    def call(self, *words: str, timeout: float = 300, **more: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout, **more
        )

    def submit(self, *overrides: str) -> str:
        done = self.run("launch.submit", *CLUSTER, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, run: str) -> Lines:
        """What the verb prints."""
        done = self.run("launch.status", run, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        lines: Lines = json.loads(done.stdout)
        return lines

    def look(self, run: str) -> Lines:
        """The same, in this process: a verb per look would slow down what is looked at."""
        with mock.patch.dict(os.environ, self.environment):
            return [vars(line) for line in status(self.folder / run)]

    def wait(self, run: str, until: Callable[[Lines], bool] | None = None, timeout_s: float = 300) -> Lines:
        """Wait until all tasks are over, or for something else; nothing waits for ever."""
        deadline = time.monotonic() + timeout_s
        while True:
            lines = self.look(run)
            if (until or over)(lines):
                return lines
            assert not over(lines), lines  # what is waited for will not come any more
            if time.monotonic() > deadline:
                raise AssertionError(self.run("launch.status", run).stdout + self.run("launch.logs", run).stdout)
            time.sleep(0.3)


def over(lines: Lines) -> bool:
    return all(line["state"] in FINAL for line in lines)


def of_stage(lines: Lines, stage: str) -> Lines:
    return [line for line in lines if line["stage"] == stage]


def training(lines: Lines) -> bool:
    """Whether the first point is in its steps: a row is logged (its bar, in a log, moves on only twice a minute)."""
    line = of_stage(lines, "train")[0]
    return line["state"] == "running" and line["last"].startswith("train:") and line["step"] != ""


def tokens(steps: int) -> str:
    return f"train.tokens={768 * steps}"


def bits(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "sae" / "sae_weights.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = bits(one), bits(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
