import re
from pathlib import Path

import numpy as np
import pytest

from saepipe.errors import UserError
from saepipe.token_store import TokenStore, ordinary
from saepipe.token_writer import TokenStoreWriter


def contexts(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 9, (n, 4), dtype=np.int32)
    return ids, ids // 3, ids < 2


def write(folder: Path) -> TokenStore:
    with TokenStoreWriter(folder, context_size=4, source={"data.path": "a.txt"}) as writer:
        for start in range(0, 10, 3):
            writer.append("train", *(array[start : start + 3] for array in contexts(10)))
        writer.append("heldout", *contexts(2, seed=1))
        assert (writer.contexts("train"), writer.contexts("heldout")) == (10, 2)
        return writer.finish(special_ids=[1, 0])


def write_chat(folder: Path) -> TokenStore:
    """Give every token the role that is its id, at most 3."""
    with TokenStoreWriter(folder, context_size=4, source={}, with_roles=True) as writer:
        for side, n in (("train", 10), ("heldout", 2)):
            arrays = contexts(n)
            writer.append(side, *arrays, np.minimum(arrays[0], 3).astype(np.uint8))
        return writer.finish(special_ids=[0, 1], roles=["template", "user", "system", "assistant"])


def test_gives_back_what_was_appended(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    store = TokenStore.open(tmp_path / "tokens")
    for side, expected in ((store.train, contexts(10)), (store.heldout, contexts(2, seed=1))):
        for array, values in zip((side.ids, side.documents, side.special), expected, strict=True):
            np.testing.assert_array_equal(array, values)
    assert (store.context_size, store.special_ids, store.source) == (4, [0, 1], {"data.path": "a.txt"})
    store.verify()
    assert not store.train.ids.flags.writeable


def test_golden_hash(tmp_path: Path) -> None:
    # A change here makes every store that exists unreadable: raise FORMAT with it
    assert write(tmp_path / "tokens").hash == "63fbcfeac846846f3ad571229ab50f8bf851a697d32b60795fe274e29e3f4c7a"


def test_a_side_may_be_empty(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path, context_size=4, source={}) as writer:
        writer.append("train", *contexts(3))
        store = writer.finish(special_ids=[])
    assert (len(store.train), len(store.heldout)) == (3, 0)
    assert store.heldout.ids.shape == (0, 4)
    store.verify()


def test_ordinary_leaves_out_special_tokens_and_position_0(tmp_path: Path) -> None:
    special = np.array([[False, False, True], [True, False, False]])
    np.testing.assert_array_equal(ordinary(special, np.arange(3)), [[False, True, False], [False, True, True]])
    side = write(tmp_path / "tokens").train
    expected = side.ids >= 2
    expected[:, 0] = False
    np.testing.assert_array_equal(side.ordinary_contexts(2, 9), expected[2:9])
    rows = np.array([39, 0, 5, 17])
    np.testing.assert_array_equal(side.ordinary(rows), expected.reshape(-1)[rows])


def test_names_what_is_not_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "none" / "tokens", tmp_path / "a.txt" / "tokens"):
        (tmp_path / "a.txt").touch()
        with pytest.raises(UserError, match=f"no tokens in {folder}.*saepipe.cache store.dir={folder.parent}"):
            TokenStore.open(folder)


@pytest.mark.parametrize("fault", ["missing", "cut", "longer", "plan", "format"])
def test_opening_names_the_damaged_file(tmp_path: Path, fault: str) -> None:
    store = write(tmp_path / "tokens")
    path, plan = store.folder / "train.documents", store.folder / "plan.json"
    if fault == "missing":
        path.unlink()
    elif fault in ("cut", "longer"):
        path.write_bytes(path.read_bytes()[:-1] if fault == "cut" else path.read_bytes() + b"\0")
    else:
        from saepipe.durable import read_sealed, write_sealed

        document = read_sealed(plan, cure="")
        if fault == "format":
            write_sealed(plan, document | {"format": 1})
        else:
            plan.write_text(plan.read_text().replace("a.txt", "b.txt"))
    messages = {
        "missing": f"{path} is missing; delete {store.folder} and run the same `python -m saepipe.cache`",
        "cut": f"{path} has 159 bytes instead of 160; delete",
        "longer": f"{path} has 161 bytes instead of 160; delete",
        "plan": f"{plan} is damaged",
        "format": "another version of saepipe (format 1, and this one reads 2)",
    }
    with pytest.raises(UserError, match=re.escape(messages[fault])):
        TokenStore.open(store.folder)


@pytest.mark.parametrize("chat", [False, True])
def test_verify_notices_one_flipped_bit_in_every_file(tmp_path: Path, chat: bool) -> None:
    store = write_chat(tmp_path / "chat") if chat else write(tmp_path / "tokens")
    paths = sorted(store.folder.glob("*.*"))
    assert len(paths) == (9 if chat else 7)
    for path in paths:
        if path.name == "plan.json":
            continue
        content = path.read_bytes()
        path.write_bytes(content[:5] + bytes([content[5] ^ 4]) + content[6:])
        with pytest.raises(UserError, match=re.escape(f"{path} does not match its hash; delete {store.folder}")):
            TokenStore.open(store.folder).verify()
        path.write_bytes(content)
    TokenStore.open(store.folder).verify()


def test_verify_names_a_file_that_is_gone(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    (store.folder / "train.special").unlink()
    with pytest.raises(UserError, match=r"train.special cannot be read \(No such file or directory\); delete"):
        store.verify()


@pytest.mark.parametrize(
    "change",
    [{"files": {}}, {"files": 3}, {"context_size": "4"}, {"special_ids": [None]}, {"roles": ["user"]}, {"roles": 3}],
)
def test_a_sealed_document_that_is_no_plan_of_tokens(tmp_path: Path, change: dict[str, object]) -> None:
    from saepipe.durable import read_sealed, write_sealed

    path = write(tmp_path / "tokens").folder / "plan.json"
    write_sealed(path, read_sealed(path, cure="") | change)
    with pytest.raises(UserError, match=re.escape(f"{path} does not describe tokens; delete {path.parent}")):
        TokenStore.open(path.parent)


def test_roles(tmp_path: Path) -> None:
    store = write_chat(tmp_path / "tokens")
    assert store.role_names == ["template", "user", "system", "assistant"]
    for side in (store.train, store.heldout):
        np.testing.assert_array_equal(side.roles, np.minimum(side.ids, 3))
    rows = np.array([39, 0, 5, 17, 5])
    ids = store.train.ids.reshape(-1)[rows]
    np.testing.assert_array_equal(store.train.in_roles(rows, ["assistant"]), ids >= 3)
    np.testing.assert_array_equal(store.train.in_roles(rows, ["user", "template"]), ids < 2)
    assert not store.train.in_roles(rows, []).any()
    with pytest.raises(UserError, match=r"stream.roles=asistant is not known; did you mean assistant"):
        store.train.in_roles(rows, ["user", "asistant"])
    with pytest.raises(UserError, match=r"stream.roles=tool is not known; choose from template, user, system, assist"):
        store.train.in_roles(rows, ["tool"])


def test_without_chat_data_there_are_no_roles(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    assert (store.role_names, store.train.roles) == ([], None)
    assert not list(store.folder.glob("*.roles"))
    with pytest.raises(
        UserError, match=r"stream.roles=\[user,tool\] needs roles, and .* another store.dir with data.chat_"
    ):
        store.train.in_roles(np.array([1]), ["user", "tool"])
