"""Random damage to a store: every fault has an error that names its file, and no row of a damaged block is trained on.

A fault changes one file, or swaps two of a kind; then the store is opened, verified and streamed, and put right again.
"""

import contextlib
import io
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_store import HOOKS, build, make_tokens

from saepipe.config import StreamConfig
from saepipe.durable import read_sealed, write_sealed
from saepipe.errors import UserError
from saepipe.inspection import inspect
from saepipe.layout import HEADER_BYTES
from saepipe.plan import Plan
from saepipe.store import Store
from saepipe.stream import Stream

SEED = 20_240_607
HOOK, OTHER = HOOKS
DTYPES = ["bfloat16", "int8"]
SIZES = {"hooks": {HOOK: 6}, "tokens": 100}
Files = dict[str, bytes | None]
"""Path in the store -> what it is changed to; None is deleted."""


@pytest.fixture(scope="module", params=DTYPES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return build(tmp_path_factory.mktemp("reference") / "store", dtype=request.param, **SIZES)


@pytest.fixture
def folder(reference: Store, tmp_path: Path) -> Path:
    return shutil.copytree(reference.folder, tmp_path / "store")


# ---- faults


def kind(name: str) -> str:
    """Files of one kind may be swapped."""
    return (
        "tokens"
        if name.startswith("tokens/") and not name.endswith(".json")
        else ("documents" if name.count("/") == 0 or name.startswith("tokens/") else Path(name).suffix)
    )


def flip(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    content = bytearray(files[name])
    content[offset(content, chance)] ^= chance.randrange(1, 256)
    return {name: bytes(content)}


def offset(content: bytearray, chance: random.Random) -> int:
    """Draw a place in a file: as often behind a shard's header, most of so small a file, as anywhere."""
    return chance.randrange(chance.choice([0, numbers(content)]), len(content))


def numbers(content: bytearray) -> int:
    """Return where the numbers of a shard begin: rows, norms, scales; of any other file, where it does."""
    return HEADER_BYTES if len(content) > HEADER_BYTES and content[10:22] == b"__metadata__" else 0


def flip_a_space(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    """Change a byte of white space or padding, where there is one: what a lenient reader would overlook."""
    content = bytearray(files[name])
    blank = [place for place, byte in enumerate(content) if byte in b" \n\0"]
    content[chance.choice(blank or range(len(content)))] = chance.choice(b" \n\t\0")
    return {name: bytes(content)}


def flip_a_bit_in_a_number(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    content = bytearray(files[name])
    content[chance.randrange(numbers(content), len(content))] ^= 1 << chance.randrange(8)
    return {name: bytes(content)}


def cut(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    return {name: files[name][: -chance.randint(1, len(files[name]))]}


def append(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    return {name: files[name] + chance.choice([b"\0", b"\n", chance.randbytes(chance.randrange(1, 5000))])}


def swap(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    other = chance.choice([other for other in files if kind(other) == kind(name)])
    return {name: files[other], other: files[name]}


def delete(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    return {name: None}


def zero(files: dict[str, bytes], name: str, chance: random.Random) -> Files:
    content = bytearray(files[name])
    part = sorted((offset(content, chance), offset(content, chance) + 1))
    start, stop = chance.choice([[0, len(content)], part])
    content[start:stop] = bytes(stop - start)
    return {name: bytes(content)}


FAULTS: list[Callable[[dict[str, bytes], str, random.Random], Files]] = [
    flip, flip_a_space, flip_a_bit_in_a_number, cut, append, swap, delete, zero
]  # fmt: skip


def draw(files: dict[str, bytes], chance: random.Random) -> tuple[str, Files]:
    """Draw a fault that changes something, and its description."""
    while True:
        fault = chance.choice(FAULTS)
        of_a_kind = chance.choice(["tokens", "documents", ".json", *[".safetensors"] * 3])
        name = chance.choice(sorted(name for name in files if kind(name) == of_a_kind))
        changed = {name: content for name, content in fault(files, name, chance).items() if content != files[name]}
        if changed:
            return f"{fault.__name__} {' and '.join(changed)}", changed


def apply(folder: Path, changed: Files) -> None:
    for name, content in changed.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)


# ---- what has to notice them


def epoch(folder: Path, *, max_norm: float | None) -> list[torch.Tensor]:
    config = StreamConfig(hook=HOOK, batch_tokens=16, window_tokens=48, lanes=2, prefetch_batches=0, max_norm=max_norm)
    stream = Stream(Store.open(folder), config, exclude_special_tokens=True)
    batches = stream.iterate()
    try:
        return [rows.clone() for rows in itertools.islice(batches, stream.batches_per_epoch)]
    finally:
        batches.close()


def errors(folder: Path) -> list[str]:
    """Open and verify a store; returns what both say."""
    said = []
    try:
        Store.open(folder)
    except UserError as error:
        said.append(str(error))
    try:
        said += [f"{fault.path} {fault.what}" for fault in inspect(folder).faults]
    except UserError as error:
        said.append(str(error))
    return said


def check(folder: Path, faults: int, seed: int) -> None:
    """Put a store through a number of faults."""
    print(f"{faults} faults from random.Random({seed})")
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each
        _check(folder, faults, seed)


def _check(folder: Path, faults: int, seed: int) -> None:
    chance = random.Random(seed)
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.stat().st_size
    }
    assert {kind(name) for name in files} == {"tokens", "documents", ".json", ".safetensors"}
    filters = (None, 1.5)
    expected = {max_norm: epoch(folder, max_norm=max_norm) for max_norm in filters}
    assert len(expected[None]) > len(expected[1.5]) > 1
    assert errors(folder) == []
    refused = 0
    for number in range(faults):
        what, changed = draw(files, chance)
        where = f"fault {number} of seed {seed}: {what}"
        apply(folder, changed)
        said = errors(folder)
        # A shard and its record are named by either
        named = [str(folder / name).removesuffix(".json").removesuffix(".safetensors") for name in changed]
        named += [f"store.dir={folder}"] if "plan.json" in changed else []
        assert any(name in sentence for name in named for sentence in said), f"{where} is not noticed: {said}"
        max_norm = chance.choice(filters)
        try:
            rows = epoch(folder, max_norm=max_norm)
        except UserError:
            refused += 1
        else:
            assert len(rows) == len(expected[max_norm]), where
            assert all(map(torch.equal, rows, expected[max_norm])), f"{where} reaches a batch"
        apply(folder, {name: files[name] for name in changed})
    assert errors(folder) == []
    assert 0.5 * faults < refused
    assert refused < faults or faults < 75  # some damage what an epoch does not read; of few, chance may draw none


def test_random_faults(folder: Path, reference: Store) -> None:
    check(folder, 75, SEED + DTYPES.index(reference.plan.dtype))


def test_the_faults_reach_every_kind_of_file(reference: Store) -> None:
    files = {
        path.relative_to(reference.folder).as_posix(): path.read_bytes()
        for path in reference.folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    chance = random.Random(SEED)
    drawn = [draw(files, chance)[0] for _ in range(75)]
    assert {what.split()[0] for what in drawn} == {fault.__name__ for fault in FAULTS}
    for part in ("plan.json", "manifest.json", "tokens/plan.json", "tokens/train.", "tokens/heldout.", "heldout/"):
        assert any(part in what for what in drawn), part


# ---- paths that leave the store, in documents with a sound hash


@pytest.mark.parametrize("hook", ["../outside", "/etc", "a/../../outside", "..", "tokens", "a\\..\\b"])
def test_a_plan_whose_hooks_lead_out(folder: Path, hook: str) -> None:
    path = folder / "plan.json"
    document = read_sealed(path, cure="")
    write_sealed(path, document | {"hooks": {hook: 6}, "block_rows": {hook: 16}})
    for function in (Store.open, Plan.load, inspect):
        with pytest.raises(UserError, match=r"model.hooks: .* cannot name a folder of the store"):
            function(folder)


@pytest.mark.parametrize("hook", ["../outside", "/etc"])
def test_a_manifest_whose_hooks_lead_out(folder: Path, hook: str) -> None:
    path = folder / "manifest.json"
    document = read_sealed(path, cure="")
    write_sealed(path, document | {"hooks": {hook: document["hooks"][HOOK]}})
    with pytest.raises(UserError, match=r"manifest.json does not describe this store"):
        Store.open(folder)
    assert [fault.path for fault in inspect(folder).faults] == [path]


@pytest.mark.parametrize("name", ["../outside.ids", "/etc/passwd"])
def test_tokens_whose_files_lead_out(tmp_path: Path, name: str) -> None:
    folder = make_tokens(tmp_path / "tokens").folder
    document = read_sealed(folder / "plan.json", cure="")
    document["files"][name] = document["files"].pop("train.ids")
    write_sealed(folder / "plan.json", document)
    with pytest.raises(UserError, match=r"plan.json does not describe tokens"):
        make_tokens(folder)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("place", ["../outside/000000", "/etc/000000", f"heldout/{HOOK}/000000", f"{HOOK}/000001"])
def test_a_record_of_another_place(folder: Path, place: str, complete: bool) -> None:
    path = folder / HOOK / "000000.json"
    write_sealed(path, read_sealed(path, cure="") | {"place": place})
    if not complete:
        (folder / "manifest.json").unlink()
    store = Store.open(folder, complete=complete)
    with pytest.raises(UserError, match=r"000000.safetensors has a record that belongs to another shard or store"):
        store.read_block(HOOK, 0, 0)
    assert folder / HOOK / "000000.safetensors" in [fault.path for fault in inspect(folder).faults]


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": []},
        {"tensors": {}},
        {"rows": 10**9},
        {"bytes": 4096},
        {"sum": ""},
        {"sum_squares": "not base64"},
        {"sum": "AAAA"},
    ],
)
def test_a_record_of_other_sizes(folder: Path, change: dict[str, object]) -> None:
    path = folder / HOOK / "000000.json"
    write_sealed(path, read_sealed(path, cure="") | change)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"000000.safetensors has a record of another"):
        Store.open(folder, complete=False).read_block(HOOK, 0, 0)


@pytest.mark.parametrize("name", ["safetensors", "json"])
def test_a_shard_behind_a_link_is_read_as_itself_or_not_at_all(folder: Path, tmp_path: Path, name: str) -> None:
    path, expected = folder / HOOK / f"000000.{name}", epoch(folder, max_norm=None)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert all(map(torch.equal, epoch(folder, max_norm=None), expected))
    assert [fault.what for fault in inspect(folder).faults] == ["is a link that leads out of the store"]
    os.truncate(tmp_path / "outside", 20)
    with pytest.raises(UserError, match=r"000000"):
        epoch(folder, max_norm=None)
