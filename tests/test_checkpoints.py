import os
import subprocess
from pathlib import Path

import pytest
import torch

from saepipe.checkpoints import AtomicCheckpointIO, newest, step_of


def save(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:09d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((64,), float(step))}, path)
    return path


def test_the_newest_is_found_and_read_back(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    path = newest(tmp_path)
    assert path is not None
    assert step_of(path) == 100
    assert AtomicCheckpointIO().load_checkpoint(path)["weights"].tolist() == [100.0] * 64


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
        path = disk / "step-000000001.ckpt"
        with pytest.raises(OSError, match="No space left"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
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
        AtomicCheckpointIO().load_checkpoint(path)


def test_removing_takes_the_record_too(tmp_path: Path) -> None:
    AtomicCheckpointIO().remove_checkpoint(save(tmp_path, 1))
    assert not list(tmp_path.iterdir())
