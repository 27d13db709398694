"""A grid in one job and a sweep of runs leave the same, on one rank and on two."""

import json
from pathlib import Path

import pytest
import small_runs
import small_store

STEPS = 50

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]


def files(folder: Path) -> dict[str, bytes]:
    """Read what must be the same to the last byte."""
    names = ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.name in names}


def metrics(folder: Path) -> dict[str, list[list[str]]]:
    """Read the metrics but for timings."""
    found = {}
    for path in folder.rglob("metrics.csv"):
        names, *rows = [line.split(",") for line in path.read_text().splitlines()]
        kept = [at for at, name in enumerate(names) if name not in ("details/tokens_per_s", "details/seconds_left")]
        found[path.relative_to(folder).as_posix()] = [[row[at] for at in kept] for row in [names, *rows]]
    return found


@pytest.mark.parametrize("devices", [1, 2])
def test_a_grid_leaves_what_a_sweep_leaves(tmp_path: Path, devices: int) -> None:
    small_store.build(tmp_path / "store")
    more = [f"trainer.devices={devices}", "train.log_every_steps=5", "train.evaluate_every_steps=20"]
    keys = small_runs.keys("gated", STEPS, *more, f"store.dir={tmp_path / 'store'}")
    small_runs.finish([*keys, f"run.dir={tmp_path / 'grid'}", "grid.l1_coefficient=[0.5,2]", "grid.lr=[0.001,0.003]"])
    swept = ["-m", "sae.l1_coefficient=0.5,2", "optim.lr=0.001,0.003"]
    small_runs.finish([*keys, f"run.dir={tmp_path / 'sweep'}", *swept])
    assert len(files(tmp_path / "grid")) == 12
    assert files(tmp_path / "grid") == files(tmp_path / "sweep")
    assert metrics(tmp_path / "grid") == metrics(tmp_path / "sweep")
    for path in (tmp_path / "sweep").rglob("summary.json"):
        assert json.loads(path.read_text())["ranks"] == devices
