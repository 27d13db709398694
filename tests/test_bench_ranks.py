"""The arithmetic of scaling; the ranks themselves are in tests/prove/test_bench.py."""

import json
from pathlib import Path

import pytest
import torch

from saepipe import bench_ranks, bench_step, entry
from saepipe.contest import Contestant, Task


def test_ranks_are_compared_with_independent_processes_and_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(task: Task) -> float:
        if task.world_size == 1:
            return 1.0 + task.rank
        return 1.25 if task.batch_tokens == 2048 else 0.7

    class Fake(Contestant):
        def __init__(self, name: str, command: list[str]) -> None:
            self.task = Task(**json.loads(command[-1]))

        def tell(self, **command: int) -> None:
            self.steps = command["steps"]

        def hear(self, *_: object) -> float:
            return self.steps * seconds(self.task) if hasattr(self, "steps") else 0.0

        def __exit__(self, *_: object) -> None:
            self.steps = 0

    monkeypatch.setattr(bench_ranks, "Contestant", Fake)
    monkeypatch.setattr(bench_step, "activations", lambda *sizes: [torch.zeros(1, 1)])
    config = entry.load_config("bench", ["trainer.accelerator=cpu", "bench.rounds=1"])
    weak, strong, weak_of_4, strong_of_4 = bench_ranks.measure(config, tmp_path)
    assert weak.value == pytest.approx(1 / 1.25)
    assert weak.met is False
    assert weak.measured == pytest.approx({"ranks_tokens_per_s": 4096 / 1.25, "independent_tokens_per_s": 4096})
    assert strong.value == pytest.approx(1 / 0.7)
    assert strong.measured == pytest.approx({"alone_s": 1.0, "ranks_s": 0.7})
    assert [figure.bar for figure in (weak, strong, weak_of_4, strong_of_4)] == ["at least 0.85", "", "", ""]
