"""Figures of evaluated runs, laid out for the terminal: one run with its targets, or several beside each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saepipe.targets import TARGETS, judged

if TYPE_CHECKING:
    from saepipe.saes.config import SAEConfig

FIGURES = {
    "l0": "L0",
    "explained_variance": "explained variance",
    "cosine_similarity": "cosine similarity",
    "relative_reconstruction_bias": "reconstruction bias",
    "ce_loss_score": "CE score",
    "ce_loss_score_mean_ablation": "CE score, against the mean",
    "kl_div_score": "KL score",
    "dead_fraction": "dead latents",
    "dense_fraction": "dense latents",
    "ce_loss_without_sae": "CE loss, model alone",
    "ce_loss_with_sae": "CE loss, with the SAE",
    "ce_loss_with_ablation": "CE loss, hook zeroed",
    "ce_loss_with_mean_ablation": "CE loss, hook at its mean",
    "clustered_fraction": "latents with a near copy",
    "split_fraction": "split latents",
    "absorption_fraction": "absorption",
}
"""Figures of a run's table -> their words; metrics.json has more."""
_COLUMNS = ("l0", "explained_variance", "ce_loss_score", "kl_div_score", "dead_fraction", "dense_fraction")


def verdicts(result: dict[str, Any], cfg: "SAEConfig") -> dict[str, dict[str, Any]]:
    """Compare a run's figures with every target.

    Args:
        result: What evaluation found.
        cfg: The SAE's configuration.

    Returns:
        Name of the figure -> target (the range in words), met, cure (empty where it is met).
    """
    return {
        verdict.target.name: {"target": verdict.target.range, "met": verdict.met, "cure": verdict.cure}
        for verdict in judged(result, cfg)
    }


def figures(result: dict[str, Any]) -> str:
    """Lay out one run: every figure with its interval and its target, then what to change."""
    step = "" if result["step"] is None else f" at step {result['step']:,}"
    head = f"{result['run_dir']}{step}: {result['tokens']:,} tokens of {result['documents']:,} held-out documents"
    rows = []
    for name, words in FIGURES.items():
        low_high = result["confidence"].get(name)
        interval = f"{shown(name, low_high[0])} to {shown(name, low_high[1])}" if low_high else ""
        target = result["targets"].get(name)
        told = f"{'met' if target['met'] else 'missed'}: {target['target']}" if target else ""
        rows.append((words, shown(name, result[name]), interval, told))
    body = _aligned([("", "", "95 % interval", "target"), *rows])
    return "\n".join([head, *(f"  {line}" for line in body), *_cures(result)])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Lay out several runs by rising L0, those that no other beats marked; `figures` tells what to change in each."""
    ordered = sorted(results, key=lambda result: result["l0"])
    rows = [
        (
            result["run_dir"],
            *(_judged(name, result) for name in _COLUMNS),
            f"{sum(target['met'] for target in result['targets'].values())} of {len(TARGETS)}",
            "best" if not any(_beats(other, result) for other in ordered) else "",
        )
        for result in ordered
    ]
    head = ("run", *(FIGURES[name] for name in _COLUMNS), "targets met", "at its L0")
    ranges = ("target", *(_range(name) for name in _COLUMNS), "", "")
    note = "* misses the target; best: no other run has a higher CE score with as few active latents"
    return "\n".join([*_aligned([head, ranges, *rows]), note])


def shown(name: str, value: float) -> str:
    """Write a figure as a reader wants it."""
    return f"{value:.2%}" if name.endswith("fraction") else f"{value:.4g}"


def _judged(name: str, result: dict[str, Any]) -> str:
    missed = name in result["targets"] and not result["targets"][name]["met"]
    return f"{shown(name, result[name])}{'*' if missed else ''}"


def _range(name: str) -> str:
    return next((target.range for target in TARGETS if target.name == name), "")


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, theirs = ((result["l0"], -result["ce_loss_score"]) for result in (one, other))
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def _cures(result: dict[str, Any]) -> list[str]:
    """Say, for each target that a run misses, which key to change."""
    return [
        f"{FIGURES[name]} {shown(name, result[name])}, target {target['target']}: {target['cure']}"
        for name, target in result["targets"].items()
        if target["cure"]
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
