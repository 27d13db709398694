"""The file tool: what it prints, and with which exit code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_store import HOOKS, files
from test_inspection import flip

from saepipe import shards
from saepipe.claims import Claims
from saepipe.errors import UserError
from saepipe.store import Store

ROOT = Path(__file__).parents[1]
HOOK, OTHER = HOOKS


@pytest.fixture
def folder(reference: Store, tmp_path: Path) -> Path:
    return shutil.copytree(reference.folder, tmp_path / "store")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command; returns its exit code and what it wrote to both outputs."""
    with pytest.raises(SystemExit) as end:
        shards.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


# ---- info


def test_info_of_a_complete_store(folder: Path) -> None:
    store = Store.open(folder)
    found = shards.info(folder)
    assert found["identity"] == store.plan.identity
    assert (found["state"], found["complete"]) == ("complete", True)
    assert (found["shards_there"], found["shards"]) == (20, 20)
    on_disk = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert found["bytes"] == found["bytes_there"] == on_disk
    assert sum(hook["bytes"] for hook in found["hooks"].values()) == on_disk
    assert found["hooks"][HOOK]["width"] == 6
    assert found["hooks"][HOOK]["mean_norm"] == store.statistics(HOOK).mean_norm
    assert found["hooks"][HOOK]["rows_counted"] == store.statistics(HOOK).rows
    assert found["shuffle"]["companions"] == store.manifest.companions
    assert (found["rows"], found["held_out_rows"], found["dtype"]) == (190, 40, "bfloat16")
    assert (found["model"], found["data"]["path"]) == ({"name": "small"}, "small.txt")


def test_info_of_a_store_that_is_being_made(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / HOOK / "000003.json").unlink()
    os.truncate(folder / OTHER / "000003.safetensors", 4000)
    with Claims(folder / ".claims") as claims:
        claims.take("000001")
        before = files(folder)
        found = shards.info(folder)
        assert files(folder) == before
    assert (found["state"], found["shards_there"]) == ("incomplete", 18)
    assert found["hooks"][HOOK]["mean_norm"] is None
    (worker,) = found["workers"]
    assert (worker["process"], worker["what"]) == (os.getpid(), "000001")


def test_info_of_a_damaged_store_reads_no_shard_and_no_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "tokens")
    (folder / HOOK / "000003.safetensors").unlink()
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert shards.info(folder)["state"] == "damaged: 1 of 20 shards are missing or cut"
    flip(folder / "manifest.json", 9)
    code, out, _ = run(capsys, "info", folder)
    assert code == 0
    assert "damaged: manifest.json is damaged" in out


def test_info_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", folder)
    assert code == 0
    assert re.search(r"^state +complete \(20 of 20 shards, [\d.]+ kB of [\d.]+ kB\)$", out, re.MULTILINE)
    assert re.search(r"^workers +nobody$", out, re.MULTILINE)
    lines = out.splitlines()
    assert lines[-3].split()[:3] == ["hook", "width", "dtype"]
    assert lines[-2].split()[:6] == [HOOK, "6", "bfloat16", "190", "40", "8+2"]
    assert len({len(line) for line in lines[-3:]}) == 1
    code, out, _ = run(capsys, "info", folder, "--json")
    assert (code, json.loads(out)) == (0, shards.info(folder))


# ---- verify


def test_verify_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", folder)
    assert (code, out) == (0, f"{folder} is sound and complete: all 460 rows are as they were written\n")
    (folder / "notes.txt").write_text("mine")
    flip(folder / HOOK / "000000.safetensors", 4200)
    (folder / OTHER / "000001.json").unlink()
    code, out, _ = run(capsys, "verify", folder)
    assert code == 1
    assert out.splitlines() == [
        f"{folder / HOOK / '000000.safetensors'}: does not match the hash in its record",
        f"{folder / OTHER / '000001.safetensors'}: has no record",
        f"{folder / 'notes.txt'}: belongs to no store (left alone)",
        f"{folder} has 2 faults, and 48 of 460 rows are affected; `python -m saepipe.shards repair {folder}` writes "
        "them again, or says what it needs",
    ]
    code, out, _ = run(capsys, "verify", folder, "--json")
    found = json.loads(out)
    assert (code, found["sound"], found["affected_rows"], found["rows"]) == (1, False, 48, 460)
    assert found["faults"][0] == {
        "path": str(folder / HOOK / "000000.safetensors"),
        "what": "does not match the hash in its record",
    }
    assert found["unexpected"] == [str(folder / "notes.txt")]


def test_verify_of_a_damaged_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / "plan.json", 9)
    code, out, _ = run(capsys, "verify", folder)
    assert code == 1
    assert out.startswith(f"{folder / 'plan.json'}: is damaged")
    assert "nobody can tell how many rows are affected" in out


# ---- users' errors


@pytest.mark.parametrize("command", ["info", "verify", "repair"])
def test_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        code, out, err = run(capsys, command, path)
        assert (code, out) == (2, "")
        assert err.startswith("saepipe: ")
        assert str(path) in err
        assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [[], ["mend", "x"], ["info"], ["info", "x", "--device", "cpu"]])
def test_arguments_that_do_not_fit(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "usage" in err


def test_a_store_of_another_version(folder: Path) -> None:
    from saepipe.durable import read_sealed, write_sealed

    write_sealed(folder / "plan.json", read_sealed(folder / "plan.json", cure="") | {"format": 1})
    for function in (shards.info, shards.verify, shards.repair):
        with pytest.raises(UserError, match="was written by another version of saepipe"):
            function(folder)


def test_repair_needs_the_language_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "repair", folder)
    assert (code, out) == (0, f"{folder} is sound and complete: nothing to repair\n")
    (folder / HOOK / "000000.json").unlink()
    before = files(folder)
    code, out, err = run(capsys, "repair", folder, "--model", folder / "gone")
    assert code == 2
    assert f"saepipe: model.name={folder / 'gone'} does not exist" in err
    assert files(folder) == before


def test_command_line(folder: Path) -> None:
    command = [sys.executable, "-m", "saepipe.shards"]
    flip(folder / HOOK / "000000.safetensors", 4200)
    done = subprocess.run([*command, "verify", str(folder), "--json"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["affected_rows"]) == (1, 24)
    assert "verify" in done.stderr  # the progress bar
    done = subprocess.run([*command, "info", str(folder / "gone")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("saepipe: there is no store in")
