"""A sweep of which something is wrong submits nothing, and says what."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
import small_store

from launch import checks, points, submit
from saepipe import entry
from saepipe.cache import cache
from saepipe.errors import UserError

DEMO = ["+experiment=demo", "store.tokens=20000", "slurm=dgx4x8"]


def checked(folder: Path, *overrides: str) -> checks.PlannedStore:
    configs, _ = points.load([*DEMO, f"store.dir={folder}/acts", f"run.dir={folder}/x", *overrides])
    return checks.check(configs)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sae.k=8,5000"], "sae.k=5000 is more than the 2048 latents"),
        (["trainer.devices=8", "trainer.num_nodes=2"], "stream.lanes=24 cannot be split among 16 ranks"),
        (["trainer.devices=12"], "trainer.devices=12 is more than the 8 GPUs of a node"),
        (["trainer.num_nodes=6"], "trainer.num_nodes=6 is more than the 4 nodes"),
        (["trainer.num_nodes=2", "slurm.min_nodes=3"], "slurm.min_nodes=3 is more than trainer.num_nodes=2"),
        (["trainer.num_nodes=2", "slurm=local"], "trainer.num_nodes=2 does not go with slurm=local"),
        (["trainer.accelerator=cuda", "slurm.gres=null"], "slurm.gres=null asks for no GPU"),
        (["train.micro_batches=5"], "train.micro_batches=5 does not divide"),
        (["train.tokens=3"], "less than one batch"),
        (["stream.hook=blocks.9.hook_resid_post"], "stream.hook=blocks.9.hook_resid_post is not known"),
        (["model.hooks=[blocks.9.hook_resid_post]"], "model.hooks=blocks.9.hook_resid_post names block 9"),
        (["model.name=nowhere/nothing"], "model.name=nowhere/nothing"),
        (["data.path=nothing.txt"], "data.path=nothing.txt"),
        (["data.context_size=4096"], "data.context_size=4096"),
        (["store.tokens=10000000000000"], "needs"),
        (["store.tokens=20000,30000"], "store.tokens is 20000 for one point and 30000 for another"),
        (["sae.k=8,8"], "two points of the sweep are sae.k=8; give each value once"),
        (['slurm.python="a \'b"'], "slurm.python=a 'b is no command"),
        (["slurm.stages.train.time_min=abc"], "slurm.stages.train.time_min=abc is no value of slurm.time_min"),
        (["slurm.stages.train.setup=text"], "slurm.stages.train.setup=text is no value of slurm.setup"),
        ([f"run.name={'x' * 300}", "run.dir=runs/${run.name}"], "run.dir has a folder of 300 letters"),
    ],
)
def test_what_is_wrong_with_one_point_is_told_of_all(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        checked(tmp_path, *overrides)
    assert words in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("letter", [":", "%"])
def test_a_letter_that_means_something_else_in_a_job_is_refused(tmp_path: Path, letter: str) -> None:
    with pytest.raises(UserError, match=f"holds a '{letter}'"):
        checked(tmp_path, f"run.dir='{tmp_path}/a{letter}b'")


def test_points_that_do_not_lie_beside_each_other_are_refused() -> None:
    configs, _ = points.load([*DEMO, "run.name=one,two"])
    with pytest.raises(UserError, match="sweep over no key of run"):
        checks.check(configs)


def test_a_sound_sweep_knows_its_store_and_has_absolute_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs, _ = points.load([*DEMO, "sae.k=8,16", "trainer.devices=8"])
    store = checks.check(configs)
    assert (store.complete, store.widths) == (False, {"blocks.2.hook_resid_post": 128})
    assert store.bytes > 20_000 * 128 * 2
    assert [config.run.dir for config in configs] == [f"{tmp_path}/runs/demo/sae.k={k}" for k in (8, 16)]


def test_a_store_and_a_run_that_are_there_are_compared(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    small_store.build(store)
    keys = [*small_runs.keys("topk", 3), f"store.dir={store}", f"run.dir={run}"]
    small_runs.finish(keys)
    configs, _ = points.load([*keys, "model.name=demo", "data.path=demo"])
    with pytest.raises(UserError, match="differs from the store's"):
        checks.check(configs)


def test_a_store_that_another_configuration_began_is_refused_and_ones_own_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["+experiment=demo", "store.dir=acts", "store.tokens=20000"]
    cache(entry.load_config("cache", keys))
    (tmp_path / "acts" / "manifest.json").unlink()  # what a job that was killed leaves has none
    configs, _ = points.load(keys)
    assert not checks.check(configs).complete
    configs, _ = points.load(["+experiment=demo", "store.dir=acts"])  # nothing typed differs
    with pytest.raises(UserError, match=r"was made with store\.tokens=20000"):
        checks.check(configs)


def test_without_a_cluster_nothing_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs sbatch, which this machine has not"):
        submit.submit([*DEMO, "sae.k=8,16"])
    assert not list(tmp_path.rglob("sweep.json"))


def gemma(folder: Path) -> dict[str, str]:
    """A hub cache that holds what says how wide google/gemma-2b is, and no weights."""
    import json

    import small_models

    cache = folder / "hub" / "models--google--gemma-2b"
    snapshot = cache / "snapshots" / ("0" * 40)
    small_models.make(snapshot, "gemma")
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    config = json.loads((snapshot / "config.json").read_text())
    config |= {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384, "head_dim": 256}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    (snapshot / "config.json").write_text(json.dumps(config))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("reached", [False, True])
def test_a_dry_run_prints_the_whole_plan_for_a_cluster_that_is_only_described(tmp_path: Path, reached: bool) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text\n\n" * 100)
    more = [f"data.path={text}", "data.streaming=false", "store.tokens=30000"] if reached else []
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.submit",
            "+experiment=gemma2b",
            "+sweep=l1_grid",
            "slurm=dgx4x8",
            "slurm.dry_run=true",
            "trainer.num_nodes=2",
            "trainer.devices=8",
            *more,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(small_runs.ROOT), **(gemma(tmp_path / "hf") if reached else {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "4 points of standard, 1,228,800,000 tokens each" in told
    for stage, count in (("tokenise", 1), ("cache", 4), ("train", 4), ("evaluate", 4), ("collect", 1)):
        assert f"\n# {stage}\n#!/bin/bash" in told
        assert ("#SBATCH --array=0-3%4" in told.split(f"\n# {stage}\n")[1].split("# setup")[0]) == (count == 4)
    assert "768" in next(line for line in told.splitlines() if line.startswith("train "))  # 4 x 16 GPUs x 12 h
    assert "820 GPU-hours at most" in told
    assert told.endswith("slurm.dry_run=true: nothing was submitted\n")
    assert ("GB to be stored" in told) == reached
    assert ("not checked" in told) != reached
    assert not list(tmp_path.rglob("sweep.json"))
