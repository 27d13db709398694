"""A token store is written whole or gone on with: what an earlier writer left is used only where it is sound."""

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_store import files

from saepipe.durable import read_sealed, write_sealed
from saepipe.errors import UserError
from saepipe.token_store import TokenStore
from saepipe.token_writer import TokenStoreWriter

SOURCE = {"data.path": "a.txt", "store.seed": 3}


def contexts(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 9, (20, 4), dtype=np.int32)[start:stop]
    return ids, ids // 3, ids < 2


def fill(writer: TokenStoreWriter, start: int, stop: int) -> None:
    for at in range(start, stop):
        writer.append("heldout" if at % 5 == 4 else "train", *contexts(at, at + 1))


def opened(folder: Path, source: dict[str, object] = SOURCE, **more: object) -> TokenStoreWriter:
    return TokenStoreWriter(folder, context_size=4, source=source, **more)


def finished(folder: Path, source: dict[str, object] = SOURCE) -> TokenStore:
    with opened(folder, source) as writer:
        fill(writer, writer.state or 0, 20)
        return writer.finish(special_ids=[0, 1])


class PowerCutError(Exception):
    pass


def interrupted(folder: Path) -> None:
    """Save after 7 contexts, and end after 9."""

    def go() -> None:
        with opened(folder) as writer:
            fill(writer, 0, 7)
            writer.save(7)
            fill(writer, 7, 9)
            raise PowerCutError

    with pytest.raises(PowerCutError):
        go()


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    return files(finished(tmp_path / "undisturbed").folder)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a writer leaves that saved and did not finish."""
    interrupted(tmp_path / "left")
    return tmp_path / "left"


def test_goes_on_to_the_same_bytes(left: Path, undisturbed: dict[str, bytes]) -> None:
    with opened(left) as writer:
        assert (writer.state, writer.contexts("train"), writer.contexts("heldout")) == (7, 6, 1)
        fill(writer, 7, 12)
        writer.save(12)
    assert not (left / "plan.json").exists()
    with opened(left) as writer:
        assert (writer.state, writer.contexts("train"), writer.contexts("heldout")) == (12, 10, 2)
    store = finished(left)
    assert files(left) == undisturbed
    store.verify()


def test_leaves_nothing_where_nothing_was_saved(tmp_path: Path) -> None:
    def write_some() -> None:
        with opened(tmp_path) as writer:
            fill(writer, 0, 3)
            assert list(tmp_path.iterdir())
            raise RuntimeError("no more text")

    with pytest.raises(RuntimeError, match="no more text"):
        write_some()
    assert not list(tmp_path.iterdir())


def test_leaves_nothing_where_it_is_told_so(left: Path) -> None:
    with opened(left) as writer:
        writer.forget()
    assert not list(left.iterdir())


def test_refuses_to_write_over_another(tmp_path: Path) -> None:
    store = finished(tmp_path / "tokens")
    before = files(store.folder)
    with pytest.raises(UserError, match="holds a token store already"):
        opened(store.folder)
    assert files(store.folder) == before


@pytest.mark.parametrize("name", ["train.ids", "heldout.documents", "train.special"])
@pytest.mark.parametrize("fault", ["cut", "zero tail", "flipped bit", "missing", "empty"])
def test_a_damaged_file_means_to_begin_anew(
    left: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture, name: str, fault: str
) -> None:
    path = left / "partial" / name
    size = read_sealed(left / "partial" / "progress.json", cure="")["files"][name]["bytes"]
    whole = path.read_bytes()[:size]
    content = {
        "cut": whole[:-1],
        "zero tail": whole[:3] + bytes(size - 3),
        "flipped bit": bytes([whole[0] ^ 1]) + whole[1:],
        "empty": b"",
    }
    path.unlink() if fault == "missing" else path.write_bytes(content[fault])
    finished(left)
    assert re.search(f"{path} is (damaged|missing), so tokenising starts over", caplog.text)
    assert len(caplog.records) == 1
    assert files(left) == undisturbed


@pytest.mark.parametrize("tail", [b"", b"\0" * 1000, b"half a row"])
def test_what_follows_the_saved_part_does_not_matter(left: Path, undisturbed: dict[str, bytes], tail: bytes) -> None:
    for name, saved in read_sealed(left / "partial" / "progress.json", cure="")["files"].items():
        path = left / "partial" / name
        path.write_bytes(path.read_bytes()[: saved["bytes"]] + tail)
    with opened(left) as writer:
        assert writer.state == 7
    finished(left)
    assert files(left) == undisturbed


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "progress.json is damaged"),
        ("zeros", "progress.json is damaged"),
        ("format", "progress.json is of another version of saepipe"),
        ("structure", "progress.json is of another version of saepipe"),
    ],
)
def test_a_damaged_or_foreign_record_means_to_begin_anew(
    left: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture, fault: str, words: str
) -> None:
    path = left / "partial" / "progress.json"
    record, content = read_sealed(path, cure=""), path.read_bytes()
    if fault in ("cut", "zeros"):
        path.write_bytes(content[:-20] if fault == "cut" else bytes(len(content)))
    else:
        write_sealed(path, record | ({"format": 1} if fault == "format" else {"files": {}}))
    finished(left)
    assert words in caplog.text
    assert files(left) == undisturbed


def test_without_its_record_nothing_is_gone_on_with(left: Path, undisturbed: dict[str, bytes]) -> None:
    (left / "partial" / "progress.json").unlink()
    finished(left)
    assert files(left) == undisturbed


def test_what_another_configuration_left_is_thrown_away(left: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = SOURCE | {"store.seed": 4}
    with opened(left, other) as writer:
        assert writer.state is None
        assert (
            "what an earlier run left is of another plan (store.seed differs), so tokenising starts over" in caplog.text
        )
        fill(writer, 0, 20)
        assert writer.finish(special_ids=[]).source == other


def test_data_that_changed_meanwhile(left: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(left, revision="c0ffee") as writer:
        assert writer.state is None
        writer.save(1)
    assert "the data has changed since an earlier run, so tokenising starts over" in caplog.text
    with opened(left, revision="c0ffee") as writer:
        assert writer.state == 1


@pytest.mark.parametrize("named", range(7))
def test_killed_while_the_files_get_their_final_names(
    left: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture, named: int
) -> None:
    """All the work of hours is done by then."""
    shutil.rmtree(left)
    with opened(left) as writer:
        fill(writer, 0, 20)
        writer.save(20)
    for path in sorted((left / "partial").glob("*.*[!n]"))[:named]:
        path.rename(left / path.name)
    caplog.set_level(logging.WARNING)
    with opened(left) as writer:
        assert writer.state == 20
        writer.finish(special_ids=[0, 1])
    assert not caplog.records
    assert files(left) == undisturbed
