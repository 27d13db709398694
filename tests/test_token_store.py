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
    assert write(tmp_path / "tokens").hash == "1063ce43d1611521c2907a07814780e12472c11ab74a11bf8f40efacd140f444"


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


def test_verify_notices_one_flipped_bit_in_every_file(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    for path in sorted(store.folder.glob("*.*")):
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


@pytest.mark.parametrize("change", [{"files": {}}, {"files": 3}, {"context_size": "4"}, {"special_ids": [None]}])
def test_a_sealed_document_that_is_no_plan_of_tokens(tmp_path: Path, change: dict[str, object]) -> None:
    from saepipe.durable import read_sealed, write_sealed

    path = write(tmp_path / "tokens").folder / "plan.json"
    write_sealed(path, read_sealed(path, cure="") | change)
    with pytest.raises(UserError, match=re.escape(f"{path} does not describe tokens; delete {path.parent}")):
        TokenStore.open(path.parent)
