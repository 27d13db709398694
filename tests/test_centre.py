"""Where the decoder's bias starts, on a small store."""

from pathlib import Path

import pytest
import small_store
import torch

from saepipe import centre as module
from saepipe import entry, metrics
from saepipe.centre import centre, first_rows
from saepipe.config import StreamConfig
from saepipe.row_filter import RowFilter
from saepipe.store import Store
from saepipe.stream import Stream

HOOK, TARGET = small_store.HOOKS


def found(store: Store, *overrides: str, target: str | None = None) -> torch.Tensor | None:
    keys = [f"stream.hook={HOOK}", f"stream.target_hook={target or 'null'}", "stream.batch_tokens=24"]
    config = entry.load_config("train", [*keys, "stream.window_tokens=96", *overrides])
    return centre(config, store, Stream(store, config.stream, exclude_special_tokens=True))


def rows_of(store: Store, hook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a hook in the order on disk, and which of them are ordinary."""
    plan, read = store.plan, []
    for shard in range(plan.n_shards):
        read += [store.read_block(hook, shard, block) for block in range(plan.n_blocks(hook, shard))]
    ordinary = [torch.from_numpy(store.ordinary(shard)) for shard in range(plan.n_shards)]
    return torch.cat(read), torch.cat(ordinary)


@pytest.mark.parametrize("target", [None, TARGET])
def test_mean_is_the_manifests_and_zeros_are_left_out(reference: Store, target: str | None) -> None:
    mean = found(reference, target=target)
    assert mean is not None
    assert torch.equal(mean, reference.statistics(target or HOOK).mean)
    assert found(reference, "sae.b_dec_init_method=zeros", target=target) is None


@pytest.mark.parametrize("target", [None, TARGET])
def test_median_is_of_the_ordinary_rows_of_what_is_reconstructed(reference: Store, target: str | None) -> None:
    rows, ordinary = rows_of(reference, target or HOOK)
    assert not ordinary.all()
    median = found(reference, "sae.b_dec_init_method=geometric_median", target=target)
    assert median is not None
    torch.testing.assert_close(median, metrics.geometric_median(rows[ordinary]))
    assert (median - metrics.geometric_median(rows)).norm() > 0.1  # the special rows would have pulled it away


def test_rows_are_those_that_the_stream_keeps(reference: Store) -> None:
    config = StreamConfig(positions=[2, 3], max_norm=1.0)
    row_filter = RowFilter.of(config, exclude_special_tokens=True)
    rows = first_rows(reference, HOOK, row_filter, [HOOK, TARGET])
    everything, _ = rows_of(reference, HOOK)
    kept = [row_filter.mask(reference, [HOOK, TARGET], shard) for shard in range(reference.plan.n_shards)]
    assert torch.equal(rows, everything[torch.cat([torch.from_numpy(mask) for mask in kept])])
    assert 0 < len(rows) < len(everything) / 4


def test_no_more_rows_are_read_than_needed(reference: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ordinary = rows_of(reference, HOOK)
    row_filter = RowFilter(exclude_special_tokens=True)
    for most in (1, 20, 50, 10_000):
        monkeypatch.setattr(module, "MOST_ROWS", most)
        read = first_rows(reference, HOOK, row_filter, [HOOK])
        assert torch.equal(read, rows[ordinary][:most])


def test_a_filter_without_an_ordinary_row_leaves_the_mean(tmp_path: Path) -> None:
    store = small_store.build(tmp_path)
    config = entry.load_config(
        "train",
        [
            *(f"stream.hook={HOOK}", "stream.batch_tokens=6", "stream.window_tokens=96", "stream.positions=[0,0]"),
            *("data.exclude_special_tokens=false", "sae.b_dec_init_method=geometric_median"),
        ],
    )
    mean = centre(config, store, Stream(store, config.stream, exclude_special_tokens=False))
    assert mean is not None
    assert torch.equal(mean, store.statistics(HOOK).mean)
