"""What a language model does on a GPU is what it does on the CPU: caching, evaluation, feature pages."""

from pathlib import Path

import pytest
import test_analyze
import test_cache
import test_evaluate
import torch
from test_analyze import made, model

from saepipe.cache import cache
from saepipe.evaluate import evaluate
from saepipe.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("short_timing")]
__all__ = ["made", "model"]  # fixtures


@pytest.mark.parametrize("hooks", [test_cache.HOOKS])
def test_a_store_holds_what_the_cpu_computes(inputs: Path, tmp_path: Path, hooks: list[str]) -> None:
    for device in ("cpu", "cuda"):
        config = test_cache.configured(inputs, tmp_path / device)
        config.model.device = device
        assert cache(config)["rows"] == 3000
    here, there = Store.open(tmp_path / "cpu"), Store.open(tmp_path / "cuda")
    for hook in hooks:
        for shard in range(here.plan.n_shards):
            for block in range(here.plan.n_blocks(hook, shard)):
                mine, theirs = (store.read_block(hook, shard, block) for store in (there, here))
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_store_is_the_same_bytes_again(inputs: Path, tmp_path: Path) -> None:
    for again in ("one", "other"):
        config = test_cache.configured(inputs, tmp_path / again)
        config.model.device = "cuda"
        cache(config)
    shards = [sorted((tmp_path / again).rglob("*.safetensors")) for again in ("one", "other")]
    assert shards[0]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


def assert_near(there: dict[str, object], here: dict[str, object]) -> None:
    """Compare figures, but for timings."""
    assert there.keys() == here.keys()
    for name in here.keys() - {"seconds", "tokens_per_s"}:
        value = here[name]
        assert there[name] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value), name


def test_evaluation(tmp_path: Path) -> None:
    test_evaluate.made(tmp_path)
    here, there = (evaluate(test_evaluate.asked(tmp_path, f"model.device={device}")) for device in ("cpu", "cuda"))
    assert_near(there, here)


def test_feature_pages(made: Path) -> None:
    here, there = (test_analyze.run(made, f"model.device={device}") for device in ("cpu", "cuda"))
    assert_near(there, here)
