"""A repaired store has the bytes that it had, and what cannot be repaired stays as it is."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_store import files
from test_cache import HOOKS, configured
from test_inspection import flip

from saepipe.cache import cache
from saepipe.claims import Claims
from saepipe.errors import UserError
from saepipe.inspection import inspect
from saepipe.repair import repair
from saepipe.store import Store

pytestmark = pytest.mark.usefixtures("short_timing")
HOOK, OTHER = HOOKS
SHARD = f"{HOOK}/000003.safetensors"


@pytest.fixture(scope="module", params=["float32", "int8"])
def finished(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "store"
    cache(configured(inputs, folder, dtype=request.param))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "store")


def damage(folder: Path) -> None:
    """Damage two groups, held-out rows, a record, and the manifest."""
    flip(folder / SHARD, 4096 + 9)
    os.truncate(folder / OTHER / "000009.safetensors", 5000)
    (folder / OTHER / "000000.json").unlink()
    flip(folder / HOOK / "000005.json", 40)
    flip(folder / "heldout" / HOOK / "000000.safetensors", 20)
    flip(folder / "manifest.json", 40)


def test_gives_back_the_bytes(folder: Path, finished: Path) -> None:
    damage(folder)
    done = repair(folder)
    assert (done["faults"], done["deleted_shards"]) == (6, 5)
    assert done["captured_tokens"] > 2000
    assert files(folder) == files(finished)
    assert inspect(folder).faults == []
    Store.open(folder)


def test_finishes_an_incomplete_store(folder: Path, finished: Path) -> None:
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / OTHER)
    (folder / HOOK / "000001.json").unlink()
    flip(folder / SHARD, 4096)
    assert repair(folder)["deleted_shards"] == 1
    assert files(folder) == files(finished)


def test_a_sound_store_stays_as_it_is(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert repair(folder)["faults"] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("fault", ["deleted", "damaged"])
def test_a_manifest_needs_no_language_model(
    folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = folder / "manifest.json"
    path.unlink() if fault == "deleted" else flip(path, 5)
    monkeypatch.setattr("saepipe.repair._model", None)
    assert repair(folder)["captured_tokens"] == 0
    assert files(folder) == files(finished)


def test_links_become_files(folder: Path, finished: Path, tmp_path: Path) -> None:
    (folder / SHARD).rename(tmp_path / "elsewhere")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere")
    kept = (tmp_path / "elsewhere").read_bytes()
    repair(folder)
    assert not (folder / SHARD).is_symlink()
    assert files(folder) == files(finished)
    assert (tmp_path / "elsewhere").read_bytes() == kept


def test_many_at_once(folder: Path, finished: Path) -> None:
    damage(folder)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            repair(folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files(folder) == files(finished)


def test_a_shard_that_another_process_is_writing_is_no_damage(folder: Path, finished: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(bytes(len(content)))
    plan = Store.open(folder, complete=False).plan
    kept = (folder / HOOK / "000003.json").stat().st_mtime_ns
    with Claims(folder / ".claims") as claims:
        assert claims.take(f"{plan.shard_group(3):06d}")
        thread = threading.Thread(target=repair, args=(folder,))
        thread.start()
        thread.join(4)
        assert thread.is_alive()  # waits for whoever has the group
        (folder / SHARD).write_bytes(content)
    thread.join()
    assert (folder / HOOK / "000003.json").stat().st_mtime_ns == kept
    assert files(folder) == files(finished)


# ---- what it refuses, with nothing deleted


def refused(folder: Path, words: str, **options: object) -> None:
    before = files(folder)
    with pytest.raises(UserError, match=words):
        repair(folder, **options)  # type: ignore[arg-type]
    assert files(folder) == before


def test_damaged_tokens(folder: Path, inputs: Path, finished: Path) -> None:
    flip(folder / SHARD, 4096)
    flip(folder / "tokens" / "train.ids", 8)
    refused(folder, rf"train.ids does not match its hash; delete {folder / 'tokens'} and run the same `python -m saepi")
    shutil.rmtree(folder / "tokens")
    refused(folder, r"is missing or of another version; delete .*, then repair")
    cache(configured(inputs, folder, dtype=Store.open(finished).plan.dtype))
    repair(folder)
    assert files(folder) == files(finished)


def test_damaged_plan(folder: Path) -> None:
    flip(folder / SHARD, 4096)
    flip(folder / "plan.json", 8)
    refused(folder, r"plan.json is damaged, and nothing else says what the store holds; put this file back")


def test_a_folder_behind_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / OTHER).rename(tmp_path / "elsewhere")
    (folder / OTHER).symlink_to(tmp_path / "elsewhere")
    flip(folder / SHARD, 4096)
    refused(folder, r"is a link, which no store follows; put there what it leads to")


@pytest.fixture
def model(inputs: Path) -> Iterator[Path]:
    """The store's language model, to be damaged."""
    kept = shutil.copytree(inputs / "model", inputs / "kept")
    yield inputs / "model"
    shutil.rmtree(inputs / "model", ignore_errors=True)
    kept.rename(inputs / "model")


def test_a_language_model_that_is_gone_or_has_moved(folder: Path, finished: Path, model: Path, tmp_path: Path) -> None:
    flip(folder / SHARD, 4096)
    model.rename(tmp_path / "moved")
    refused(folder, rf"model.name={model} does not exist")
    repair(folder, model=str(tmp_path / "moved"))
    assert files(folder) == files(finished)


def test_a_language_model_of_other_weights(folder: Path, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    flip(folder / SHARD, 4096)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(folder, rf"is not the language model that {folder} was made with: weights is \w+ there and \w+ here; put")
    refused(folder, r"is not the language model", model=str(model))


def test_weights_that_cannot_be_loaded(folder: Path, model: Path) -> None:
    flip(folder / SHARD, 4096)
    os.truncate(model / "model.safetensors", 5)
    refused(folder, r"model.name=.* has damaged weights")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_here(folder: Path) -> None:
    flip(folder / SHARD, 4096)
    refused(folder, r"model.device=cuda is not on this machine", device="cuda")


def test_another_kind_of_device(folder: Path) -> None:
    from saepipe.durable import read_sealed, write_sealed

    document = read_sealed(folder / "plan.json", cure="")
    write_sealed(folder / "plan.json", document | {"device_kind": "cuda", "threads": 0})
    refused(folder, r"was computed on cuda, and --device=cpu is cpu here, which gives other bytes", device="cpu")
