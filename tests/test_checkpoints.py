import os
import subprocess
from pathlib import Path

import pytest
import torch

from saepipe import checkpoints
from saepipe.checkpoints import load, newest, newest_common, step_of
from saepipe.errors import UserError


def save(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:09d}.ckpt"
    checkpoints.save({folder: {"step": step, "weights": torch.full((64,), float(step))}}, step)
    return path


def test_the_newest_is_found_and_read_back(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    path = newest(tmp_path)
    assert path is not None
    assert step_of(path) == 100
    assert load(tmp_path, 100)["weights"].tolist() == [100.0] * 64


def test_other_files_in_the_folder_are_let_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-best.ckpt").write_text("mine")
    (tmp_path / "step-000000009.ckpt").symlink_to(tmp_path / "gone")
    found = newest(tmp_path)
    assert found is not None
    assert step_of(found) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is mounted, which only root can")
def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save({disk: {"weights": torch.zeros(100_000)}}, 1)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None


@pytest.mark.parametrize("fault", ["cut", "flipped", "zeros", "no record", "torn record", "no file"])
def test_a_damaged_newest_yields_to_the_one_before_it(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content, record = path.read_bytes(), path.with_suffix(".json")
    match fault:
        case "cut":
            path.write_bytes(content[:-1])
        case "flipped":
            path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        case "zeros":
            path.write_bytes(bytes(len(content)))
        case "no record":
            record.unlink()
        case "torn record":
            record.write_bytes(record.read_bytes()[:10])
        case "no file":
            path.unlink()
    caplog.set_level("WARNING", "saepipe")
    found = newest(tmp_path)
    assert found is not None
    assert step_of(found) == 1


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.ckpt"
    torch.save({"payload": Path}, path)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load(tmp_path, 1)


def test_the_newest_two_are_kept_with_their_records(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000003.ckpt",
        "step-000000003.json",
        "step-000000004.ckpt",
        "step-000000004.json",
    ]


def test_several_folders_go_back_to_what_all_have(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    assert newest_common(folders) is None
    for step in (1, 2):
        checkpoints.save({folder: {"step": step} for folder in folders}, step)
    assert newest_common(folders) == 2
    checkpoints.save({folders[0]: {"step": 3}}, 3)  # killed between the two
    assert newest_common(folders) == 2
    (folders[1] / "step-000000002.ckpt").write_bytes(b"torn")
    assert newest_common(folders) is None  # the first has lost its step 1


def test_a_checkpoint_that_another_machine_does_not_see_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.dir on a disk that all machines share"):
        load(tmp_path, 3)
