"""Jobs of a real SLURM, preempted, killed, cut short: they always end with the same bytes."""

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from login_desk import PREEMPTIONS, TINY, Desk, assert_same_bits, of_stage, tokens, training
from slurm_cluster import Cluster

pytestmark = pytest.mark.timeout(900)


def ranks_of(run: Path) -> list[psutil.Process]:
    """The processes of this machine that train a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "launch.work" in words and str(run) in " ".join(words) and "srun" not in Path(words[0]).name:
            found.append(process)
    return found


def test_a_run_that_is_preempted_ends_with_the_same_bits(cluster: Cluster, desk: Desk, store: Path) -> None:
    keys = [*TINY, f"store.dir={store}", "trainer.num_nodes=2", tokens(800 * (1 + PREEMPTIONS))]
    desk.submit(*keys, "run.name=whole")
    assert all(line["state"] == "done" for line in desk.wait("runs/whole"))
    desk.submit(*keys, "run.name=parted")
    for _ in range(PREEMPTIONS):
        desk.wait("runs/parted", training)
        cluster.preempt()
    # A controller that restarts meanwhile is asked again until it answers.
    desk.wait("runs/parted", training)
    cluster.stop_controller()
    time.sleep(3)
    cluster.start_controller()
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
    cluster.preempt()
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
    keys = [*TINY, f"store.dir={store}", "trainer.num_nodes=2", tokens(2000), "train.checkpoint_every_steps=100"]
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
    keys = [*TINY, f"store.dir={store}", tokens(6000 * (1 + PREEMPTIONS))]
    desk.submit(*keys, "run.name=long", "slurm.time_min=1", "slurm.signal_delay_s=20")
    lines = desk.wait("runs/long", timeout_s=700)
    line = of_stage(lines, "train")[0]
    assert line["state"] == "done", lines
    assert line["restarts"] >= 1
    print(f"a limit of 1 minute: done after {line['restarts']} requeues")
