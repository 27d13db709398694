"""A run that is killed at random moments, again and again, ends with the bits of one that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_store
import torch
from safetensors.torch import load_file

from saepipe import checkpoints, saes
from saepipe.runs import Run

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("PROVE_KILLS", "10"))
STEPS = 800

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    small_store.build(folder)
    return folder


def overrides(architecture: str, store: Path, run: Path) -> list[str]:
    keys = ["stream.hook=blocks.0.hook_resid_post", "stream.batch_tokens=24", "stream.window_tokens=96"]
    keys += [f"train.tokens={24 * STEPS}", "train.checkpoint_every_steps=30", "train.log_every_steps=50"]
    keys += ["sae.d_sae=12", "sae.dead_after_tokens=500", f"sae={architecture}"]
    has = vars(saes.architecture(architecture).config_class())
    keys += ["sae.k=3"] if "k" in has else []
    keys += ["sae.pre_act_loss_coefficient=0.01"] if "pre_act_loss_coefficient" in has else []
    return [*keys, f"store.dir={store}", f"run.dir={run}"]


def launch(architecture: str, store: Path, run: Path) -> "subprocess.Popen[bytes]":
    """Train in a process of its own; shapes are not checked there, which would take most of the time."""
    command = [sys.executable, "-m", "saepipe.train", *overrides(architecture, store, run)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def finish(architecture: str, store: Path, run: Path) -> None:
    assert launch(architecture, store, run).wait() == 0


@pytest.mark.parametrize("architecture", saes.registered())
def test_kills_change_no_bit(architecture: str, store: Path, tmp_path: Path) -> None:
    finish(architecture, store, tmp_path / "whole")
    killed, kills, seed = tmp_path / "killed", 0, random.randrange(10**6)
    print(f"{architecture}: seed {seed}")
    chance = random.Random(seed)
    while kills < KILLS and not Run(str(killed)).summary():
        process = launch(architecture, store, killed)
        before, deadline = checkpoints.newest(killed / "checkpoints"), time.monotonic() + 120
        # Kills spread over the run: each comes some time after one more checkpoint.
        while checkpoints.newest(killed / "checkpoints") == before and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= min(KILLS, 3), "the run was over before it could be killed"
    print(f"{kills} kills")
    finish(architecture, store, killed)
    one, other = (load_file(folder / "sae" / "sae_weights.safetensors") for folder in (tmp_path / "whole", killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [
        torch.load(checkpoints.newest(tmp_path / run / "checkpoints"), weights_only=True)["state_dict"]
        for run in ("whole", "killed")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
