"""Which rows a filter keeps, and that the stream then holds these and no others, whoever reads it."""

import itertools
import re

import numpy as np
import pytest
import torch
from small_store import CONTEXT_SIZE, ROLES, numbered, row_numbers

from saepipe.config import StreamConfig
from saepipe.errors import UserError
from saepipe.row_filter import RowFilter
from saepipe.store import Store
from saepipe.stream import Stream

HOOK, OTHER = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"
ROWS = np.arange(12_800)
POSITIONS = ROWS % CONTEXT_SIZE


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of chat data, with attention sinks in one hook only."""
    return numbered(
        tmp_path_factory.mktemp("store"),
        hooks={HOOK: 40, OTHER: 4},
        block_rows={HOOK: 32, OTHER: 64},
        chat=True,
        sinks=(HOOK,),
    )


def filtered(*, special: bool = False, **keys: object) -> RowFilter:
    return RowFilter.of(StreamConfig(**keys), exclude_special_tokens=special)  # type: ignore[arg-type]


def kept(store: Store, row_filter: RowFilter, hooks: tuple[str, ...] = (HOOK,)) -> np.ndarray:
    """Return which tokens of the text are kept."""
    mask = np.zeros(len(ROWS), bool)
    for shard in range(store.plan.n_shards):
        mask[store.plan.row_tokens(shard)[row_filter.mask(store, hooks, shard)]] = True
    return mask


def ordinary(store: Store) -> np.ndarray:
    return store.tokens.train.ordinary(ROWS)


def test_special_tokens(store: Store) -> None:
    assert kept(store, filtered()).all()
    np.testing.assert_array_equal(kept(store, filtered(special=True)), ordinary(store))
    assert 0 < ordinary(store).sum() < 7 / 8 * len(ROWS)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 7), (2, 3), (5, 100)])
def test_positions(store: Store, first: int, last: int) -> None:
    np.testing.assert_array_equal(
        kept(store, filtered(positions=[first, last])), (first <= POSITIONS) & (last >= POSITIONS)
    )


def test_max_norm_drops_the_sinks(store: Store) -> None:
    np.testing.assert_array_equal(kept(store, filtered(max_norm=10)), POSITIONS != 0)
    assert kept(store, filtered(max_norm=10), (OTHER,)).all()
    np.testing.assert_array_equal(kept(store, filtered(max_norm=10), (OTHER, HOOK)), POSITIONS != 0)
    mean = store.statistics(HOOK).mean_norm
    norms = np.concatenate([store.norm(HOOK, shard) for shard in range(store.plan.n_shards)])
    assert kept(store, filtered(max_norm=0.9)).sum() == (norms <= 0.9 * mean).sum() < 0.9 * len(ROWS)


@pytest.mark.parametrize("roles", [["user"], ["assistant", "user"], ["template"], ROLES])
def test_roles(store: Store, roles: list[str]) -> None:
    of = np.array(ROLES)[np.array([0, 0, 1, 1, 1, 2, 2, 2])[POSITIONS]]
    np.testing.assert_array_equal(kept(store, filtered(roles=roles)), np.isin(of, roles))


def test_all_at_once(store: Store) -> None:
    every = filtered(special=True, positions=[3, 6], max_norm=1.2, roles=["assistant"])
    one = [
        filtered(special=True),
        filtered(positions=[3, 6]),
        filtered(max_norm=1.2),
        filtered(roles=["assistant"]),
    ]
    masks = [kept(store, row_filter) for row_filter in one]
    np.testing.assert_array_equal(kept(store, every), np.logical_and.reduce(masks))
    assert kept(store, every).sum() > 0


def test_the_text_says_what_is_kept_and_nothing_of_how_it_was_typed() -> None:
    assert filtered().text == ""
    assert filtered(special=True).text == "special=out"  # the streams that were begun before there were others
    assert (
        filtered(special=True, positions=[1, 63], max_norm=10, roles=["user", "tool"]).text
        == "special=out;positions=1-63;max_norm=10.0;roles=tool,user"
    )
    assert filtered(max_norm=10).text == filtered(max_norm=10.0).text
    assert filtered(roles=["b", "a", "b"]).text == filtered(roles=["a", "b"]).text


def test_another_filter_is_another_order_even_where_it_keeps_the_same_rows(store: Store) -> None:
    keys = [{}, {"positions": [0, 7]}, {"max_norm": 1e6}, {"max_norm": 2e6}, {"roles": ROLES}]
    orders = [Stream(store, config(**key), exclude_special_tokens=False).rows_of(0) for key in keys]
    for first, second in itertools.combinations(orders, 2):
        assert not np.array_equal(first, second)


def config(**changes: object) -> StreamConfig:
    return StreamConfig(**{"hook": HOOK, "batch_tokens": 960, "window_tokens": 3000, **changes})  # type: ignore[arg-type]


def test_the_stream_holds_the_kept_rows_and_no_others(store: Store) -> None:
    keys = {"positions": [2, 7], "max_norm": 10, "roles": ["user", "assistant"]}
    stream = Stream(store, config(batch_tokens=480, **keys), exclude_special_tokens=True)
    wanted = ROWS[kept(store, filtered(special=True, **keys))]
    batches = list(itertools.islice(stream.iterate(), stream.batches_per_epoch))
    taken = np.concatenate([row_numbers(rows) for rows in batches])
    assert len(np.unique(taken)) == len(taken)
    assert np.isin(taken, wanted).all()
    assert len(wanted) - len(taken) < 480 + 24


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_ranks_and_prefetching_change_no_row(store: Store, world_size: int) -> None:
    keys = {"batch_tokens": 3072, "window_tokens": 6000, "positions": [1, 6], "max_norm": 10}
    alone = Stream(store, config(**keys), exclude_special_tokens=True)
    n = alone.batches_per_epoch + 1
    numbers = np.concatenate([store.plan.row_tokens(shard) for shard in range(store.plan.n_shards)])
    expected = [numbers[alone.rows_of(batch)] for batch in range(n)]
    for prefetch in range(5) if world_size in (1, 8) else (world_size % 5,):
        ranks = []
        for rank in range(world_size):
            stream = Stream(
                store,
                config(**keys, prefetch_batches=prefetch),
                exclude_special_tokens=True,
                rank=rank,
                world_size=world_size,
            )
            ranks.append(list(itertools.islice(stream.iterate(), n)))
        for batch in range(n):
            lanes = [ranks[lane % world_size][batch].chunk(24 // world_size)[lane // world_size] for lane in range(24)]
            np.testing.assert_array_equal(row_numbers(torch.cat(lanes)), expected[batch])


@pytest.mark.parametrize(
    ("keys", "special", "words"),
    [
        ({"positions": [8, 20]}, False, "the filter of the stream (positions=8-20) keeps no row of the store; widen"),
        ({"max_norm": 1e-9}, True, "the filter of the stream (special=out, max_norm=1e-09) keeps no row of the store"),
        ({"roles": ["template"], "positions": [2, 7]}, False, "(positions=2-7, roles=template) keeps no row"),
        (
            {"positions": [3, 3], "batch_tokens": 2400},
            False,
            "1600 rows that the filter keeps (positions=3-3); the larg",
        ),
        ({"roles": ["asistant"]}, False, "stream.roles=asistant is not known; did you mean assistant"),
    ],
)
def test_mistakes_name_the_key(store: Store, keys: dict[str, object], special: bool, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        Stream(store, config(**keys), exclude_special_tokens=special)
