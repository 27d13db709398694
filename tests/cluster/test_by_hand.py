"""A real SLURM without `launch`: allocations that are worked in by hand, and Hydra's own launcher."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from login_desk import TINY, Desk, assert_same_bits, tokens

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("ranks", [1, 2])
def test_hydras_own_launcher_gives_every_point_its_folder_and_ranks(desk: Desk, store: Path, ranks: int) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    keys = [*TINY, f"store.dir={store}", tokens(60), f"trainer.devices={ranks}", "run.dir=runs/multi", "sae.k=4,8"]
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=5"]
    slurm += [f"hydra.launcher.cpus_per_task={ranks}"]
    for launcher, folder in (([], "here"), (slurm, "there")):
        given = [key.replace("runs/multi", f"runs/{folder}") for key in keys]
        done = desk.run("saepipe.train", "-m", *given, *launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        for k in (4, 8):
            summary = (desk.folder / "runs" / folder / f"sae.k={k}" / "summary.json").read_text()
            assert f'"ranks": {ranks},' in summary
    for k in (4, 8):
        assert_same_bits(*(desk.folder / "runs" / folder / f"sae.k={k}" for folder in ("here", "there")))


def at_a_terminal(desk: Desk, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as somebody who types it does: salloc asks for a terminal."""
    return desk.call("script", "--quiet", "--return", "--command", shlex.join(words), "/dev/null")


def test_an_allocation_that_is_worked_in_by_hand(desk: Desk, store: Path) -> None:
    keys = ["-m", "saepipe.train", *TINY, f"store.dir={store}", tokens(60)]
    python, two = sys.executable, ["--nodes=2", "--ntasks-per-node=1"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=p1:29411"]
    ways = {
        "srun": (2, ["salloc", *two, "srun", python, *keys]),
        "torchrun": (2, ["salloc", *two, "srun", python, *torchrun, *keys]),
        "devices": (2, ["salloc", "--ntasks=1", "--cpus-per-task=2", python, *keys, "trainer.devices=2"]),
        "pty": (1, ["srun", "--pty", python, *keys]),
    }
    for name, (ranks, words) in ways.items():
        done = at_a_terminal(desk, *words, f"run.dir=runs/{name}")
        assert done.returncode == 0, (name, done.stdout)
        assert f'"ranks": {ranks},' in (desk.folder / "runs" / name / "summary.json").read_text(), name
    for name in ("torchrun", "devices"):
        assert_same_bits(desk.folder / "runs/srun", desk.folder / "runs" / name)
    told = at_a_terminal(desk, "salloc", *two, "srun", python, *keys, "run.dir=runs/odd", "trainer.devices=2")
    assert told.returncode == 2
    assert "trainer.devices=2 and trainer.num_nodes=1 differ from what was started: 1 ranks on each of 2" in told.stdout
    assert not (desk.folder / "runs/odd").exists()
