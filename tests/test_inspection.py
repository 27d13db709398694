"""All that is wrong with a store is told, and nothing that is not."""

import os
import shutil
from pathlib import Path

import pytest
from small_store import HOOKS, build, files, left_behind

from saepipe.durable import read_sealed, write_sealed
from saepipe.errors import UserError
from saepipe.inspection import inspect
from saepipe.store import Store

HOOK, OTHER = HOOKS


@pytest.fixture
def folder(reference: Store, tmp_path: Path) -> Path:
    """A copy of the reference store, to be damaged."""
    return shutil.copytree(reference.folder, tmp_path / "store")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def told(folder: Path) -> dict[str, str]:
    return {fault.path.relative_to(folder).as_posix(): fault.what for fault in inspect(folder).faults}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_sound_store_has_no_fault(tmp_path: Path, dtype: str) -> None:
    build(tmp_path, dtype=dtype)
    before = files(tmp_path)
    found = inspect(tmp_path)
    assert (found.faults, found.unexpected, found.missing) == ([], [], 0)
    assert (found.rows, found.affected_rows) == (2 * (190 + 40), 0)
    assert files(tmp_path) == before


def test_all_faults_are_told_and_the_rows_that_they_cost(folder: Path) -> None:
    flip(folder / HOOK / "000000.safetensors", 5000 - 700)
    os.truncate(folder / HOOK / "000001.safetensors", 100)
    (folder / HOOK / "000002.safetensors").unlink()
    flip(folder / OTHER / "000003.json", 30)
    (folder / OTHER / "000004.json").unlink()
    shutil.copy(folder / OTHER / "000006.json", folder / OTHER / "000005.json")
    flip(folder / "heldout" / HOOK / "000001.safetensors", 4200)
    (folder / "heldout" / OTHER / "000000.json").unlink()
    (folder / "heldout" / OTHER / "000000.safetensors").unlink()
    found = told(folder)
    assert found == {
        f"{HOOK}/000000.safetensors": "does not match the hash in its record",
        f"{HOOK}/000001.safetensors": f"has 100 bytes instead of {4096 + 24 * 16}",
        f"{HOOK}/000002.safetensors": "cannot be read (No such file or directory)",
        f"{OTHER}/000003.json": "is damaged (its content does not match its own hash)",
        f"{OTHER}/000004.safetensors": "has no record",
        f"{OTHER}/000005.safetensors": "has a record that belongs to another shard or store",
        f"heldout/{HOOK}/000001.safetensors": "does not match the hash in its record",
        f"heldout/{OTHER}/000000.safetensors": "cannot be read (No such file or directory)",
    }
    inspection = inspect(folder)
    assert len(inspection.damaged) == 8
    plan = Store.open(folder, complete=False).plan
    shards = [plan.shard_rows(shard) for shard in (0, 1, 2, 3, 4, 5)]
    assert inspection.affected_rows == sum(shards) + 16 + 24


def test_damage_beside_the_shards_is_told(folder: Path) -> None:
    for name in ("manifest.json", "tokens/train.ids", "tokens/heldout.special"):
        flip(folder / name, 3)
    os.truncate(folder / "tokens" / "train.documents", 5)
    flip(folder / HOOK / "000000.safetensors", 0)
    assert set(told(folder)) == {
        "manifest.json",
        "tokens/train.ids",
        "tokens/heldout.special",
        "tokens/train.documents",
        f"{HOOK}/000000.safetensors",
    }
    assert inspect(folder).affected_rows == 460


def test_a_damaged_plan_does_not_hide_damaged_tokens(folder: Path) -> None:
    flip(folder / "plan.json", 3)
    flip(folder / "tokens" / "train.ids", 3)
    found = inspect(folder)
    assert [fault.path.name for fault in found.faults] == ["plan.json", "train.ids"]
    assert (found.plan, found.rows, found.affected_rows) == (None, None, None)


def test_tokens_that_are_gone_or_of_another_store(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "tokens")
    assert told(folder) == {"tokens/plan.json": "is missing or of another version"}
    other = build(tmp_path / "other", tokens=40)
    document = read_sealed(other.folder / "tokens" / "plan.json", cure="")
    shutil.copytree(other.folder / "tokens", folder / "tokens")
    write_sealed(folder / "tokens" / "plan.json", document | {"source": {"data.path": "another.txt"}})
    assert told(folder) == {"tokens/plan.json": "describes other tokens than the store's"}


def test_an_incomplete_store_says_what_is_to_come_in_one_line(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    for shard in (3, 4):
        (folder / HOOK / f"00000{shard}.json").unlink()
    (folder / HOOK / "000004.safetensors").unlink()
    left_behind(folder / HOOK / "000004.safetensors").write_bytes(b"half of it")
    (folder / ".claims").mkdir()
    (folder / ".claims" / "000001").write_text("{}")
    flip(folder / OTHER / "000000.safetensors", 4100)
    assert told(folder) == {
        f"{OTHER}/000000.safetensors": "does not match the hash in its record",
        "manifest.json": "is missing: the store is incomplete (18 of 20 shards are written)",
    }
    assert (inspect(folder).missing, inspect(folder).unexpected) == (2, [])


def test_what_belongs_to_no_store_is_told_and_is_no_fault(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / HOOK / "000099.safetensors").write_bytes(b"")
    (folder / "heldout" / "old").mkdir()
    found = inspect(folder)
    assert found.faults == []
    assert found.unexpected == [folder / "notes.txt", folder / "heldout" / "old", folder / HOOK / "000099.safetensors"]


@pytest.mark.parametrize("name", [f"{HOOK}/000004.safetensors", f"heldout/{OTHER}/000001.json", "tokens/train.ids"])
def test_a_file_behind_a_link_that_leads_out(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert told(folder) == {name: "is a link that leads out of the store"}


@pytest.mark.parametrize("name", [HOOK, "heldout", f"heldout/{HOOK}", "tokens"])
def test_a_folder_behind_a_link(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert told(folder) == {name: "is a link, which no store follows"}


def test_statistics_that_are_not_those_of_the_records(folder: Path) -> None:
    document = read_sealed(folder / "manifest.json", cure="")
    document["hooks"][OTHER]["statistics"]["mean"][2] += 1e-3
    write_sealed(folder / "manifest.json", document)
    assert told(folder) == {"manifest.json": f"has statistics of {OTHER} that are not those of its shards"}


def test_says_where_there_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, words in (
        (tmp_path / "gone", "No such file"),
        (tmp_path / "file", "Not a directory"),
        (tmp_path, "there is no store"),
    ):
        with pytest.raises(UserError, match=words):
            inspect(path)
