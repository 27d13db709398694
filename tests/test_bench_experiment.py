"""What an experiment is said to take, with a step whose time is known."""

import json
import logging
from pathlib import Path

import pytest
import torch

from saepipe import bench, bench_experiment, bench_step, entry
from saepipe.contest import Contestant, Task

KEYS = ["+experiment=demo", "trainer.accelerator=cpu", "bench.gb=0.01", "bench.rounds=1", "evaluate.batch_prompts=2"]


def test_all_verbs_are_timed_at_their_own_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, short_timing: None
) -> None:
    tasks = []

    class Fake(Contestant):
        def __init__(self, name: str, command: list[str]) -> None:
            tasks.append(Task(**json.loads(command[-1])))

        def hear(self) -> float:
            return 0.0

        def ask(self, **command: int) -> float:
            return 3072 / 1000

        def __exit__(self, *_: object) -> None:
            tasks.append(None)

    monkeypatch.setattr(bench_experiment, "Contestant", Fake)
    for module in (bench_experiment, bench_step):
        monkeypatch.setattr(module, "activations", lambda *sizes: [torch.zeros(1, 1)])
    config = entry.load_config("bench", [*KEYS, "store.tokens=100000", "grid.k=[8,16]", f"store.dir={tmp_path}/store"])
    assert bench.parts_of(config)[0] == "experiment"
    with caplog.at_level(logging.INFO, "saepipe"):
        figures = {figure.name: figure for figure in bench_experiment.measure(config, tmp_path)}
    first, _, second, _ = tasks
    assert (first.d_in, first.d_sae, first.batch_tokens) == (128, 2048, 3072)
    assert (first.sae["k"], second.sae["k"]) == (8, 16)
    assert [*figures] == ["experiment, caching", "experiment, training", "experiment, evaluation"]
    training = figures["experiment, training"]
    assert training.measured["tokens_per_s"] == pytest.approx(500)  # two points, one after the other
    assert training.value == pytest.approx(4_000_000 / 500)
    assert training.measured["stream_tokens_per_s"] > 500
    assert figures["experiment, caching"].measured["tokens"] > 100_000  # and what is held out
    assert "your experiment will take about " in caplog.text
    assert "training 2.2 h (4,000,000 tokens)" in caplog.text


def test_without_an_experiment_none_is_timed() -> None:
    assert "experiment" not in bench.parts_of(entry.load_config("bench"))
