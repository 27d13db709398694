"""Somebody who works on a login node: a copy of the checkout, and the verbs."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FINAL = ("done", "failed", "cancelled")


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
        self.environment = {**self.environment, "PYTHONPATH": str(self.checkout)}

    def run(self, module: str, *arguments: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def submit(self, *overrides: str) -> str:
        done = self.run("launch.submit", *CLUSTER, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, run: str) -> list[dict[str, Any]]:
        done = self.run("launch.status", run, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        lines: list[dict[str, Any]] = json.loads(done.stdout)
        return lines

    def wait(
        self, run: str, until: Callable[[list[dict[str, Any]]], bool] | None = None, timeout_s: float = 300
    ) -> Any:
        """Wait until all tasks are over, or for something else; nothing waits for ever."""
        deadline = time.monotonic() + timeout_s
        while True:
            lines = self.status(run)
            if (until or over)(lines):
                return lines
            assert not over(lines), lines  # what is waited for will not come any more
            told = self.run("launch.status", run).stdout + self.run("launch.logs", run).stdout[-5000:]
            assert time.monotonic() < deadline, told
            time.sleep(0.5)


def over(lines: list[dict[str, Any]]) -> bool:
    return all(line["state"] in FINAL for line in lines)


CLUSTER = ["slurm=example", "slurm.partition=low", "slurm.gres=null", "slurm.time_min=10", "slurm.signal_delay_s=10"]
CLUSTER += ["slurm.cpus_per_rank=1"]
