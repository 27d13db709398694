from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import CONTEXT_SIZE, HOOKS, activations, build, files, make_plan, make_tokens

from saepipe.groups import GroupWriter
from saepipe.lock import hold
from saepipe.store import Store

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with hold(tmp_path / "store", key="store.dir"):
        tokens = make_tokens(tmp_path / "store" / "tokens")
        return Store.create(tmp_path / "store", make_plan(tokens), tokens)


def fill(writer: GroupWriter, starts: list[int], step: int) -> None:
    for start in starts:
        contexts = writer.contexts[start : start + step]
        writer.add(start, {hook: activations(contexts, HOOKS[hook]) for hook in writer.hooks})


def test_gives_the_ids_of_its_contexts(store: Store) -> None:
    for group, side in ((1, store.tokens.train), (None, store.tokens.heldout)):
        writer = GroupWriter(store, group)
        np.testing.assert_array_equal(writer.ids(2, 5), side.ids[writer.contexts[2:5]])
    assert writer.contexts.tolist() == list(range(5))


def test_the_order_and_the_size_of_what_is_added_do_not_matter(store: Store, tmp_path: Path) -> None:
    for group in store.missing_groups():
        writer = GroupWriter(store, group)
        fill(writer, list(reversed(range(0, len(writer.contexts), 4))), 4)
        writer.write()
    store.finalise()
    assert files(store.folder) == files(build(tmp_path / "other").folder)


def test_takes_other_types_and_layouts(store: Store) -> None:
    writer = GroupWriter(store, 0)
    strided = {}
    for hook, width in HOOKS.items():
        values = activations(writer.contexts, width).double()
        strided[hook] = values.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided[hook].is_contiguous()
    writer.add(0, strided)
    writer.write()
    first = torch.cat([store.read_block(HOOK, 0, block) for block in (0, 1)])
    everything = activations(np.arange(24), 4).reshape(-1, 4).bfloat16()
    assert torch.equal(first, everything[torch.from_numpy(store.plan.row_tokens(0))])


def test_asks_only_for_hooks_that_lack_a_shard_and_writes_only_those(store: Store) -> None:
    writer = GroupWriter(store, 0)
    fill(writer, [0], len(writer.contexts))
    writer.write()
    assert GroupWriter(store, 0).hooks == []
    (store.folder / HOOK / "000001.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.safetensors")}
    writer = GroupWriter(store, 0)
    assert writer.hooks == [HOOK]
    fill(writer, [0], len(writer.contexts))
    writer.write()
    after = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.safetensors")}
    assert {path.relative_to(store.folder).as_posix() for path in after.keys() - before.keys()} == {
        f"{HOOK}/000001.safetensors"
    }
    assert all(after[path] == before[path] for path in before)


def test_refuses_to_write_before_it_is_full(store: Store) -> None:
    writer = GroupWriter(store, 2)
    fill(writer, [0], len(writer.contexts) - 1)
    with pytest.raises(AssertionError, match="every context"):
        writer.write()
    assert CONTEXT_SIZE * len(writer.contexts) - store.plan.group_rows(2) == 2  # and the last group is cut


def test_a_group_that_another_process_finished_asks_for_nothing_and_writes_nothing(store: Store) -> None:
    first = GroupWriter(store, 0)
    fill(first, [0], len(first.contexts))
    first.write()
    before = files(store.folder)
    late = GroupWriter(store, 0)
    assert late.hooks == []
    late.write()
    assert files(store.folder) == before
