"""The turns of a train job, without one; the jobs themselves are in tests/prove/test_bench.py."""

import io

import pytest
import torch

from saepipe import bench_start, bench_step, bench_train, entry
from saepipe.bench_train import _AHEAD, _Turns
from saepipe.contest import Contestant


def test_a_job_says_when_its_first_step_was_done_and_then_times_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, answers = [100.0], []
    monkeypatch.setattr(bench_train, "_now", lambda: now[0])
    monkeypatch.setattr("sys.stdin", io.StringIO('{"steps": 3}\n{"steps": 2}\n'))
    turns = _Turns(answers.append, imported=98.0)

    def steps(count: int, seconds: float) -> None:
        for _ in range(count):
            turns.before()
            now[0] += seconds

    steps(1, 1.5)
    assert answers == []
    steps(_AHEAD, 7.0)  # batches that lay ready
    assert answers == [3.5]
    steps(3, 0.5)
    steps(_AHEAD, 7.0)
    assert answers == [3.5, 1.5]
    steps(2, 0.25)

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit):  # nobody tells it anything any more
        turns.before()
    assert answers == [3.5, 1.5, 0.5]


def test_the_figures(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Contestant):
        def __init__(self, name: str, *_: object) -> None:
            self.name = name

        def hear(self) -> float:
            return 2.5

        def ask(self, **command: int) -> float:
            return command["steps"] * (0.1 if self.name == "saepipe's step" else 0.125)

        def __exit__(self, *_: object) -> None:
            self.name = ""

    monkeypatch.setattr(bench_train, "Contestant", Fake)
    monkeypatch.setattr(bench_step, "activations", lambda *sizes: [torch.zeros(1, 1)])
    config = entry.load_config("bench", ["bench.d_in=8", "stream.window_tokens=16384", "bench.rounds=2"])
    (whole,) = bench_train.measure(config, tmp_path)  # type: ignore[arg-type]
    assert whole.ratio == pytest.approx(0.8)
    assert whole.met is False
    assert whole.measured == pytest.approx({"step_tokens_per_s": 20480, "verb_tokens_per_s": 16384})
    (start,) = bench_start.measure(config, tmp_path)  # type: ignore[arg-type]
    assert (start.rounds, start.unit, start.met) == ([2.5] * 3, "s", True)
