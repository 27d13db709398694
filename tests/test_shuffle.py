"""How often rows of one context meet in a batch, by formula and by counting."""

import logging
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from small_store import CONTEXT_SIZE, big, build

from saepipe import shuffle
from saepipe.config import StreamConfig
from saepipe.errors import UserError
from saepipe.layout import choose_block_rows
from saepipe.order import Blocks, Order, choose_lanes
from saepipe.permutation import derive_key
from saepipe.plan import Plan
from saepipe.shuffle import check, companions
from saepipe.store import Store

HOOK = "blocks.2.hook_resid_post"


def planned(tokens: int, *, context_size: int, shuffle_tokens: int, width: int = 768, block_rows: int = 0) -> Plan:
    """A plan as the cache verb makes it, of a token store that need not be there."""
    size = choose_block_rows(width, "bfloat16", tokens=tokens, contexts=max(1, shuffle_tokens // context_size))
    return big(
        tokens=tokens,
        contexts=tokens // context_size + 10,
        context_size=context_size,
        hooks={HOOK: width},
        block_rows={HOOK: block_rows or size},
        shard_tokens=math.gcd(65_536, shuffle_tokens),
        shuffle_tokens=shuffle_tokens,
    )


@pytest.mark.parametrize(
    ("tokens", "context_size", "shuffle_tokens", "width"),
    [
        (50_000_000, 128, 262_144, 768),
        (50_000_000, 1024, 262_144, 2304),
        (300_000_000, 100, 262_144, 512),  # groups of no power of two
        (1_000_000_000, 1024, 2**20, 512),
        (1_000_000_000, 128, 262_144, 2304),
    ],
)
def test_a_large_store_is_shuffled_as_well_as_by_chance(
    tokens: int, context_size: int, shuffle_tokens: int, width: int
) -> None:
    plan = planned(tokens, context_size=context_size, shuffle_tokens=shuffle_tokens, width=width)
    assert check(plan, refuse=True) == companions(plan) == pytest.approx(1, abs=0.01)


def counted(plan: Plan) -> float:
    """Count companions in real batches of the default stream."""
    config = StreamConfig()
    order = Order(
        Blocks.of(plan, [HOOK], None),
        derive_key("another key"),
        lanes=choose_lanes(config),
        batch_tokens=config.batch_tokens,
        window_tokens=config.window_tokens,
    )
    order.window = lru_cache(order.window)  # type: ignore[method-assign]
    contexts = np.concatenate([plan.row_tokens(shard) for shard in range(plan.n_shards)]) // plan.context_size
    found = 0
    # not at the ends of the epoch, where windows are cut
    batches = [start + n for start in (150, 300, 450) for n in range(20)]
    for batch in batches:
        _, counts = np.unique(contexts[order.rows_of(batch)], return_counts=True)
        found += int((counts * (counts - 1)).sum())
    b = config.batch_tokens
    return found / (len(batches) * b * (b - 1) * (plan.context_size - 1) / (plan.tokens - 1))


@pytest.mark.parametrize(("shuffle_tokens", "at_least"), [(262_144, 0.95), (8192, 1.2)])
def test_agrees_with_a_count_over_batches(shuffle_tokens: int, at_least: float) -> None:
    plan = planned(3_000_000, context_size=128, shuffle_tokens=shuffle_tokens, block_rows=512)
    ratio = companions(plan)
    assert ratio > at_least
    assert counted(plan) == pytest.approx(ratio, rel=0.04)


def test_a_store_that_fits_the_window_is_shuffled_in_memory() -> None:
    assert companions(planned(StreamConfig().window_tokens, context_size=1024, shuffle_tokens=1024)) == 1


@pytest.mark.parametrize(("context_size", "shuffle_tokens"), [(1024, 2048), (4096, 16_384), (300, 512)])
def test_too_small_a_shuffle_is_refused_and_the_size_that_is_named_passes(
    context_size: int, shuffle_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned(50_000_000, context_size=context_size, shuffle_tokens=shuffle_tokens)
    ratio = companions(plan)
    assert ratio > shuffle.WORST
    words = (
        rf"^store.shuffle_tokens={shuffle_tokens} shuffles too few contexts together: a row meets {ratio:.2f} times as "
        rf"many of its own context in a batch as chance would give it \(at most 1.05\); give at least (\d+)"
    )
    with pytest.raises(UserError, match=rf"{words}, or set cache.poor_shuffle=warn$") as error:
        check(plan, refuse=True)
    caplog.set_level(logging.WARNING)
    assert check(plan, refuse=False) == ratio
    assert re.fullmatch(words, caplog.messages[0])
    said = re.match(words, str(error.value))
    assert said is not None
    enough = int(said[1])
    assert enough % plan.shard_tokens == 0
    check(planned(50_000_000, context_size=context_size, shuffle_tokens=enough), refuse=True)


def test_the_manifest_carries_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Store.open(build(tmp_path / "small").folder).manifest.companions == 1
    monkeypatch.setattr(shuffle, "StreamConfig", lambda: StreamConfig(batch_tokens=24, window_tokens=64))
    poor = build(tmp_path / "poor", shard_tokens=2 * CONTEXT_SIZE, shuffle_tokens=2 * CONTEXT_SIZE)
    found = Store.open(poor.folder).manifest.companions
    assert found == companions(poor.plan) > 2  # a block is the two contexts of a group
