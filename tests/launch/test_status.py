"""What is told of tasks, from what the scheduler says and what they left."""

from pathlib import Path

import pytest

from launch import cancel, logs, status
from launch.sweep_folder import Outcome, Stage, SweepFolder, Task
from saepipe import entry
from saepipe.errors import UserError


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    made = SweepFolder(tmp_path / "launch" / "1")
    config = entry.load_config("launch", ["+experiment=demo", f"run.dir={tmp_path}"])
    for index in range(2):
        entry.save_config(config, made.config_file("train", index))
    train = Stage("train", [Task("a", str(tmp_path / "a"), "7_0"), Task("b", str(tmp_path / "b"), "7_1")])
    made.write([train, Stage("evaluate", [Task("a", "a", "8_0")], after="train")], executor="slurm")
    return made


def told(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch, **known: tuple[str, str]) -> list[tuple[str, str]]:
    ids = {"first": "7_0", "second": "7_1", "evaluate": "8_0"}
    monkeypatch.setattr("launch.slurm.states", lambda _: {ids[name]: state for name, state in known.items()})
    return [(line.state, line.why) for line in status.status(sweep.run_dir)]


def test_a_job_is_what_the_scheduler_says_until_it_left_a_word(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"first": ("PENDING", "Resources"), "second": ("RUNNING", ""), "evaluate": ("PENDING", "Dependency")}
    sweep.begin("train", 1, nodes="p[1-2]", progress=[0])
    assert told(sweep, monkeypatch, **states) == [
        ("waiting", "Resources"),
        ("running", "on p[1-2]"),
        ("waiting", "for train"),
    ]
    sweep.end("train", 1, Outcome("requeued", "ended by SIGUSR2"))
    assert told(sweep, monkeypatch, **states)[1][0] == "running"  # again, or not yet ended
    assert told(sweep, monkeypatch, **states | {"second": ("SUSPENDED", "")})[1][0] == "running"
    states["second"] = ("PENDING", "BeginTime")
    assert told(sweep, monkeypatch, **states)[1] == ("requeued", "ended by SIGUSR2")
    states["second"] = ("CANCELLED", "")  # while it waited
    assert told(sweep, monkeypatch, **states)[1] == ("cancelled", "it was cancelled")
    sweep.end("train", 1, Outcome("failed", "sae.k=0"))
    assert told(sweep, monkeypatch, **states)[1] == ("failed", "sae.k=0")


def test_what_ended_without_a_word_is_told_by_its_script(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    log = sweep.logs / "train" / "7_0_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("loading\nmodule: not found\n")
    found = told(
        sweep,
        monkeypatch,
        first=("FAILED", ""),
        second=("NODE_FAIL", ""),
        evaluate=("CANCELLED", "DependencyNeverSatisfied"),
    )
    assert found == [
        ("failed", "module: not found"),
        ("failed", "its job ended as NODE_FAIL"),
        ("cancelled", "train did not end well"),
    ]
    assert told(sweep, monkeypatch)[0][0] == "failed"  # forgotten


def test_a_run_shows_its_step_pace_and_time_left(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep.run_dir / "a"
    folder.mkdir()
    (folder / "metrics.csv").write_text(
        "step,details/n_training_samples,details/tokens_per_s,details/seconds_left\n25,76800,50000.4,7200\n50,1536"
    )
    monkeypatch.setattr("launch.slurm.states", lambda _: {"7_0": ("RUNNING", "")})
    line = status.status(sweep.run_dir)[0]
    assert (line.step, line.tokens_per_s, line.left) == ("25 of 1,302", "50,000", "2:00 h")
    text = status.table([line])
    assert "25 of 1,302" in text.splitlines()[1]


def test_a_folder_without_a_submission_says_how_one_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no submitted sweep; python -m launch\.submit"):
        status.status(tmp_path)


def test_what_an_earlier_submission_did_is_told_as_well(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.slurm.states", lambda _: {"9": ("PENDING", "Resources")})
    sweep.begin("train", 0, nodes="p1", progress=[0])
    sweep.end("train", 0, Outcome("done"))
    sweep.end("train", 1, Outcome("failed", "sae.k=0"))
    later = SweepFolder(sweep.run_dir / "launch" / "2")
    later.write([Stage("train", [Task("b", "b", "9")]), Stage("collect", [Task("sweep", "x", "9")])], executor="slurm")
    for name in ("train", "collect"):
        entry.save_config(sweep.config("train", 0), later.config_file(name, 0))
    found = [(line.stage, line.title, line.state) for line in status.status(sweep.run_dir)]
    assert found == [("train", "a", "done"), ("train", "b", "waiting"), ("collect", "sweep", "waiting")]


def test_a_task_is_found_by_its_point_its_stage_or_its_number(sweep: SweepFolder) -> None:
    assert sweep.find("a") == [("train", 0), ("evaluate", 0)]
    assert sweep.find("train") == [("train", 0), ("train", 1)]
    assert sweep.find("train-1") == [("train", 1)]
    assert len(sweep.find(None)) == 3
    assert sweep.find("c") == []
    with pytest.raises(UserError, match=r"train-7.*did you mean train-1"):
        logs.find(sweep.run_dir, "train-7")


def test_logs_are_of_the_submission_that_had_the_task_and_hold_what_its_script_said(sweep: SweepFolder) -> None:
    later = SweepFolder(sweep.run_dir / "launch" / "2")
    later.write([Stage("train", [Task("b", "b", "9")])], executor="slurm")
    script = sweep.logs / "train" / "7_0_0_log.out"
    script.parent.mkdir(parents=True)
    script.write_text("module: command not found")
    assert logs.find(sweep.run_dir, "a")[:2] == [script, sweep.log_file("train", 0)]
    assert logs.find(sweep.run_dir, "train-0") == [later.log_file("train", 0)]


def test_one_task_is_cancelled_by_its_job(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.slurm.states", lambda ids: dict.fromkeys(ids, ("PENDING", "Resources")))
    gone: list[str] = []
    monkeypatch.setattr("launch.slurm.cancel", gone.extend)
    assert cancel.cancel(sweep.run_dir, "train-1") == 1
    assert gone == ["7_1"]
    assert [line.state for line in status.status(sweep.run_dir)] == ["waiting", "cancelled", "waiting"]
    with pytest.raises(UserError, match="task=zzz"):
        cancel.cancel(sweep.run_dir, "zzz")
