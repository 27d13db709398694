"""Whether SAEs trained here find what is there: `python -m saepipe.demo.acceptance`, which `make acceptance` runs.

Two questions, each with a control that has to fail: whether the latents of an SAE of the demo's language model detect
what the corpus says is there, and whether one trained on sums of known features finds these. `docs/acceptance.md` holds
the method, the figures and what they do not show. The exit code is 0 for a pass, 1 for a fail, 2 for a mistake.

Further arguments are overrides of the SAE's run, e.g. `python -m saepipe.demo.acceptance run.dir=runs/k16 sae.k=16`.
"""

import copy
import json
import logging
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from saepipe import durable, entry
from saepipe.demo.pipeline import run_verbs
from saepipe.errors import UserError
from saepipe.runs import Run

if TYPE_CHECKING:
    from saepipe.demo.labelled_tokens import LabelledTokens
    from saepipe.demo.truth import Concepts, Firings

log = logging.getLogger(__name__)

VERBS = ("cache", "train", "evaluate")
SEED = 2026
"""Seed of the corpus that is judged on; no document of it was used to train the model or the SAE, or to choose keys."""
STRONG = 0.5
"""The bar's threshold: activations above this share of a latent's maximum."""


@dataclass(frozen=True)
class Criterion:
    """One line of the verdict."""

    what: str
    value: float
    at_least: float | None = None
    below: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the value is where it has to be; NaN never is."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.below is None or self.value < self.below
        )


@dataclass(frozen=True)
class World:
    """Known features, and the training of an SAE on their sums: that of `docs/ground_truth.md`, in one world."""

    n_features: int = 1024
    d: int = 128
    d_sae: int = 256
    k: float = 5
    batch_tokens: int = 512
    depth: int = 3
    steps: int = 5000
    lr: float = 1e-3
    scored_tokens: int = 50_000
    seed: int = 0


def acceptance(overrides: Sequence[str] = (), *, documents: int = 6000, world: World = World()) -> dict[str, Any]:
    """Train the SAEs where that is not done, measure them and their controls, and judge.

    Args:
        overrides: `key=value` overrides of `+experiment=acceptance`.
        documents: Documents of the corpus to judge on, half of them for choosing.
        world: The known features.

    Returns:
        What `<run.dir>/acceptance.json` holds: `passed`, `criteria`, `demo` (`trained`, `untrained`, `shuffled`) and
        `superposition` (`trained`, `untrained`).

    Raises:
        UserError: A mistake in the overrides, or a folder of another run.
    """
    config = entry.load_config("train", ["+experiment=acceptance", *overrides])
    if config.sae.architecture != "topk":
        raise UserError(
            f"sae={config.sae.architecture} has another L0 before training than after it, so that the control would "
            "prove nothing; give sae=topk"
        )
    run = Run(config.run.dir)
    evaluated = run_verbs("acceptance", VERBS, overrides)["evaluate"]
    log.info(
        "\nThe targets above are those of large models' SAEs, and none of what passes here (docs/acceptance.md).\n"
        "Judging %s on %s documents, and an SAE of known features",
        *(run.folder, f"{documents:,}"),
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        beside = process.submit(judge_superposition, world)
        demo = judge_demo(run, documents)
        superposition = beside.result()
    result = judged(demo, evaluated, superposition)
    durable.write_text(run.folder / "acceptance.json", json.dumps(result, indent=1))
    return result


def judge_demo(run: Run, documents: int) -> dict[str, Any]:
    """Measure the SAE of a finished run, the same SAE before training, and the trained one against false labels."""
    import torch

    from saepipe.demo import corpus
    from saepipe.demo.labelled_tokens import LabelledTokens
    from saepipe.demo.truth import Firings
    from saepipe.language_model import LanguageModel

    sae = run.load_sae()
    hook = sae.metadata["hook_name"]
    model = LanguageModel.open(entry.read_config(run.folder / "config.yaml").model)
    tokens = LabelledTokens.read(model, hook, islice(corpus.documents(SEED), documents))
    untrained = copy.deepcopy(sae)
    untrained.initialise(torch.Generator().manual_seed(SEED), mean=tokens.activations.mean(0))
    firings, before = (Firings.of(one, tokens.activations) for one in (sae, untrained))
    return {
        "documents": documents,
        "tokens": len(tokens.document),
        "hook": hook,
        "architecture": sae.cfg.architecture,
        "d_sae": sae.d_sae,
        "trained": _found(firings, tokens, labels=True),
        "untrained": _found(before, tokens),
        "shuffled": _found(firings, tokens.shifted()),
    }


def _found(firings: "Firings", tokens: "LabelledTokens", *, labels: bool = False) -> dict[str, Any]:
    """Measure one SAE: its shares, and with `labels` the best latent of each label and the concept of each latent."""
    from saepipe.demo.truth import THRESHOLDS, Truth

    truth = Truth(firings, tokens)
    found: dict[str, Any] = {
        "l0": len(firings.token) / max(len(tokens.document), 1),
        "live": int(truth.live.sum()),
        "shares": [
            _share(truth.judge(threshold, identity=identity), threshold, identity)
            for identity in (True, False)
            for threshold in THRESHOLDS
        ],
    }
    if labels:
        best = truth.best_latents()
        concepts = truth.judge(STRONG, identity=True)
        found["mean_f1"] = sum(one.f1 for one in best) / max(len(best), 1)
        found["best_latents"] = [asdict(one) for one in best]
        found["concepts"] = {latent: concepts.concept_of(latent) for latent in truth.live.nonzero()[:, 0].tolist()}
    return found


def _share(concepts: "Concepts", threshold: float, identity: bool) -> dict[str, Any]:
    low, high = concepts.interval
    return {
        "concepts": "labels and tokens" if identity else "labels",
        "threshold": threshold,
        "share": concepts.share,
        "low": low,
        "high": high,
        "judged": int(concepts.judged.sum()),
        "counted": concepts.counted,
    }


def judge_superposition(world: World) -> dict[str, Any]:
    """Train an SAE on sums of known features, and score it and the one that it was before."""
    import torch

    from saepipe.config import OptimConfig
    from saepipe.known_features import Features
    from saepipe.point import Point
    from saepipe.saes.batchtopk import BatchTopKConfig, BatchTopKSAE
    from saepipe.superposition import Superposition, score

    torch.set_num_threads(1)  # what is computed here is too small for several
    features = Features.drawn(world.n_features, world.d, seed=world.seed, depth=world.depth)
    data = Superposition(features, world.seed, world.batch_tokens)
    cfg = BatchTopKConfig(d_sae=world.d_sae, k=world.k, dead_after_tokens=400 * world.batch_tokens)
    sae = BatchTopKSAE(cfg, world.d)
    first = torch.cat([data.batch(number).x for number in range(10)])
    sae.initialise(
        torch.Generator().manual_seed(world.seed),
        mean=first.mean(0),
        norm_scale=world.d**0.5 / float(first.norm(dim=1).mean()),
    )
    before = score(sae, data, tokens=world.scored_tokens)
    point = Point(sae, OptimConfig(lr=world.lr, lr_decay_steps=world.steps // 3), total_steps=world.steps)
    point.make_optimizer()
    for step in range(world.steps):
        x = data.batch(step).x
        point.take_step(x, x, step, measure=False)
    return {"world": asdict(world), "trained": score(sae, data, tokens=world.scored_tokens), "untrained": before}


def judged(demo: dict[str, Any], evaluated: dict[str, Any], superposition: dict[str, Any]) -> dict[str, Any]:
    """Hold what was measured against the bars; `docs/acceptance.md` says where each comes from."""
    trained, untrained, shuffled = (_strong(demo[which]) for which in ("trained", "untrained", "shuffled"))
    known, start = superposition["trained"], superposition["untrained"]
    criteria = [
        Criterion("demo: live latents interpretable, lower limit", trained["low"], at_least=0.70),
        Criterion("demo: the same, SAE before training, upper limit", untrained["high"], below=0.15),
        Criterion("demo: the same, labels of other tokens, upper limit", shuffled["high"], below=0.05),
        Criterion("demo: CE score", evaluated["ce_loss_score"], at_least=0.95),
        Criterion("superposition: MCC", known["mcc"], at_least=0.70),
        Criterion("superposition: F1", known["f1"], at_least=0.60),
        Criterion("superposition: uniqueness", known["uniqueness"], at_least=0.90),
        Criterion("superposition: MCC, SAE before training", start["mcc"], below=0.40),
    ]
    return {
        "passed": all(one.passed for one in criteria),
        "criteria": [{**asdict(one), "passed": one.passed} for one in criteria],
        "evaluated": evaluated,
        "demo": demo,
        "superposition": superposition,
    }


def _strong(found: dict[str, Any]) -> dict[str, Any]:
    """Pick the share that the bar is about."""
    return next(one for one in found["shares"] if one["threshold"] == STRONG and one["concepts"] == "labels and tokens")


def table(result: dict[str, Any]) -> str:
    """Lay out the figures and the verdict for the terminal."""
    demo, evaluated = result["demo"], result["evaluated"]
    trained = demo["trained"]
    columns = [demo[which]["shares"] for which in ("trained", "untrained", "shuffled")]
    lines = [
        f"{demo['architecture']}, {demo['d_sae']:,} latents, {trained['live']:,} of them live, on {demo['hook']}: "
        f"L0 {evaluated['l0']:.1f}, explained variance {evaluated['explained_variance']:.3f}, "
        f"CE score {evaluated['ce_loss_score']:.3f}",
        f"on {demo['tokens']:,} tokens of {demo['documents']:,} new documents, "
        f"a label's best latent has a mean F1 of {trained['mean_f1']:.3f}",
        "",
        f"{'live latents that are monosemantic':<48}{'trained':>22}{'untrained':>11}{'false labels':>14}",
    ]
    for ours, before, false in zip(*columns, strict=True):
        above = "every firing" if not ours["threshold"] else f"above {ours['threshold']:g} of the maximum"
        interval = f"{ours['share']:.1%} ({100 * ours['low']:.1f}-{100 * ours['high']:.1f})"
        what = f"{ours['concepts']}, {above}"
        lines.append(f"  {what:<46}{interval:>22}{before['share']:>11.1%}{false['share']:>14.1%}")
    lines.append("")
    for one in result["criteria"]:
        bar = f"at least {one['at_least']:.2f}" if one["at_least"] is not None else f"below {one['below']:.2f}"
        lines.append(f"  {'pass' if one['passed'] else 'FAIL'}  {one['what']:<54}{one['value']:.3f}, {bar}")
    return "\n".join([*lines, "", "PASS" if result["passed"] else "FAIL"])


def main() -> None:
    """Run it from the command line."""
    entry.prepare_process()
    with entry.polite_end():
        result = acceptance(sys.argv[1:])
        log.info("\n%s", table(result))
        sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
