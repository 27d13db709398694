import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import CONTEXT_SIZE, HOOKS, activations, build, files, left_behind, make_plan, make_tokens, row_numbers

from saepipe.durable import read_sealed, write_sealed
from saepipe.errors import UserError
from saepipe.groups import GroupWriter
from saepipe.store import Store

ROOT = Path(__file__).parents[1]
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def folder(reference: Store, tmp_path: Path) -> Path:
    """A copy of the reference store, to be damaged."""
    return shutil.copytree(reference.folder, tmp_path / "store")


def read_all(store: Store, hook: str) -> torch.Tensor:
    plan = store.plan
    return torch.cat(
        [
            store.read_block(hook, shard, block)
            for shard in range(plan.n_shards)
            for block in range(plan.n_blocks(hook, shard))
        ]
    )


# ---- what it holds


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_every_row_is_where_the_plan_says(tmp_path: Path, hook: str, dtype: str) -> None:
    build(tmp_path, dtype=dtype)
    store = Store.open(tmp_path)
    rows = read_all(store, hook)
    assert rows.shape == (store.rows, store.width(hook)) == (190, HOOKS[hook])
    numbers = np.concatenate([store.plan.row_tokens(shard) for shard in range(store.plan.n_shards)])
    np.testing.assert_array_equal(row_numbers(rows), numbers)
    everything = activations(np.arange(24), HOOKS[hook]).reshape(-1, HOOKS[hook])
    assert torch.equal(rows, everything[torch.from_numpy(numbers)].to(rows.dtype))


def test_held_out_rows_are_in_natural_order(reference: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(reference.folder)
    monkeypatch.setattr("saepipe.store._HELD_OUT_CHUNK", 16)
    parts = list(store.held_out(HOOK))
    assert [len(rows) for rows, _ in parts] == [16, 8, 16]
    np.testing.assert_array_equal(row_numbers(torch.cat([rows for rows, _ in parts])), np.arange(40))
    ordinary = np.concatenate([mask for _, mask in parts])
    np.testing.assert_array_equal(ordinary, store.tokens.heldout.ordinary_contexts(0, 5).reshape(-1))
    assert 0 < ordinary.sum() < 35


def test_statistics_are_of_the_ordinary_rows(reference: Store) -> None:
    store = Store.open(reference.folder)
    mask = np.concatenate([store.ordinary(shard) for shard in range(store.plan.n_shards)])
    expected = read_all(store, HOOK)[torch.from_numpy(mask)].double()
    statistics = store.statistics(HOOK)
    assert statistics.rows == len(expected)
    torch.testing.assert_close(statistics.mean, expected.mean(0).float())
    torch.testing.assert_close(statistics.spread, expected.std(0, correction=0).float())
    mean_norm = expected.norm(dim=1).mean().item()
    assert statistics.mean_norm == pytest.approx(mean_norm, rel=1e-6)
    assert statistics.norm_scale == pytest.approx(6**0.5 / mean_norm, rel=1e-6)


def test_names_the_hooks_it_has(reference: Store) -> None:
    with pytest.raises(UserError, match=r"stream.hook=blocks.9.hook_resid_post is not known; did you mean blocks."):
        reference.width("blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=re.escape(f"the hooks of store.dir={reference.folder}")):
        reference.statistics("nothing like it")


def test_data_without_held_out_documents(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens", heldout=0)
    assert make_plan(tokens).n_held_out_shards == 0
    store = build(tmp_path)
    assert list(Store.open(tmp_path).held_out(HOOK)) == []
    assert not (store.folder / "heldout").exists()


def test_refuses_hooks_without_a_row_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "small_store.activations", lambda contexts, width: torch.zeros(len(contexts), CONTEXT_SIZE, width)
    )
    with pytest.raises(UserError, match=rf"model.hooks: {HOOK} has no ordinary row .* that is not zero"):
        build(tmp_path)


# ---- going on, and refusing to


def test_a_second_run_changes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    store = build(folder)
    assert store.missing_groups() == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert store.statistics(HOOK).rows


def test_an_incomplete_store_says_how_far_it_is(folder: Path, reference: Store) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"is incomplete \(20 of 20 shards are written, but not verified\); run the same"
    ):
        Store.open(folder)
    (folder / HOOK / "000003.json").unlink()
    (folder / "heldout" / HOOK / "000001.safetensors").unlink()
    (folder / HOOK / "000004.json").write_text("{}")
    os.truncate(folder / HOOK / "000005.safetensors", 5000)
    with pytest.raises(UserError, match=rf"store.dir={folder} is incomplete \(16 of 20 shards are written\)"):
        Store.open(folder)
    store = Store.open(folder, complete=False)
    assert (store.complete, store.missing_groups()) == (False, [None, 1])
    with pytest.raises(UserError, match="16 of 20"):
        store.finalise()
    writer = GroupWriter(store, 1)
    assert writer.hooks == [HOOK]
    build(folder)
    assert files(folder) == files(reference.folder)


def test_writing_a_shard_makes_the_store_incomplete_until_it_is_verified(folder: Path, reference: Store) -> None:
    store = Store.open(folder)
    rows = torch.cat([store.read_block(HOOK, 2, block) for block in (0, 1)])
    store.write(HOOK, 2, rows)
    assert store.complete  # nothing has changed
    store.write(HOOK, 2, rows + 1)
    store.write(HOOK, 2, rows)
    assert not store.complete
    with pytest.raises(UserError, match="but not verified"):
        store.statistics(HOOK)
    store.finalise()
    assert files(folder) == files(reference.folder)


def test_refuses_a_folder_of_another_plan(folder: Path) -> None:
    before = files(folder)
    with pytest.raises(
        UserError, match=rf"store.dir={folder} belongs to another plan: store.dtype is bfloat16 there and"
    ):
        build(folder, dtype="float32")
    assert files(folder) == before


def test_refuses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UserError, match=rf"store.dir={tmp_path} is not empty and holds no store \(it has thesis.txt\)"):
        build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "chapter 1"


@pytest.mark.parametrize("name", [HOOK, "heldout", f"heldout/{HOOK}", "tokens"])
def test_refuses_links_out_of_the_store(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        Store.open(folder)


def test_opens_through_a_link_to_the_whole_store(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert len(read_all(Store.open(tmp_path / "link"), HOOK)) == 190


def test_says_where_there_is_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=f"there is no store in store.dir={path}; make one with `python -m saepipe"):
            Store.open(path)


# ---- faults


@pytest.mark.parametrize("name", [f"{HOOK}/000004.safetensors", f"heldout/{HOOK}/000001.safetensors"])
@pytest.mark.parametrize("fault", ["deleted", "cut"])
def test_opening_misses_a_shard(folder: Path, name: str, fault: str) -> None:
    (folder / name).unlink() if fault == "deleted" else os.truncate(folder / name, 4200)
    words = "cannot be read (No such file" if fault == "deleted" else "has 4200 bytes instead of"
    with pytest.raises(UserError, match=re.escape(f"{folder / name} {words}")):
        Store.open(folder)


def test_reading_notices_damage_and_the_cure_works(folder: Path, reference: Store) -> None:
    shard, record = (folder / HOOK / f"000004.{suffix}" for suffix in ("safetensors", "json"))
    content = shard.read_bytes()
    shard.write_bytes(content[:4096] + b"\0" * (len(content) - 4096))
    store = Store.open(folder)
    cure = f"write it again with `python -m saepipe.shards repair {folder}`"
    with pytest.raises(UserError, match=re.escape(f"{shard} is damaged: block 0 does not match its hash; {cure}")):
        store.read_block(HOOK, 4, 0)
    with pytest.raises(UserError, match=re.escape(f"{shard} does not match the hash in its record")):
        store.finalise()
    shard.unlink()
    record.unlink()
    build(folder)
    assert files(folder) == files(reference.folder)
    Store.open(folder).read_block(HOOK, 4, 0)


def test_a_record_that_the_finaliser_did_not_see_is_refused(folder: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other")
    changed = torch.cat([other.read_block(HOOK, 4, block) for block in (0, 1)]) * 2
    other.write(HOOK, 4, changed)
    for suffix in ("safetensors", "json"):
        shutil.copy(other.folder / HOOK / f"000004.{suffix}", folder / HOOK / f"000004.{suffix}")
    with pytest.raises(UserError, match=r"000004.safetensors has a record that is not the one in manifest.json"):
        Store.open(folder).read_block(HOOK, 4, 0)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "tokens/plan.json", "tokens/train.ids"])
def test_opening_notices_damage_outside_the_shards(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=re.escape(f"{path} ")):
        Store.open(folder)


def test_a_manifest_or_tokens_of_another_store_are_refused(folder: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", seed=6)
    kept = (folder / "manifest.json").read_bytes()
    shutil.copy(other.folder / "manifest.json", folder / "manifest.json")
    with pytest.raises(UserError, match=r"manifest.json belongs to another plan; delete it and run"):
        Store.open(folder)
    (folder / "manifest.json").write_bytes(kept)
    shutil.rmtree(folder / "tokens")
    make_tokens(folder / "tokens", train=25)
    with pytest.raises(UserError, match=f"store.dir={folder} has the tokens of another store; delete"):
        Store.open(folder)


@pytest.mark.parametrize("side", ["train", "heldout"])
@pytest.mark.parametrize("array", ["ids", "documents", "special"])
def test_opening_notices_a_changed_value_in_the_tokens(folder: Path, side: str, array: str) -> None:
    path = folder / "tokens" / f"{side}.{array}"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match=re.escape(f"{path} does not match its hash; delete {path.parent}")):
        Store.open(folder)
    with pytest.raises(UserError, match=re.escape(f"{path} does not match its hash; delete {path.parent}")):
        build(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": None}, "belongs to another plan"),
        ({"hooks": 5}, "does not describe this store"),
        ({"hooks": {HOOK: {}}}, "does not describe this store"),
        ({"extra": 1}, "does not describe this store"),
    ],
)
def test_a_sealed_document_that_is_no_manifest(folder: Path, change: dict[str, object], words: str) -> None:
    path = folder / "manifest.json"
    write_sealed(path, read_sealed(path, cure="") | change)
    with pytest.raises(UserError, match=re.escape(f"{path} {words}; delete it and run the same")):
        Store.open(folder)


@pytest.mark.parametrize("key", ["records", "held_out_records", "mean"])
def test_a_manifest_of_fewer_shards_or_channels(folder: Path, key: str) -> None:
    path = folder / "manifest.json"
    manifest = read_sealed(path, cure="")
    of = manifest["hooks"][HOOK]
    (of["statistics"] if key == "mean" else of)[key].pop()
    write_sealed(path, manifest)
    with pytest.raises(UserError, match="does not describe this store"):
        Store.open(folder)


# ---- killed, crowded out, and raced

# Builds stores in forked children: one import of torch serves them all. `every step`: a child kills itself before the
# n-th thing that it does to the disk, for every n. `any moment`: the parent kills child after child, a bit later each.
FORKS = """
import tqdm; tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock when the process forks
import os, signal, sys, time
from pathlib import Path
from small_store import build, kill_before_step
from saepipe import durable
from saepipe.errors import UserError

def fork(work):
    child = os.fork()
    if not child:
        work()
        sys.stdout.flush()
        os._exit(0)
    return child

def die(folder, n):
    kill_before_step(n, (os, "fsync"), (Path, "replace"), (Path, "unlink"), (durable, "temporary"))
    build(folder, **SMALL)

root, SMALL = Path(sys.argv[1]), {"tokens": 40, "hooks": {"blocks.0.hook_resid_post": 6}}
def first():
    fsync = os.fsync
    def wait(descriptor):
        while not (root / "told").exists():
            time.sleep(0.005)
        fsync(descriptor)
    os.fsync = wait
    build(root / "race")

def second():
    lock = root / "race" / ".lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.005)
    try:
        build(root / "race")
    except UserError as error:
        print("refused", error)
    (root / "told").touch()

children = [fork(first), fork(second)]
for child in children:
    assert os.waitpid(child, 0)[1] == 0
print("first", children[0])
for n in range(200):
    child = fork(lambda: build(root / "any moment"))
    time.sleep(0.005 * n)
    if os.waitpid(child, os.WNOHANG)[0]:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("kills", n)
os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote: no need to wait
for n in range(1, 1000):
    if not os.waitpid(fork(lambda: die(root / str(n), n)), 0)[1]:
        break
    build(root / str(n), **SMALL)
print("steps", n)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder in which `FORKS` ran, and what it said."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    root = tmp_path_factory.mktemp("forks")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, str(root)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root, dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_sigkill_before_every_step_leaves_what_the_same_command_finishes(
    forks: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, said = forks
    expected = files(build(tmp_path, tokens=40, hooks={HOOK: 6}).folder)
    steps = int(said["steps"])
    assert steps > 60
    for n in range(1, steps + 1):
        assert files(root / str(n)) == expected, f"killed before step {n}"


def test_sigkill_at_any_moment_again_and_again(forks: tuple[Path, dict[str, str]], reference: Store) -> None:
    root, said = forks
    assert int(said["kills"]) > 2
    assert files(root / "any moment") == files(reference.folder)


def test_of_two_processes_on_one_store_one_is_told_of_the_other(
    forks: tuple[Path, dict[str, str]], reference: Store
) -> None:
    root, said = forks
    assert files(root / "race") == files(reference.folder)
    assert f"store.dir={root / 'race'} is in use by process {said['first']} on" in said["refused"]


def test_stale_temporary_files_are_gone_after_the_next_run(folder: Path, reference: Store) -> None:
    for name in ("plan.json", "tokens/train.ids", f"{HOOK}/000001.safetensors"):
        left_behind(folder / name).write_bytes(b"half of it")
    assert files(folder) != files(reference.folder)
    build(folder)
    assert files(folder) == files(reference.folder)


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space(small_disk: Path, reference: Store) -> None:
    folder = small_disk / "store"
    for size_kb in range(8, 400, 24):
        subprocess.run(["mount", "-o", f"remount,size={size_kb}k", str(small_disk)], check=True)
        try:
            build(folder)
            break
        except UserError as error:
            said = str(error)
        assert re.match(rf"store.dir={folder} has no space left on its disk \(.* MB free\); free some", said)
        names = [path.name for path in folder.rglob("*") if path.is_file()]
        assert not [name for name in names if name.endswith(".tmp")]
        shards = {name for name, content in files(folder).items() if "/0" in name}
        assert all(files(folder)[name] == files(reference.folder)[name] for name in shards)
    assert size_kb > 100
    assert files(folder) == files(reference.folder)
