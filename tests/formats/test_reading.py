import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saepipe.errors import UserError
from saepipe.formats import reading


class Trap:
    """Pickled, it is a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cfg.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cfg\.json is damaged, it holds no JSON object; fetch"):
        reading.json_object(path)


def test_values_are_of_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "cfg.json"
    path.write_text(
        json.dumps(
            {"n": 3, "x": 1, "text": "a", "zero": 0, "true": True, "half": 0.5, "huge": 10**400, "nan": math.nan}
        )
    )
    config = reading.json_object(path)
    assert reading.value(config, "n", int, path) == 3
    assert reading.value(config, "x", float, path) == 1
    for key, kind in {
        "zero": int,
        "true": int,
        "half": int,
        "text": float,
        "n": str,
        "none": int,
        "huge": int,
        "nan": float,
    }.items():
        with pytest.raises(UserError, match=rf"cfg\.json has no valid {key}"):
            reading.value(config, key, kind, path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert reading.find(tmp_path, "a") == [tmp_path / "a"]
    with pytest.raises(UserError, match="it has no b; give a folder with a and b"):
        reading.find(tmp_path, "a", "b")


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(5.0)}, path)
    whole = path.read_bytes()
    torch.testing.assert_close(reading.safetensors(path)["a"], torch.arange(5.0))
    for content in (b"", whole[:-1], bytes(len(whole)), pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"w\.safetensors is damaged"):
            reading.safetensors(path)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, made = tmp_path / "ae.pt", tmp_path / "made"
    for write in (lambda: torch.save({"a": Trap(made)}, path), lambda: path.write_bytes(pickle.dumps(Trap(made)))):
        write()
        with pytest.raises(UserError, match=r"could run code; where you trust it, .* as safetensors") as caught:
            reading.pickled(path)
        assert "\n" not in str(caught.value)
        assert not made.exists()


def test_a_pickle_gives_tensors_and_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save({"a": torch.arange(3), "b": {"k": 2, "name": "x"}, "flipped": torch.zeros(3, 2).T}, path)
    found = reading.pickled(path)
    assert found["b"] == {"k": 2, "name": "x"}
    torch.testing.assert_close(found["a"], torch.arange(3))


def test_damaged_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save({"a": torch.arange(3)}, path)
    whole = path.read_bytes()
    for content in (b"", whole[:-50], b"hello", bytes(100), whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"ae\.pt (is damaged|holds more than tensors)"):
            reading.pickled(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match="holds a list, and no tensors by name"):
        reading.pickled(path)


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"a of shape .* with too few values"):
        reading.pickled(tmp_path / "ae.pt")


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, a=np.arange(4, dtype=np.float32), b=np.float16(2))
    found = reading.npz(path)
    torch.testing.assert_close(found["a"], torch.arange(4.0))
    assert (found["b"].dtype, float(found["b"])) == (torch.float16, 2.0)
    whole = path.read_bytes()
    for content in (b"", whole[:-10], whole[:50], b"PK\x03\x04" + bytes(50), b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"params\.npz (is damaged|holds Python objects)"):
            reading.npz(path)
    path.write_bytes(whole.replace(b"\x00\x00\x80?", b"\x00\x00\x80@"))  # a value other than its checksum knows
    with pytest.raises(UserError, match="is damaged"):
        reading.npz(path)


def test_an_npz_of_objects_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, made = tmp_path / "params.npz", tmp_path / "made"
    np.savez(path, a=np.array([Trap(made)], dtype=object))
    with pytest.raises(UserError, match="holds Python objects, so that opening it could run code"):
        reading.npz(path)
    assert not made.exists()


@pytest.mark.parametrize("read", [reading.npz, reading.pickled])
def test_a_zip_bomb_is_refused_before_it_unpacks(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w") as entry:
        for _ in range(80):
            entry.write(bytes(2**20))
    assert path.stat().st_size < 2**18
    with pytest.raises(UserError, match=r"would unpack from 0\.1 MB to 84 MB"):
        read(path)


def test_numbers_that_are_none_are_named() -> None:
    with pytest.raises(UserError, match="b of here holds NaN or infinity; mend it"):
        reading.check_finite({"a": torch.zeros(2), "b": torch.tensor([torch.inf])}, "here", "mend it")


def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="has a as a sparse tensor; save it as a dense one"):
        reading.pickled(tmp_path / "ae.pt")
