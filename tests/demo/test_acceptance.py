"""What `make acceptance` promises, and how it tells a pass from a fail."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saepipe.demo import acceptance
from saepipe.demo.acceptance import Criterion, World
from saepipe.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = World(n_features=24, d=16, d_sae=16, k=3, batch_tokens=64, steps=150, lr=0.02, scored_tokens=1000, depth=0)


def shares(share: float) -> list[dict[str, Any]]:
    """Make the shares of one SAE, of which only one is what the bar is about."""
    return [
        {
            "concepts": concepts,
            "threshold": threshold,
            "share": share if (concepts, threshold) == ("labels and tokens", 0.5) else 0.5,
            "low": share - 0.02,
            "high": share + 0.02,
            "judged": 90,
        }
        for concepts in ("labels and tokens", "labels")
        for threshold in (0.0, 0.25, 0.5)
    ]


def measured(trained: float = 0.8, untrained: float = 0.05, ce: float = 0.98, mcc: float = 0.74) -> tuple[Any, ...]:
    """Make what was measured of the demo, by `evaluate`, and of known features."""
    sides = {"trained": trained, "untrained": untrained, "shuffled": 0.0}
    demo = {side: {"live": 100, "mean_f1": 0.4, "shares": shares(share)} for side, share in sides.items()}
    demo |= {"architecture": "topk", "d_sae": 128, "hook": "x", "tokens": 1000, "documents": 10}
    evaluated = {"l0": 8.0, "explained_variance": 0.85, "ce_loss_score": ce, "dead_fraction": 0.2}
    known = {"mcc": mcc, "f1": 0.7, "uniqueness": 0.95}
    return demo, evaluated, {"trained": known, "untrained": {"mcc": 0.3}}


def verdict(*found: Any) -> dict[str, Any]:
    return acceptance.judged(*found)


def test_every_bar_can_fail_alone() -> None:
    assert verdict(*measured())["passed"]
    for changed in ({"trained": 0.71}, {"untrained": 0.14}, {"ce": 0.94}, {"mcc": 0.69}):  # limits count, not shares
        result = verdict(*measured(**changed))
        assert not result["passed"], changed
        assert sum(not one["passed"] for one in result["criteria"]) == 1


def test_not_a_number_is_no_pass() -> None:
    assert not Criterion("x", float("nan"), at_least=0.7).passed
    assert not Criterion("x", float("nan"), below=0.15).passed


def test_the_table_shows_every_figure_and_the_verdict() -> None:
    said = acceptance.table(verdict(*measured()))
    assert said.endswith("\nPASS")
    assert "labels and tokens, above 0.5 of the maximum" in said
    assert "80.0% (78.0-82.0)" in said
    assert "labels, every firing" in said
    failed = acceptance.table(verdict(*measured(trained=0.6)))
    assert failed.endswith("\nFAIL")
    assert failed.count("FAIL") == 2


def test_an_sae_finds_known_features_that_it_did_not_know_before() -> None:
    found = acceptance.judge_superposition(TINY)
    assert found["trained"]["mcc"] > found["untrained"]["mcc"] + 0.1
    assert found["trained"]["f1"] > found["untrained"]["f1"]


def test_a_mistake_is_told_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sae\.k=0"):
        acceptance.acceptance(["sae.k=0", f"run.dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


def test_an_architecture_whose_control_has_another_l0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sae=standard .* give sae=topk"):
        acceptance.acceptance(["sae=standard", f"run.dir={tmp_path}/run"])


@pytest.mark.prove
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_bar_is_met_and_the_controls_fail_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "saepipe.demo.acceptance",
        f"run.dir={tmp_path}/run",
        f"store.dir={tmp_path}/store",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stderr[done.stderr.rindex("topk, ") :])
    result = json.loads((tmp_path / "run/acceptance.json").read_text())
    bar = {"concepts": "labels and tokens", "threshold": 0.5}
    (trained, untrained, shuffled) = (
        next(one for one in result["demo"][side]["shares"] if bar.items() <= one.items())
        for side in ("trained", "untrained", "shuffled")
    )
    assert trained["low"] >= 0.70
    assert untrained["high"] < 0.15
    assert shuffled["high"] < 0.05
    assert result["evaluated"]["ce_loss_score"] >= 0.95
    assert result["superposition"]["trained"]["mcc"] >= 0.70
