"""The latents of a trained SAE that best separate two sets of texts, with confidence intervals.

    python -m saepipe.contrast run.dir=runs/x contrast.a=honest.txt contrast.b=deceptive.txt

Heavy imports stand inside the functions, so that `--help` and a mistyped key answer at once.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import entry
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained_memory

if TYPE_CHECKING:
    from saepipe.separation import Separation, Summary

log = logging.getLogger(__name__)

FEW = 10
"""Texts of a set below which a warning is given."""


def contrast(config: RunConfig) -> dict[str, Any]:
    """Compare two sets of texts latent by latent and write the best to `contrast/` in the run's folder.

    Args:
        config: `run.dir` names the run, or an exported SAE; the contrast group says what to compare.

    Returns:
        a and b (path, texts), measure, resamples, seed, tested (latents that fired in any text), latents (of each of
        the best: latent, label where `saepipe.analyze` gave one, auroc and auroc_interval, difference and
        difference_interval, mean_a, mean_b, active_a and active_b (shares of texts), p_adjusted), file. What the
        figures mean: `saepipe.separation`.

    Raises:
        UserError: No finished run, a set that is missing or has fewer than two texts, an empty or too long text.
    """
    from saepipe import reading
    from saepipe.separation import Summary, separate
    from saepipe.trained import Trained

    asked = entry.settled(config).contrast
    sets = {"a": asked.a, "b": asked.b}
    texts = {}
    for name, path in sets.items():
        if path is None:
            raise UserError(f"contrast.{name} is not set; give a local file or folder with one set of texts")
        texts[name] = reading.texts_of(path, asked.column, f"contrast.{name}", "contrast.column")
        if len(texts[name]) < 2:
            raise UserError(
                f"contrast.{name}={path} holds one text; give several (paragraphs of a txt, rows of a jsonl), since "
                "texts are what is compared"
            )
        if len(texts[name]) < FEW:
            log.warning(
                "contrast.%s=%s holds %d texts, with which intervals are wide and p-values high; more are better",
                name, path, len(texts[name]),
            )  # fmt: skip
    trained = Trained.open(config)
    found = {
        name: reading.Texts(trained.model, those, name=f"contrast.{name}", truncate=asked.truncate)
        for name, those in texts.items()
    }
    with explained_memory("contrast", contrast__batch_prompts=asked.batch_prompts):
        a, b = (
            Summary.measure(trained.model, trained.sae, those.batches(asked.batch_prompts), asked.measure)
            for those in found.values()
        )
    with explained_memory("contrast", contrast__resamples=asked.resamples):
        separation = separate(a.values, b.values, resamples=asked.resamples, seed=asked.seed)
    result: dict[str, Any] = {
        "run_dir": str(trained.run.folder),
        "a": {"path": asked.a, "texts": len(texts["a"])},
        "b": {"path": asked.b, "texts": len(texts["b"])},
        "measure": asked.measure,
        "resamples": asked.resamples,
        "seed": asked.seed,
        "tested": int(((a.active.sum(0) + b.active.sum(0)) > 0).sum()),
        "latents": [
            {"latent": latent, "label": trained.labels.get(latent), **_row(latent, a, b, separation)}
            for latent in separation.best(asked.latents)
        ],
    }
    stems = [Path(str(path)).stem for path in sets.values()]
    result["file"] = str(trained.write("contrast", stems, result))
    log.info("%s", table(result))
    return result


def _row(latent: int, a: "Summary", b: "Summary", separation: "Separation") -> dict[str, Any]:
    return {
        "auroc": float(separation.auroc[latent]),
        "auroc_interval": separation.auroc_interval[:, latent].tolist(),
        "difference": float(separation.difference[latent]),
        "difference_interval": separation.difference_interval[:, latent].tolist(),
        "mean_a": float(a.values[:, latent].mean()),
        "mean_b": float(b.values[:, latent].mean()),
        "active_a": float(a.active[:, latent].mean()),
        "active_b": float(b.active[:, latent].mean()),
        "p_adjusted": float(separation.p_adjusted[latent]),
    }


def table(result: dict[str, Any]) -> str:
    """Lay the best latents out for the terminal."""
    from saepipe import trained

    a, b = result["a"], result["b"]
    head = ["AUROC", "95 % interval", "A - B", "95 % interval", "active in A", "in B", "p, all", "latent", ""]
    rows = [
        [
            f"{one['auroc']:.3f}",
            _interval(one["auroc_interval"], ".3f"),
            f"{one['difference']:+.4g}",
            _interval(one["difference_interval"], "+.4g"),
            f"{one['active_a']:.0%}",
            f"{one['active_b']:.0%}",
            f"{one['p_adjusted']:.3f}",
            str(one["latent"]),
            one["label"] or "",
        ]
        for one in result["latents"]
    ]
    title = (
        f"A: {a['texts']} texts of {a['path']}; B: {b['texts']} texts of {b['path']}; {result['measure']} activation "
        "in each text"
    )
    if not rows:
        return f"{title}\nNo latent tells one from the other.\n{result['file']}"
    return "\n".join(
        [
            title,
            trained.table([head, *rows]),
            "AUROC: how often a text of A has the higher activation than one of B; under 0.5, it is B's that has it.",
            f"Intervals are for one latent that was chosen beforehand. {result['tested']:,} were looked at: the best "
            "of so many look better than they are.",
            f"p, all: how often chance gives any of them an AUROC as far from 0.5 ({result['resamples']:,} random "
            "partitions of the texts). Test what you find on other texts.",
            result["file"],
        ]
    )


def _interval(ends: list[float], form: str) -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def main() -> None:
    """Run the verb from the command line."""
    entry.main("contrast", contrast)


if __name__ == "__main__":
    main()
