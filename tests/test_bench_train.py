"""The turns of a train job, without one; the jobs themselves are in tests/prove/test_bench.py."""

import io
import threading

import pytest
import torch

from saepipe import bench_start, bench_step, bench_train, entry
from saepipe.bench_train import _Turns
from saepipe.contest import Contestant


def test_a_job_says_when_its_first_step_was_done_and_then_times_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, answers = [100.0], []
    monkeypatch.setattr(bench_train, "_now", lambda: now[0])
    monkeypatch.setattr("sys.stdin", io.StringIO('{"steps": 3}\n{"steps": 2}\n'))
    turns = _Turns(answers.append, began=98.0)

    def steps(count: int, seconds: float) -> None:
        for _ in range(count):
            turns.before_step()
            now[0] += seconds

    steps(1, 1.5)
    assert answers == []
    now[0] += 0.25  # what follows a step is in it
    steps(3, 0.5)
    assert answers == [3.75]
    steps(2, 0.25)
    assert answers == [3.75, 1.5]

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit):  # nobody tells it anything any more
        turns.before_step()
    assert answers == [3.75, 1.5, 0.5]


def test_its_threads_do_nothing_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        def readline(self) -> str:
            waiting.set()
            assert go_on.wait(10)
            return '{"steps": 1}\n'

    waiting, go_on, read = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr("sys.stdin", Told())
    turns = _Turns(lambda _: None, began=0.0)
    turns.before_step()
    turns.before_block()  # in its own turn it does not wait
    waits = threading.Thread(target=turns.before_step)
    waits.start()
    assert waiting.wait(10)
    reader = threading.Thread(target=lambda: (turns.before_block(), read.set()))
    reader.start()
    assert not read.wait(0.1)
    go_on.set()
    assert read.wait(10)
    waits.join()
    reader.join()


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
    config = entry.load_config("bench", ["trainer.accelerator=cpu", "stream.window_tokens=16384", "bench.rounds=2"])
    (whole,) = bench_train.measure(config, tmp_path)  # type: ignore[arg-type]
    assert whole.value == pytest.approx(0.8)
    assert whole.met is False
    assert whole.measured == pytest.approx({"step_tokens_per_s": 20480, "verb_tokens_per_s": 16384})
    (start,) = bench_start.measure(config, tmp_path)  # type: ignore[arg-type]
    assert (start.rounds, start.unit, start.met) == ([2.5] * 2, "s", True)
