import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from small_store import left_behind

from saepipe import durable
from saepipe.errors import UserError


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with durable.replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")

    def save(file: BinaryIO) -> None:
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        durable.write(path, save)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_stale_temporary_files_and_only_they_are_removed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    stale = [left_behind(tmp_path / "a.bin"), left_behind(tmp_path / "deep" / "b.json")]
    kept = [tmp_path / name for name in ("a.tmp", ".hidden.tmp", ".lock", "deep/.b.0123.tmp")]
    kept += [durable.temporary(tmp_path / "at_work.bin"), left_behind(tmp_path / "a.bin", host="0123abcd")]
    for path in stale + kept:
        path.write_bytes(b"x")
    assert durable.remove_stale(tmp_path) == 2
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_files_from_another_machine_are_stale_after_an_hour(tmp_path: Path) -> None:
    paths = [left_behind(tmp_path / name, host="0123abcd") for name in ("new.bin", "old.bin")]
    for path in paths:
        path.write_bytes(b"x")
    os.utime(paths[1], (0, paths[1].stat().st_mtime - 4000))
    assert durable.remove_stale(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [paths[0]]


def test_every_changed_byte_of_a_sealed_document_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    document = {"name": "a", "list": [1, 2.5], "nothing": None}
    digest = durable.write_sealed(path, document)
    assert digest == durable.seal(document) == durable.seal(dict(reversed(document.items())))
    content = path.read_bytes()
    changed = [bytes([*content[:i], new, *content[i + 1 :]]) for i in range(len(content)) for new in b"\0 \n\t0\xff"]
    others = (b"", content[:-20], b"\0" * len(content), b"[]", b"{}", b"[" * 100_000, content + b"\n")
    for damaged in (*changed, *others):
        if damaged != content:
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"plan.json is damaged \(its content does not match its own hash"):
                durable.read_sealed(path, cure="do this")


def test_golden_seal() -> None:
    # printf '{"a":"\\u00fc","b":[1,0.05,null]}' | sha256sum
    expected = "8d06dd21bbfcc88c4de70de6796b033564892c65f6a11ba49d60f1cd24451f7c"
    assert durable.seal({"b": [1, 0.05, None], "a": "ü"}) == expected


def test_disk_errors_name_the_key_and_the_cure(tmp_path: Path) -> None:
    for number, words in ((errno.ENOSPC, "no space left.*MB free"), (errno.EROFS, "cannot be written.*Read-only")):
        with (
            pytest.raises(UserError, match=f"store.dir={tmp_path}/gone .*{words}"),
            durable.disk_errors("store.dir", tmp_path / "gone"),
        ):
            raise OSError(number, "Read-only file system", "x")
    with pytest.raises(OSError, match="a fault"), durable.disk_errors("store.dir", tmp_path):
        raise OSError(errno.EIO, "a fault")


def test_a_folder_that_cannot_be_made_is_refused_where_the_kernel_says_that_it_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"out=.*gone cannot be written \(No such file"),
        durable.disk_errors("out", tmp_path / "gone"),
    ):
        (tmp_path / "gone" / "file").touch()
    with pytest.raises(FileNotFoundError), durable.disk_errors("out", tmp_path):  # something else is missing
        (tmp_path / "gone" / "file").touch()


def test_a_document_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.read_sealed(tmp_path / "gone.json", cure="do this")
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be read \(Is a directory\)"):
        durable.read_sealed(tmp_path, cure="do this")


@pytest.mark.parametrize("name", ["EISDIR", "ENAMETOOLONG", "ELOOP", "EINVAL"])
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(UserError, match=f"store.dir={tmp_path} cannot be written"),
        durable.disk_errors("store.dir", tmp_path),
    ):
        raise OSError(getattr(errno, name), "why", "x")


def test_tells_whether_a_document_has_the_expected_structure() -> None:
    kind = {"n": int, "names": list[str], "widths": dict[str, int], "other": dict[str, Any], "nested": {"a": float}}
    good = {"n": 1, "names": ["a"], "widths": {"x": 2}, "other": {"y": None}, "nested": {"a": 0.5}}
    assert durable.fits(good, kind)
    for changes in (
        {"n": True},
        {"n": "1"},
        {"names": "a"},
        {"names": [1]},
        {"names": {"a": "b"}},
        {"widths": 5},
        {"widths": {"x": None}},
        {"other": []},
        {"nested": {}},
        {"nested": {"a": 0.5, "b": 1}},
        {"nested": None},
        {"more": 1},
    ):
        assert not durable.fits(good | changes, kind), changes
    assert not durable.fits([], kind)
