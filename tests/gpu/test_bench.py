"""The bench's limits and steps on a CUDA device."""

from pathlib import Path

import pytest

from saepipe import bench_limits, entry
from saepipe.bench import bench

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_limits_and_steps_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setitem(bench_limits._COPIED_BYTES, "cuda", 1 << 24)
    keys = [
        *("bench.parts=[limits,step]", "bench.gb=0.01", "bench.rounds=2", "bench.steps=2", f"bench.dir={tmp_path}"),
        *("bench.d_in=64", "bench.d_sae=512", "bench.batch_tokens=256", "bench.k=8", f"trainer.precision={precision}"),
    ]
    figures = {figure["figure"]: figure for figure in bench(entry.load_config("bench", keys))["figures"]}
    assert figures["limit, product of matrices of 8192 x 8192, bfloat16"]["value"] > 1
    assert figures["limit, copy in memory, read and written"]["unit"] == "GB/s"
    for name in ("topk", "batchtopk", "matryoshka", "jumprelu at L0 8", "gated at L0 8", "standard at L0 16"):
        figure = figures[f"step, {name}, share of its time that the encoder's product takes alone"]
        assert figure["tokens_per_s"] > 0
        assert figure["peak_bytes"] > 4 * 4 * 2 * 64 * 512  # weights, gradients, and two moments
        assert figure["l0"] == pytest.approx(16 if "standard" in name else 8, rel=0.2)
