"""Jobs of a real SLURM, preempted, killed, cut short: they always end with the same bytes."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from login_desk import FULL, PREEMPTIONS, TINY, Desk, Lines, assert_same_bits, of_stage, over, tokens, training
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


def trained(lines: Lines) -> bool:
    return over(of_stage(lines, "train"))


def test_a_run_that_is_preempted_killed_and_robbed_of_a_node_ends_with_the_same_bits(
    cluster: Cluster, desk: Desk, store: Path
) -> None:
    keys = [*TINY, f"store.dir={store}", tokens(500 * (3 + PREEMPTIONS)), "train.checkpoint_every_steps=100"]
    alone = desk.run("saepipe.train", *keys, "run.name=whole", "trainer.devices=2")
    assert alone.returncode == 0, alone.stderr
    desk.submit(*keys, "run.name=parted", "trainer.num_nodes=2", "logger=wandb", "logger.offline=true")
    for _ in range(PREEMPTIONS):
        desk.wait("runs/parted", training)
        cluster.preempt()

    def restarted(times: int) -> Callable[[Lines], bool]:
        return lambda lines: of_stage(lines, "train")[0]["restarts"] == times and training(lines)

    # One rank dies; then a node, while the controller is away, which is asked again until it answers.
    run = desk.folder / "runs/parted"
    desk.wait("runs/parted", restarted(PREEMPTIONS))
    ranks_of(run)[-1].send_signal(signal.SIGKILL)
    lines = desk.wait("runs/parted", restarted(PREEMPTIONS + 1))
    nodes = cluster.job(of_stage(lines, "train")[0]["job"])["NodeList"]
    lost = cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()[-1]
    cluster.stop_controller()
    cluster.kill_node(lost)
    time.sleep(2)
    cluster.start_controller()
    try:
        lines = desk.wait("runs/parted", trained)
    finally:
        cluster.start_node(lost)
    line = of_stage(lines, "train")[0]
    assert (line["state"], line["restarts"]) == ("done", PREEMPTIONS + 2), lines
    assert_same_bits(desk.folder / "runs/whole", run)
    # A W&B run per start would part its charts; a second rank would write them twice.
    parts = [path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*")]
    assert (len(parts), len(set(parts))) == (PREEMPTIONS + 3, 1), parts


def test_a_store_whose_caching_is_preempted_ends_with_the_same_bytes(
    cluster: Cluster, desk: Desk, tmp_path: Path
) -> None:
    keys = ["+experiment=demo", "store.tokens=200000", "store.shard_tokens=8192", "store.shuffle_tokens=16384"]
    whole, folder = tmp_path / "whole", tmp_path / "parted"
    alone = desk.run("saepipe.cache", *keys, f"store.dir={whole}")
    assert alone.returncode == 0, alone.stderr
    desk.submit(*keys, f"store.dir={folder}")
    desk.wait("runs/demo", lambda _: len(list(folder.glob("blocks*/*.json"))) >= 3)
    cluster.preempt()
    (line,) = of_stage(desk.wait("runs/demo", lambda lines: over(of_stage(lines, "cache"))), "cache")
    assert (line["state"], line["restarts"]) == ("done", 1)
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (whole, folder)
    )
    assert first.keys() == second.keys()
    assert [name for name, content in first.items() if second[name] != content and name.name != ".lock"] == []


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


@pytest.mark.skipif(not FULL, reason="a limit of a minute takes minutes; PREEMPTIONS=3 has them")
def test_a_run_longer_than_its_time_limit_goes_on_in_further_jobs(desk: Desk, store: Path) -> None:
    steps = 5000 * PREEMPTIONS
    keys = [*TINY, f"store.dir={store}", tokens(steps)]
    desk.submit(*keys, "run.name=long", "slurm.time_min=1", "slurm.signal_delay_s=5")
    lines = desk.wait("runs/long", trained, timeout_s=800)
    line = of_stage(lines, "train")[0]
    assert line["state"] == "done", lines
    assert line["restarts"] >= PREEMPTIONS
    summary = json.loads((desk.folder / "runs/long/summary.json").read_text())
    minutes = 768 * steps / summary["tokens_per_s"] / 60
    print(f"a limit of 1 minute for {minutes:.1f} min of steps: done after {line['restarts']} requeues")
