"""Whole pipelines on a real SLURM: submitted, divided, refused."""

import csv
import json
import time
from pathlib import Path

import pytest
from login_desk import CLUSTER, FULL, TINY, Desk, of_stage, over, tokens, training
from slurm_cluster import Cluster

pytestmark = pytest.mark.timeout(900)


def test_one_command_makes_a_grid_out_of_text_with_the_code_it_was_submitted_with(desk: Desk) -> None:
    begin = time.monotonic()
    size = ["+experiment=demo", "train.tokens=1000000"] if FULL else [*TINY, "store.tokens=100000", tokens(300)]
    keys = ["sae=standard", "sae.l1_coefficient=1,2,4", "trainer.num_nodes=2", "slurm.cache_jobs=2"]
    told = desk.submit(*size, *keys, "slurm.stages.cache.cpus_per_rank=2", "run.name=grid")
    assert "3 points of standard" in told
    # Whatever is edited now concerns no job that waits.
    for name in ("train", "cache", "evaluate", "analyze"):
        path = desk.checkout / "saepipe" / f"{name}.py"
        path.write_text("raise SystemExit('edited while jobs wait')\n" + path.read_text())
    work = desk.checkout / "launch" / "work.py"
    work.write_text("raise SystemExit('edited while jobs wait')\n" + work.read_text())
    desk.wait("runs/grid", timeout_s=600)
    lines = desk.status("runs/grid")
    print(f"tokens, cache on 2 nodes, 3 points on 2 nodes each, evaluation, table: {time.monotonic() - begin:.0f} s")
    assert [line["state"] for line in lines] == ["done"] * 10, lines
    assert all(done == total for done, total in (line["step"].split(" of ") for line in of_stage(lines, "train")))
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


def test_a_job_that_dies_before_its_first_step_says_why_and_so_do_its_dependents(desk: Desk, store: Path) -> None:
    desk.submit(*TINY, f"store.dir={store}", tokens(100), "run.name=dead", "slurm.environment.SAEPIPE_BREAK=1",
                "slurm.setup=['echo no such module >&2; exit 3']")  # fmt: skip
    lines = desk.wait("runs/dead")
    states = {line["stage"]: (line["state"], line["why"]) for line in lines}
    assert states["train"] == ("failed", "no such module")
    assert states["evaluate"][0] == "cancelled"
    assert "train" in states["evaluate"][1]


def test_a_grid_larger_than_an_array_is_divided_and_keeps_to_its_throttle(
    cluster: Cluster, desk: Desk, store: Path, tmp_path: Path
) -> None:
    keys = [*TINY, f"store.dir={store}", tokens(30), "sae.k=2,4,8,16,32"]
    more = ["slurm.array_parallelism=2", "slurm.exclude=p4", "slurm.mail_user=root", "slurm.mail_type=FAIL"]
    desk.submit(*keys, *more, "run.name=many", "slurm.environment.PLACE=disk", f"slurm.scratch={tmp_path}/$PLACE")
    lines = desk.wait("runs/many")
    assert {line["state"] for line in lines} == {"done"}, lines
    for stage in ("train", "evaluate"):
        jobs = [line["job"] for line in of_stage(lines, stage)]
        assert len({job.split("_")[0] for job in jobs}) == 2, jobs
        assert most_at_once(cluster, jobs) <= 2
    tasks = desk.folder / "runs/many/launch/1/tasks"
    assert not any('"p4"' in path.read_text() for path in tasks.glob("*/starts.jsonl"))
    # Each task reads the copy on its node's disk, which here is the same for all: the first one makes it.
    copied = [line for line in desk.run("launch.logs", "runs/many", "train").stdout.splitlines() if "copying" in line]
    assert len(copied) == 1
    assert copied[0].startswith(f"copying {store} to {tmp_path}/disk/{store.name}-")
    summary = json.loads((desk.folder / "runs/many/sae.k=2/summary.json").read_text())
    assert summary["store"]["dir"] == str(store)


def most_at_once(cluster: Cluster, jobs: list[str]) -> int:
    """How many of some jobs ran at the same time, as the accounting has it."""
    shown = cluster.run("sacct", "-XnP", "--format=JobID,Start,End", "--jobs", ",".join(jobs)).stdout.splitlines()
    times = [line.split("|")[1:] for line in shown]
    assert len(times) == len(jobs), shown
    return max(sum(begin <= moment < end for begin, end in times) for moment, _ in times)


def test_what_the_cluster_refuses_leaves_nothing_in_the_queue(cluster: Cluster, desk: Desk, store: Path) -> None:
    keys = [*CLUSTER, *TINY, f"store.dir={store}", tokens(100)]
    for more, word in (
        ("slurm.partition=none", "invalid partition"),
        ("slurm.account=none", "Invalid account"),
        ("slurm.qos=none", "Invalid qos"),
    ):
        told = desk.run("launch.submit", *keys, more)
        assert told.returncode == 2
        assert more.removeprefix("slurm.") in told.stderr
        assert word in told.stderr
    # Only at the third stage does this one have too many jobs.
    told = desk.run("launch.submit", *keys, "slurm.account=lab", "slurm.qos=few")
    assert told.returncode == 2
    assert "the cluster does not take the stage collect" in told.stderr
    assert "QOSMaxSubmitJobPerUserLimit" in told.stderr
    assert cluster.run("squeue", "--noheader").stdout == ""
    assert over(desk.status("runs/demo"))


def test_a_run_that_finds_fewer_nodes_goes_on_with_them(cluster: Cluster, desk: Desk, store: Path) -> None:
    keys = [*TINY, f"store.dir={store}", "trainer.num_nodes=2", "slurm.min_nodes=1", tokens(1200)]
    desk.submit(*keys, "run.name=fewer")
    desk.wait("runs/fewer", training)
    cluster.drain("p2", "p3", "p4")  # after what they do now
    try:
        cluster.preempt("p1")
        lines = desk.wait("runs/fewer", lambda lines: over(of_stage(lines, "train")))
    finally:
        cluster.resume("p2", "p3", "p4")
    assert of_stage(lines, "train")[0]["state"] == "done", lines
    starts = (desk.folder / "runs/fewer/launch/1/tasks/train-0/starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["nodes"] for start in starts] == ["p[1-2]", "p1"]
    summary = json.loads((desk.folder / "runs/fewer/summary.json").read_text())
    assert summary["steps"] == 1200
