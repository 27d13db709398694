"""The arithmetic of the steps' figures; the steps are those of tests/test_contestant.py and tests/peers."""

from pathlib import Path

import pytest
import torch

from saepipe import bench_step, entry
from saepipe.bench_figure import Figure
from saepipe.contest import Contestant, Task

SECONDS = {"product": 0.01, "saepipe": 0.02, "SAELens": 0.08, "sparsify": 0.03, "dictionary_learning": 0.05}
PEAKS = {"saepipe": 250e6, "SAELens": 400e6, "sparsify": 325e6, "dictionary_learning": 245e6}


class Fake(Contestant):
    def __init__(self, config: object, name: str, task: Task) -> None:
        self.name, self.task = name, task

    def ready(self) -> "Fake":
        return self

    def ask(self, **command: int) -> float:
        if "peak" in command:
            return PEAKS[self.name]
        return 32.0 if "l0" in command else command["steps"] * SECONDS[self.task.library]

    def __exit__(self, *_: object) -> None:
        self.task = None  # type: ignore[assignment]


def figures(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Figure]:
    monkeypatch.setattr(bench_step, "_started", Fake)
    monkeypatch.setattr(bench_step, "activations", lambda *sizes: [torch.zeros(1, 1)])
    keys = ["trainer.accelerator=cpu", "bench.steps=3", *overrides]
    found = bench_step.measure(entry.load_config("bench", keys), folder)
    return {figure.name: figure for figure in found}


def test_tokens_memory_and_the_product_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(tmp_path, monkeypatch, "bench.peers=true", "bench.architectures=[topk]")
    product = found["step, topk, share of its time that the encoder's product takes alone"]
    assert product.rounds == pytest.approx([0.5] * 3)
    assert product.measured["tokens_per_s"] == pytest.approx(2048 / 0.02)
    assert product.measured["tokens_per_day"] == pytest.approx(86400 * 2048 / 0.02)
    assert product.measured["encoder_flop_per_s"] == pytest.approx(2 * 512 * 4096 * 2048 / 0.02)
    assert product.told == "102,400 tokens/s, 8.85 billion a day, 250 MB, L0 32"
    assert product.met is None
    ratios = {name: found[f"step, topk, tokens/s over {name}"] for name in PEAKS if name != "saepipe"}
    assert {name: figure.value for name, figure in ratios.items()} == pytest.approx(
        {"SAELens": 4, "sparsify": 1.5, "dictionary_learning": 2.5}
    )
    assert {name: figure.met for name, figure in ratios.items()} == {
        "SAELens": True,
        "sparsify": True,
        "dictionary_learning": False,
    }
    memory = found["step, topk, memory over the best peer's (dictionary_learning)"]
    assert memory.value == pytest.approx(250 / 245)
    assert memory.met is False


def test_a_step_is_measured_at_the_l0_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["bench.d_in=16", "bench.d_sae=64", "bench.batch_tokens=32", "bench.k=4"]
    found = figures(tmp_path, monkeypatch, "bench.peers=true", "bench.architectures=[gated]", *small)
    assert "step, gated at L0 4, tokens/s over SAELens" in found


@pytest.mark.parametrize(
    "key", ["bench.d_in=16", "bench.d_sae=64", "bench.k=4", "trainer.precision=bf16-mixed", "train.compile=true"]
)
def test_promises_are_for_their_sizes_alone(key: str) -> None:
    assert bench_step.promised(entry.load_config("bench", ["trainer.accelerator=cpu"]))
    assert not bench_step.promised(entry.load_config("bench", ["trainer.accelerator=cpu", key]))


def test_where_the_system_tells_no_memory_none_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PEAKS:
        monkeypatch.setitem(PEAKS, name, float("nan"))
    found = figures(tmp_path, monkeypatch, "bench.peers=true", "bench.architectures=[topk]")
    assert len(found) == 4
    assert all("peak_bytes" not in figure.measured and "MB" not in figure.told for figure in found.values())


def test_without_peers_every_architecture_is_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*figures(tmp_path, monkeypatch)]
    assert names == [
        f"step, {case}, share of its time that the encoder's product takes alone"
        for case in (
            *("topk", "batchtopk", "matryoshka", "jumprelu", "jumprelu at L0 32"),
            *("gated", "gated at L0 32", "standard", "standard at L0 64"),
        )
    ]
