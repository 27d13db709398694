"""docs/ground_truth.py runs, and trains both libraries' SAEs alike (`make peers` runs this beside sae-lens)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from saepipe import saes
from saepipe.superposition import HELD_OUT, Features, Superposition, score

sae_lens = pytest.importorskip("sae_lens")

SCRIPT = Path(__file__).parents[2] / "docs" / "ground_truth.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ground_truth", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ground_truth"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


truth = _script()


def _canonical(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the SAE that does the same with decoder rows of norm 1."""
    norm = weights["W_dec"].norm(dim=1)
    per_latent = {key: value * norm for key, value in weights.items() if key.startswith("b_") and key != "b_dec"}
    rest = {"W_enc": weights["W_enc"] * norm, "W_dec": weights["W_dec"] / norm[:, None], "b_dec": weights["b_dec"]}
    return {**per_latent, **rest}


@pytest.mark.parametrize("name", list(truth.CASES))
def test_the_same_start_ends_in_the_same_weights(name: str) -> None:
    scale = truth.TINY
    data = scale.data(0)
    batches = torch.stack([data.batch(number).x for number in range(scale.steps)])
    ours, theirs = (truth.trained(whose, name, scale, 0, batches, 0.5) for whose in ("saepipe", "SAELens"))
    found, expected = _canonical(ours.folded()[1]), _canonical(theirs.state_dict())
    start = truth.their_start(name, scale, 0).W_dec
    assert torch.cosine_similarity(start, expected["W_dec"]).min() < 0.98  # else that both are alike says nothing
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-3 * value.norm(), key


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu"])
def test_scores_are_defined_as_theirs(name: str) -> None:
    from sae_lens.synthetic import evals

    data = Superposition(Features.drawn(64, 16, seed=0, roots=2, depth=1), 0, 500)
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=32), 16)
    sae.initialise(torch.Generator().manual_seed(0))
    found = score(sae, data, tokens=1500)
    truths = data.features.directions
    assert found["mcc"] == pytest.approx(evals.mean_correlation_coefficient(sae.W_dec.detach(), truths), abs=1e-6)
    assert found["uniqueness"] == evals.feature_uniqueness(sae.W_dec.detach(), truths)
    batches = [data.batch(HELD_OUT + number) for number in range(3)]
    x, magnitudes = torch.cat([batch.x for batch in batches]), torch.cat([batch.magnitudes for batch in batches])
    with torch.no_grad():
        theirs = evals.compute_classification_metrics(sae.encode(x), magnitudes, sae.W_dec, truths)
    expected = {"f1": theirs.f1_score, "precision": theirs.precision, "recall": theirs.recall}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.timeout(240)
def test_the_command_of_the_docs_runs(tmp_path: Path) -> None:
    arguments = ["--tiny", "--seeds", "2", "--out", str(tmp_path), "topk", "jumprelu"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(
        f"{whose.replace(' ', '_')}-{name}.json" for whose in truth.VARIANTS for name in ("topk", "jumprelu")
    )
    rows = json.loads((tmp_path / "saepipe-topk.json").read_text())["rows"]
    assert len(rows) == 2
    table = done.stdout[done.stdout.index("| `sae=`") :].splitlines()
    assert len(table) == 2 + 6
    assert table[0].count("|") == table[-1].count("|")
