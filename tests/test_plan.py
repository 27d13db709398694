import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from small_store import HOOKS, make_plan, make_tokens

from saepipe.config import StoreConfig
from saepipe.durable import read_sealed, write_sealed
from saepipe.errors import UserError
from saepipe.plan import Plan
from saepipe.token_store import TokenStore


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_tokens(tmp_path_factory.mktemp("plan") / "tokens")


def big(**changes: object) -> Plan:
    """A plan of a hundred thousand contexts, whose token store need not be there."""
    fields: dict[str, object] = {
        "token_store": "00ff",
        "contexts": 100_000,
        "held_out_contexts": 500,
        "context_size": 128,
        "model": {"name": "m", "dtype": "float32"},
        "hooks": {"blocks.2.hook_resid_post": 128},
        "capture": "huggingface",
        "device_kind": "cpu",
        "dtype": "bfloat16",
        "tokens": 12_000_000,
        "shard_tokens": 65_536,
        "shuffle_tokens": 262_144,
        "block_rows": {"blocks.2.hook_resid_post": 512},
        "batch_prompts": 32,
        "seed": 0,
        "data": {"path": "a.txt"},
    }
    return Plan(**(fields | changes))  # type: ignore[arg-type]


def test_golden_identity() -> None:
    # A change here makes every store that exists unreadable: raise FORMAT with it
    assert big().identity == "b021db9db03fb15a7ec811d07863dcf399e9b02c94e29c5f262b2618324cdfeb"


def test_golden_rows() -> None:
    plan = big()
    assert plan.group_contexts(3)[:4].tolist() == [37088, 94527, 26524, 68446]
    assert plan.row_tokens(13, 5, 9).tolist() == [6646203, 7596327, 11759161, 2791237]
    assert plan.row_tokens(plan.n_shards - 1)[-2:].tolist() == [2440895, 3759527]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokens": 192},  # no context is cut
        {"tokens": 1},
        {"tokens": 20, "shuffle_tokens": 240},  # one group, smaller than a whole one
        {"shard_tokens": 7, "shuffle_tokens": 63},
        {"shard_tokens": 3, "shuffle_tokens": 3},  # less than a context
        {"shard_tokens": 1000, "shuffle_tokens": 1000},
    ],
)
def test_the_shards_hold_distinct_tokens_and_as_many_as_asked(tokens: TokenStore, changes: dict[str, int]) -> None:
    plan = make_plan(tokens, **changes)
    rows = [plan.row_tokens(shard) for shard in range(plan.n_shards)]
    assert [len(part) for part in rows] == [plan.shard_rows(shard) for shard in range(plan.n_shards)]
    assert all(0 < len(part) <= plan.shard_tokens for part in rows)
    assert [plan.shard_start(shard) for shard in range(plan.n_shards)] == np.cumsum([0, *map(len, rows[:-1])]).tolist()
    stored = np.concatenate(rows)
    assert len(stored) == plan.tokens == len(set(stored.tolist()))
    assert set((stored // plan.context_size).tolist()) == {
        context for group in range(plan.n_groups) for context in plan.group_contexts(group).tolist()
    }
    assert stored.max() < len(tokens.train) * plan.context_size


def test_the_writer_puts_each_token_where_the_reader_looks_for_it(tokens: TokenStore) -> None:
    plan = make_plan(tokens)
    for group in range(plan.n_groups):
        contexts, targets = plan.group_contexts(group), plan.group_targets(group)
        rows = np.concatenate([plan.row_tokens(shard) for shard in plan.group_shards(group)])
        assert {plan.shard_group(shard) for shard in plan.group_shards(group)} == {group}
        sources = contexts[:, None] * plan.context_size + np.arange(plan.context_size)
        np.testing.assert_array_equal(rows[targets[targets >= 0]], sources[targets >= 0])
        assert (targets >= 0).sum() == len(rows) == plan.group_rows(group)
    assert (targets < 0).sum() == 2  # 190 rows of 24 contexts of 8


def test_part_of_a_shard_is_that_part_of_its_rows() -> None:
    plan = big()
    np.testing.assert_array_equal(plan.row_tokens(6, 1000, 1700), plan.row_tokens(6)[1000:1700])


def test_neighbours_on_disk_share_no_context() -> None:
    contexts = big().row_tokens(1) // 128
    assert np.mean(contexts[1:] == contexts[:-1]) < 3 / 2048  # a group has 2048 contexts
    assert len(np.unique(contexts[:512])) > 400  # 512 draws from 2048 hit 453 different ones


@pytest.mark.parametrize("field", ["token_store", "seed"])
def test_another_seed_or_text_is_another_order(field: str) -> None:
    other = big(**{field: "0100" if field == "token_store" else 1})
    assert np.mean(big().row_tokens(0) == other.row_tokens(0)) < 0.001


def test_sizes_of_blocks() -> None:
    def rows(width: int, tokens: int, dtype: str = "bfloat16") -> int:
        from saepipe.plan import _block_rows

        return _block_rows(StoreConfig(tokens=tokens, dtype=dtype), width)

    assert rows(768, 10**9) == 512  # 1 MiB holds 682 rows
    assert rows(768, 10**9, "float32") == 256
    assert rows(128, 2_000_000) == 256  # 7813 blocks; 512 rows would leave 3907
    assert rows(128, 1000) == 16
    assert rows(20_000, 1000, "float32") == 8  # 16 rows would be 1.2 MiB
    assert rows(10**6, 1000, "float32") == 1


def test_counts_bytes_as_they_will_be_on_disk(tokens: TokenStore) -> None:
    plan = make_plan(tokens)
    assert plan.shard_bytes("blocks.0.hook_resid_post", 0) == 4096 + 24 * (6 * 2 + 4)
    places = list(plan.places())
    assert len(places) == len(HOOKS) * (plan.n_shards + plan.n_held_out_shards)
    assert plan.total_bytes == 4096 * len(places) + (190 + 40) * ((6 + 4) * 2 + 2 * 4)


def test_keeps_at_most_65536_held_out_rows(tokens: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_plan(tokens).held_out_contexts == 5
    monkeypatch.setattr("saepipe.plan.HELD_OUT_ROWS", 31)
    assert make_plan(tokens).held_out_rows == 24


def test_is_read_back_as_it_was_saved(tmp_path: Path, tokens: TokenStore) -> None:
    plan = make_plan(tokens, model={"name": "m", "sizes": (1, 2)}, hooks=dict(reversed(HOOKS.items())))
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert Plan.load(tmp_path).identity == plan.identity == make_plan(tokens, model=plan.model).identity


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "other"}}, "model.name is small there and other here"),
        ({"model": {"name": "small", "revision": "v2"}}, "model.revision is not set there and v2 here"),
        ({"hooks": {"a.b": 6}}, "model.hooks is ['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post'] there"),
        ({"hooks": dict.fromkeys(HOOKS, 9)}, "model (widths) is {'blocks.0.hook_resid_post': 6, "),
        ({"data": {"path": "b.txt"}}, "data.path is small.txt there and b.txt here"),
        ({"dtype": "float32"}, "store.dtype is bfloat16 there and float32 here"),
        ({"tokens": 100}, "store.tokens is 190 there and 100 here"),
        ({"seed": 6}, "store.seed is 5 there and 6 here"),
    ],
)
def test_names_the_first_key_that_differs(tokens: TokenStore, changes: dict[str, object], words: str) -> None:
    plan = make_plan(tokens)
    plan.check(make_plan(tokens), folder=Path("acts"))
    with pytest.raises(UserError, match=re.escape(f"store.dir=acts belongs to another plan: {words}")) as error:
        plan.check(make_plan(tokens, **changes), folder=Path("acts"))
    assert str(error.value).endswith("choose another store.dir")


def test_names_a_difference_that_is_no_configuration_key(tokens: TokenStore) -> None:
    plan = make_plan(tokens)
    for field, value, words in (
        ("token_store", "ab", "data (hash of the text's tokens) is "),
        ("device_kind", "cuda", "model.device (kind) is cpu there and cuda here"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            plan.check(dataclasses.replace(plan, **{field: value}), folder=Path("acts"))


@pytest.mark.parametrize(
    "hook", ["../x", "a/b", "/etc", "..", ".", "", "a..b", "a\\b", "tokens", "heldout", "plan.json"]
)
def test_a_hook_cannot_lead_out_of_the_store(hook: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.hooks: {hook!r} cannot name a folder")):
        big(hooks={hook: 4}, block_rows={hook: 16})


def test_refuses_more_tokens_than_there_are() -> None:
    with pytest.raises(UserError, match=r"store.tokens=12800001 is more than the 12800000 training tokens"):
        big(tokens=12_800_001)


def test_names_a_plan_that_is_not_there_or_of_another_version(tmp_path: Path, tokens: TokenStore) -> None:
    with pytest.raises(UserError, match=f"there is no store in store.dir={tmp_path}; make one with `python -m saepipe"):
        Plan.load(tmp_path)
    make_plan(tokens).save(tmp_path)
    document = read_sealed(tmp_path / "plan.json", cure="")
    for other in ({**document, "format": 99}, {**document, "new": 1}, {"format": 1}):
        write_sealed(tmp_path / "plan.json", other)
        with pytest.raises(
            UserError, match=rf"another version of saepipe \(format {other['format']}, and this one reads 1"
        ):
            Plan.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hooks": 5},
        {"hooks": {"a": "x"}},
        {"tokens": "x"},
        {"model": None},
        {"dtype": "int8"},
        {"block_rows": {}},
        {"context_size": 0},
    ],
)
def test_names_a_sealed_plan_that_describes_no_store(
    tmp_path: Path, tokens: TokenStore, change: dict[str, object]
) -> None:
    make_plan(tokens).save(tmp_path)
    path = tmp_path / "plan.json"
    write_sealed(path, read_sealed(path, cure="") | change)
    with pytest.raises(UserError, match=re.escape(f"{path} does not describe a store; choose another store.dir")):
        Plan.load(tmp_path)
