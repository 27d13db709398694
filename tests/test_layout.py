import numpy as np
import pytest
from small_store import CONTEXT_SIZE, HOOKS, big, make_plan, make_tokens

from saepipe.layout import choose_block_rows, group_size
from saepipe.permutation import Permutation, derive_key
from saepipe.token_store import TokenStore


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_tokens(tmp_path_factory.mktemp("plan") / "tokens")


def test_golden_rows() -> None:
    plan = big()
    assert plan.group_contexts(3)[:4].tolist() == [37088, 94527, 26524, 68446]
    assert plan.row_tokens(13, 5, 9).tolist() == [12351460, 2295078, 9700090, 5506226]
    assert plan.row_tokens(plan.n_shards - 1)[-2:].tolist() == [7907841, 9600676]


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


def test_follows_the_written_definition(tokens: TokenStore) -> None:
    """The definition in the module's docstring, written again row by row."""
    plan = make_plan(tokens, tokens=185, shuffle_tokens=72)
    n, c = 9, CONTEXT_SIZE
    contexts = Permutation(derive_key("contexts", plan.token_store, plan.seed), plan.contexts)
    for group in range(plan.n_groups):
        slots_here = min(n, -(-(185 - group * n * c) // c))
        keys = [derive_key(name, plan.token_store, plan.seed, group) for name in ("slots", "positions")]
        slots, positions = Permutation(keys[0], slots_here), Permutation(keys[1], c)
        expected = []
        for row in range(min(n * c, 185 - group * n * c)):
            r, place = divmod(row, slots_here)
            slot = slots(np.array([place]), np.array([r]))
            position = positions(np.array([r]), slot)
            expected.append(int(contexts(group * n + slot)[0] * c + position[0]))
        rows = np.concatenate([plan.row_tokens(shard) for shard in plan.group_shards(group)])
        assert rows.tolist() == expected


def test_no_block_holds_two_tokens_of_one_context() -> None:
    plan = big()
    contexts = np.concatenate([plan.row_tokens(shard) for shard in plan.group_shards(2)]) // 128
    for block in contexts.reshape(-1, 512):
        assert len(np.unique(block)) == 512
    assert len(np.unique(contexts[:2048])) == 2048  # a round holds one of each context of the group


def test_every_position_is_anywhere_in_a_group() -> None:
    positions = np.concatenate([big().row_tokens(shard) for shard in big().group_shards(2)]) % 128
    means = positions.reshape(64, -1).mean(axis=1)
    assert np.abs(means - 63.5).max() < 4 * 37 / 64  # four standard errors of the mean of 4096


@pytest.mark.parametrize(
    ("shuffle_tokens", "context_size", "block_rows", "contexts"),
    [(262_144, 128, 512, 2048), (262_144, 100, 512, 2560), (1000, 128, 512, 7), (100, 128, 16, 1), (72, 8, 16, 9)],
)
def test_groups_are_whole_blocks_where_they_are_larger(
    shuffle_tokens: int, context_size: int, block_rows: int, contexts: int
) -> None:
    assert group_size(shuffle_tokens, context_size, block_rows) == contexts


@pytest.mark.parametrize("field", ["token_store", "seed"])
def test_another_seed_or_text_is_another_order(field: str) -> None:
    other = big(**{field: "0100" if field == "token_store" else 1})
    assert np.mean(big().row_tokens(0) == other.row_tokens(0)) < 0.001


def test_sizes_of_blocks() -> None:
    def rows(width: int, tokens: int, dtype: str = "bfloat16", contexts: int = 2048) -> int:
        return choose_block_rows(width, dtype, tokens=tokens, contexts=contexts)

    assert rows(768, 10**9) == 512  # 1 MiB holds 682 rows
    assert rows(768, 10**9, "float32") == 256
    assert rows(768, 10**9, "int8") == 1024
    assert rows(768, 10**9, contexts=300) == 256  # no longer than a round
    assert rows(768, 10**9, contexts=3) == 16
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
    small = make_plan(tokens, dtype="int8")
    assert small.shard_bytes("blocks.0.hook_resid_post", 0) == 4096 + 24 * (6 + 4 + 4) + 2 * 6 * 4
