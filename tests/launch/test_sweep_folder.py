"""What lies in a submission's folder, whole, half made and damaged."""

from pathlib import Path

import pytest

from launch.sweep_folder import Outcome, Stage, SweepFolder, Task
from saepipe.errors import UserError


def test_the_next_submission_takes_no_number_that_was_begun(tmp_path: Path) -> None:
    assert SweepFolder.next(tmp_path).folder.name == "1"
    SweepFolder.next(tmp_path).write([])
    (tmp_path / "launch" / "2" / "code").mkdir(parents=True)  # one that broke off
    (tmp_path / "launch" / "9x").mkdir()
    assert SweepFolder.next(tmp_path).folder.name == "3"
    assert SweepFolder.newest(tmp_path).folder.name == "1"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    sweep = SweepFolder(tmp_path / "launch" / "1")
    sweep.write([Stage("train", [Task("a", "a")])])
    sweep.begin("train", 0)
    sweep.end("train", 0, Outcome("done"))
    (sweep.folder / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep.json is damaged .*submit the sweep again"):
        _ = sweep.stages
    if text != "{}":
        (sweep.task_folder("train", 0) / "outcome.json").write_text(text)
        with pytest.raises(UserError, match=r"outcome.json is damaged"):
            sweep.outcome("train", 0)
    (sweep.task_folder("train", 0) / "starts.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"starts.jsonl is damaged"):
        sweep.starts("train", 0)
