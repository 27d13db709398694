"""What is told of tasks, from what the scheduler says and what they left."""

from pathlib import Path

import pytest

from launch import status
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
        ("waiting", "Dependency"),
    ]
    sweep.end("train", 1, Outcome("requeued", "ended by SIGUSR2"))
    assert told(sweep, monkeypatch, **states)[1] == ("requeued", "ended by SIGUSR2")
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
