"""The arithmetic of the grid's figures; the jobs themselves are in tests/prove/test_bench.py."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from saepipe import bench_grid, bench_train, entry
from saepipe.bench_train import PROGRAM
from saepipe.contest import Contestant
from saepipe.store import Store


def test_the_figures_compare_a_grid_with_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Contestant):
        def __init__(self, _: object, __: object, run_dir: Path, *keys: str, program: tuple[str, ...]) -> None:
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
    config = entry.load_config("bench", ["bench.rounds=2", "trainer.accelerator=cpu"])
    plain, slow = bench_grid.measure(config, tmp_path)
    assert plain.rounds == slow.rounds == pytest.approx([1.1, 1.1])
    assert (plain.met, slow.met) == (False, False)
    assert plain.measured == pytest.approx({"run_tokens_per_s": 20_480, "grid_tokens_per_s": 2048 / 0.11})
    folders = [job[0] for job in jobs if job]
    assert len({*folders}) == 4
    run, grid, slow_run, slow_grid = (job[1:] for job in jobs if job)
    assert run == ("optim.lr=0.0001", *PROGRAM)
    assert grid == ("grid.lr=[0.0001,0.0002,0.0003,0.0004]", *PROGRAM)
    assert slow_run[1:3] == slow_grid[1:3] == ("-m", "saepipe.bench_grid")
    assert float(str(slow_run[3])) == float(str(slow_grid[3])) == pytest.approx(20_480 / 3)


def test_a_slow_disk_gives_so_many_rows_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, gaps, store = [50.0], [], Store.__new__(Store)

    def read(*_: object) -> int:
        now[0] += 0.25  # a disk that takes time of its own
        return 100

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def main(_: float) -> None:
        for _ in range(3):
            begin = now[0]
            assert Store.read_block_into(store) == 100  # type: ignore[call-arg]
            gaps.append(now[0] - begin)
        now[0] += 7.0  # nobody reads while the turn is another's, and that time is not made up for
        begin = now[0]
        Store.read_block_into(store)  # type: ignore[call-arg]
        gaps.append(now[0] - begin)

    monkeypatch.setattr(Store, "read_block_into", read)
    monkeypatch.setattr(bench_grid, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(bench_train, "main", main)
    bench_grid._on_a_slow_disk(200.0)
    assert gaps == pytest.approx([0.5] * 4)
