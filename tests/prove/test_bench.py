"""The bench with real processes: steps, the whole verb, grids, ranks, at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    *("bench.d_in=16", "bench.d_sae=64", "bench.batch_tokens=64", "bench.k=4", "bench.steps=2", "bench.rounds=1"),
    *("stream.window_tokens=16384", "bench.gb=0.02", "trainer.accelerator=cpu"),
]


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_steps_the_whole_verb_its_start_grids_and_ranks_are_measured(tmp_path: Path) -> None:
    parts = ["bench.parts=[step,train,start,grid,ranks]", "bench.architectures=[topk,gated]"]
    command = [sys.executable, "-m", "saepipe.bench", *TINY, *parts, "bench.out=out.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    figures = {figure["figure"]: figure for figure in json.loads((tmp_path / "out.json").read_text())["figures"]}
    assert len(figures) == 3 + 1 + 1 + 2 + 4
    assert all(figure["value"] > 0 for figure in figures.values())
    gated = figures["step, gated at L0 4, share of its time that the encoder's product takes alone"]
    assert gated["l0"] == pytest.approx(4, rel=0.3)
    assert gated["tokens_per_day"] == pytest.approx(86400 * gated["tokens_per_s"])
    assert figures["start, from lightning's import to the first step"]["unit"] == "s"
