"""The arithmetic of the grid's figures; the commands that they time are those of tests/prove/test_grids.py."""

from pathlib import Path

import pytest

from saepipe import bench_grid, entry


def test_the_figures_compare_a_grid_with_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def timed(self: object, name: str, key: str, steps: int = 60, rows_per_s: float | None = None) -> float:
        if rows_per_s is not None:
            rates.append(rows_per_s)
            return 25.0 if key.startswith("grid.") else 19.0
        if key.startswith("grid."):
            assert key == "grid.l1_coefficient=[1,2,4,8]"
            return 25.0
        return 4.0 if steps == 1 else 10.0

    monkeypatch.setattr(bench_grid._Round, "_train", timed)
    config = entry.load_config("bench", ["bench.rounds=1", "stream.batch_tokens=1024"])
    plain, slow = bench_grid.measure(config, tmp_path)
    assert plain.ratio == pytest.approx(25 / (4 * 10 - 3 * 4))
    assert slow.ratio == pytest.approx(25 / (4 * 19))
    assert (plain.met, slow.met) == (True, True)
    assert rates == pytest.approx([60 * 1024 / 6 / 3] * 2)
