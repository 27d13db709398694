"""Pipelines on a real SLURM: submitted, preempted, killed, cut short, and always ended with the same bytes."""

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from login_desk import Desk
from safetensors.torch import load_file
from slurm_cluster import Cluster

pytestmark = pytest.mark.timeout(900)
PREEMPTIONS = int(os.environ.get("CLUSTER_PREEMPTIONS", "1"))
TINY = ["+experiment=demo", "sae.d_sae=128", "stream.batch_tokens=768", "stream.window_tokens=49152"]
TINY += ["optim.lr_warm_up_steps=5", "optim.lr_decay_steps=5", "train.checkpoint_every_steps=100000"]
TINY += ["evaluate.tokens=3000", "analyze.tokens=3000", "analyze.latents=4"]


def tokens(steps: int) -> str:
    return f"train.tokens={768 * steps}"


def bits(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "sae" / "sae_weights.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = bits(one), bits(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def of_stage(lines: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["stage"] == stage]


def training(lines: list[dict[str, Any]]) -> bool:
    """Whether the first point is in its steps."""
    line = of_stage(lines, "train")[0]
    return line["state"] == "running" and line["last"].startswith(("training", "train:"))


def ranks_of(run: Path) -> list[psutil.Process]:
    """The processes of this machine that train a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "launch.work" in words and str(run) in " ".join(words) and "srun" not in Path(words[0]).name:
            found.append(process)
    return found


def preempt(cluster: Cluster) -> None:
    """Take all nodes for a job of higher priority, for a moment."""
    taken = cluster.run(
        "sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )
    assert taken.returncode == 0, taken.stderr
    job = taken.stdout.split()[-1]
    deadline = time.monotonic() + 60
    while cluster.job(job).get("JobState") not in ("COMPLETED", "COMPLETING"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_one_command_makes_a_grid_out_of_text_with_the_code_it_was_submitted_with(desk: Desk) -> None:
    begin = time.monotonic()
    keys = ["store.tokens=100000", "sae=standard", "sae.l1_coefficient=1,2,4", "trainer.num_nodes=2", tokens(300)]
    told = desk.submit(*TINY, *keys, "slurm.cache_jobs=2", "slurm.stages.cache.cpus_per_rank=2", "run.name=grid")
    assert "3 points of standard" in told
    # Whatever is edited now concerns no job that waits.
    for name in ("train", "cache", "evaluate", "analyze"):
        path = desk.checkout / "saepipe" / f"{name}.py"
        path.write_text("raise SystemExit('edited while jobs wait')\n" + path.read_text())
    work = desk.checkout / "launch" / "work.py"
    work.write_text("raise SystemExit('edited while jobs wait')\n" + work.read_text())
    lines = desk.wait("runs/grid", timeout_s=600)
    print(f"tokens, cache on 2 nodes, 3 points on 2 nodes each, evaluation, table: {time.monotonic() - begin:.0f} s")
    assert [line["state"] for line in lines] == ["done"] * 10, lines
    assert [line["step"] for line in of_stage(lines, "train")] == ["300 of 300"] * 3
    run = desk.folder / "runs" / "grid"
    with (run / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["sae.l1_coefficient"] for row in rows) == ["1", "2", "4"]
    assert all(row["state"] == "evaluated" and float(row["l0"]) > 0 for row in rows)
    for row in rows:
        assert (run / row["features"]).exists()
        assert f'href="{row["features"].replace("=", "%3D")}"' in (run / "pareto.html").read_text()
        summary = (run / row["point"] / "summary.json").read_text()
        assert '"ranks": 2' in summary
    starts = [(run / "launch/1/tasks" / f"cache-{index}" / "starts.jsonl").read_text() for index in range(2)]
    assert len({text.split('"nodes": ')[1].split(",")[0] for text in starts}) == 2


def test_a_run_that_is_preempted_ends_with_the_same_bits(cluster: Cluster, desk: Desk, store: Path) -> None:
    keys = [*TINY, f"store.dir={store}", "trainer.num_nodes=2", tokens(6000)]
    desk.submit(*keys, "run.name=whole")
    assert all(line["state"] == "done" for line in desk.wait("runs/whole"))
    desk.submit(*keys, "run.name=parted")
    for _ in range(PREEMPTIONS):
        desk.wait("runs/parted", training)
        preempt(cluster)
    lines = desk.wait("runs/parted", timeout_s=120 * (1 + PREEMPTIONS))
    line = of_stage(lines, "train")[0]
    assert (line["state"], line["restarts"]) == ("done", PREEMPTIONS), line
    assert_same_bits(desk.folder / "runs/whole", desk.folder / "runs/parted")


def test_a_store_whose_caching_is_preempted_ends_with_the_same_bytes(
    cluster: Cluster, desk: Desk, tmp_path: Path
) -> None:
    keys = [*TINY, "store.tokens=400000", "store.shard_tokens=8192", "store.shuffle_tokens=16384", tokens(10)]
    desk.submit(*keys, "run.name=whole", f"store.dir={tmp_path}/whole")
    assert all(line["state"] == "done" for line in desk.wait("runs/whole"))
    desk.submit(*keys, "run.name=parted", f"store.dir={tmp_path}/parted")
    folder = tmp_path / "parted"

    def half(_: Any) -> bool:
        return len(list(folder.glob("blocks*/*.json"))) >= 6

    desk.wait("runs/parted", half)
    preempt(cluster)
    lines = desk.wait("runs/parted")
    assert of_stage(lines, "cache")[0]["restarts"] == 1
    assert all(line["state"] == "done" for line in lines)
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "whole", folder)
    )
    assert first.keys() == second.keys()
    assert [name for name, content in first.items() if second[name] != content and name.name != ".lock"] == []


def test_a_rank_that_is_killed_and_a_node_that_is_lost_requeue(cluster: Cluster, desk: Desk, store: Path) -> None:
    keys = [*TINY, f"store.dir={store}", "trainer.num_nodes=2", tokens(9000), "train.checkpoint_every_steps=200"]
    desk.submit(*keys, "run.name=whole")
    desk.wait("runs/whole")
    desk.submit(*keys, "run.name=killed")
    desk.wait("runs/killed", training)
    run = desk.folder / "runs/killed"
    ranks_of(run)[-1].send_signal(signal.SIGKILL)
    desk.wait("runs/killed", lambda lines: of_stage(lines, "train")[0]["restarts"] == 1)
    desk.wait("runs/killed", training)
    nodes = cluster.job(of_stage(desk.status("runs/killed"), "train")[0]["job"])["NodeList"]
    lost = cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()[-1]
    cluster.kill_node(lost)
    try:
        lines = desk.wait("runs/killed", timeout_s=240)
    finally:
        cluster.start_node(lost)
    line = of_stage(lines, "train")[0]
    assert (line["state"], line["restarts"]) == ("done", 2), lines
    assert_same_bits(desk.folder / "runs/whole", run)


def test_what_is_cancelled_stops_for_good_and_says_so(cluster: Cluster, desk: Desk, store: Path) -> None:
    keys = [*TINY, f"store.dir={store}", tokens(40_000)]
    desk.submit(*keys, "run.name=one")
    desk.submit(*keys, "run.name=two")
    desk.wait("runs/one", training)
    job = of_stage(desk.status("runs/one"), "train")[0]["job"]
    assert cluster.run("scancel", job).returncode == 0
    lines = desk.wait("runs/one")
    states = {line["stage"]: line["state"] for line in lines}
    assert (states["train"], states["evaluate"]) == ("cancelled", "cancelled")
    assert desk.run("launch.cancel", "runs/two").returncode == 0
    assert {line["state"] for line in desk.wait("runs/two")} == {"cancelled"}
    time.sleep(10)  # a requeue would have come by now
    assert {line["stage"]: line["state"] for line in desk.status("runs/one")} == states
    again = desk.run("launch.submit", "slurm=local", *keys, "run.name=one", "slurm.dry_run=true")
    assert "nothing was submitted" in again.stdout, again.stderr


def test_a_run_longer_than_its_time_limit_goes_on_in_further_jobs(desk: Desk, store: Path) -> None:
    keys = [*TINY, f"store.dir={store}", tokens(25_000), "optim.lr_decay_steps=5"]
    desk.submit(*keys, "run.name=long", "slurm.time_min=1", "slurm.signal_delay_s=20")
    lines = desk.wait("runs/long", timeout_s=700)
    line = of_stage(lines, "train")[0]
    assert line["state"] == "done", lines
    assert line["restarts"] >= 1
    print(f"a limit of 1 minute: done after {line['restarts']} requeues")


def test_a_job_that_dies_before_its_first_step_says_why_and_so_do_its_dependents(desk: Desk, store: Path) -> None:
    none = ["slurm=example", "slurm.gres=null", "slurm.partition=none"]
    told = desk.run("launch.submit", *none, *TINY, f"store.dir={store}", tokens(100))
    assert told.returncode == 2
    assert "slurm.partition=none" in told.stderr
    assert "invalid partition" in told.stderr
    desk.submit(*TINY, f"store.dir={store}", tokens(100), "run.name=dead", "slurm.environment.SAEPIPE_BREAK=1",
                "slurm.setup=['echo no such module >&2; exit 3']")  # fmt: skip
    lines = desk.wait("runs/dead")
    states = {line["stage"]: (line["state"], line["why"]) for line in lines}
    assert states["train"] == ("failed", "no such module")
    assert states["evaluate"][0] == "cancelled"
    assert "train" in states["evaluate"][1]


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
