"""A run that is killed at random moments, again and again, ends with the bits of one that nobody disturbed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import small_runs
import small_store
import torch
from safetensors.torch import load_file

from saepipe import checkpoints
from saepipe.runs import Run

KILLS = int(os.environ.get("PROVE_KILLS", "10"))
STEPS = 800
FIRST = ("batchtopk-auxk", "gated-resample")  # a threshold, and the optimizer's state of latents begun anew

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    small_store.build(folder)
    return folder


@pytest.mark.parametrize(
    "case",
    [
        "grid",
        *(pytest.param(case, marks=[] if case in FIRST else [pytest.mark.long]) for case in small_runs.last_cases()),
    ],
)
def test_kills_change_no_bit(case: str, store: Path, tmp_path: Path) -> None:
    name, more = small_runs.cases()["standard-none" if case == "grid" else case]
    more = [*more, "train.checkpoint_every_steps=30", "train.log_every_steps=50", f"store.dir={store}"]
    more += ["grid.l1_coefficient=[0.5,2]", "train.micro_batches=2"] if case == "grid" else []
    keys, whole, killed = small_runs.keys(name, STEPS, *more), tmp_path / "whole", tmp_path / "killed"
    small_runs.finish([*keys, f"run.dir={whole}"])
    points = sorted(path.parent.relative_to(whole) for path in whole.rglob("summary.json"))
    kills, seed = 0, random.randrange(10**6)
    print(f"{case}: seed {seed}")
    chance = random.Random(seed)
    while kills < KILLS and not Run(killed / points[-1]).summary():
        process = small_runs.launch([*keys, f"run.dir={killed}"])
        folder = killed / points[-1] / "checkpoints"
        before, deadline = checkpoints.newest(folder), time.monotonic() + 120
        # Kills spread over the run: each comes some time after one more checkpoint.
        while checkpoints.newest(folder) == before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= min(KILLS, 3), "the run was over before it could be killed"
    print(f"{kills} kills")
    small_runs.finish([*keys, f"run.dir={killed}"])
    assert points
    for point in points:
        one, other = (load_file(run / point / "sae" / "sae_weights.safetensors") for run in (whole, killed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        states = [small_runs.tensors(run / point) for run in (whole, killed)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
