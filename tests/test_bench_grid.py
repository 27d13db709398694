"""The arithmetic of the grid's figures; the jobs themselves are in tests/prove/test_bench.py."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from saepipe import bench_grid, entry
from saepipe.contest import Contestant


def test_the_figures_compare_a_grid_with_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Contestant):
        def __init__(self, _: object, __: object, run_dir: Path, *keys: str, program: list[str]) -> None:
            jobs.append((run_dir, *keys, *program))

        def hear(self) -> float:
            return 1.0

        def __exit__(self, *_: object) -> None:
            jobs.append(())

    def in_turns(contestants: Mapping[str, Contestant], turns: int, *, steps: int) -> dict[str, list[float]]:
        assert [*contestants] == ["run", "grid"]
        assert steps % len(bench_grid.LRS) == 0  # whole batches of the grid
        return {"run": [0.1] * turns, "grid": [0.11] * turns}

    jobs: list[tuple[object, ...]] = []
    monkeypatch.setattr(bench_grid, "verb", Fake)
    monkeypatch.setattr(bench_grid, "in_turns", in_turns)
    monkeypatch.setattr(bench_grid, "random_store", lambda config, _: config.stream.window_tokens)
    config = entry.load_config("bench", ["bench.rounds=2", "bench.batch_tokens=1000"])
    plain, slow = bench_grid.measure(config, tmp_path)
    assert plain.rounds == slow.rounds == pytest.approx([1.1, 1.1])
    assert (plain.met, slow.met) == (False, False)
    assert plain.measured == pytest.approx({"run_tokens_per_s": 10_000, "grid_tokens_per_s": 1000 / 0.11})
    folders = [job[0] for job in jobs if job]
    assert len({*folders}) == 4
    run, grid, slow_run, slow_grid = (job[1:] for job in jobs if job)
    assert run == ("optim.lr=0.0001", "saepipe.bench_train")
    assert grid == ("grid.lr=[0.0001,0.0002,0.0003,0.0004]", "saepipe.bench_train")
    assert slow_run[1] == slow_grid[1] == "saepipe.bench_grid"
    assert float(str(slow_run[2])) == float(str(slow_grid[2])) == pytest.approx(10_000 / 3)
