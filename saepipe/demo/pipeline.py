"""Every verb on the embedded model, one after the other, and a table of what came out."""

import importlib
import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from saepipe import entry

log = logging.getLogger(__name__)

VERBS = ("cache", "train", "evaluate", "analyze")


def demo(overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Run every verb with `+experiment=demo`.

    Args:
        overrides: Further `key=value` overrides, given to every verb.

    Returns:
        What each verb returned, by its name.
    """
    return run_verbs("demo", VERBS, overrides)


def run_verbs(experiment: str, verbs: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Run verbs one after the other with `+experiment=<experiment>`; return what each returned, by its name."""
    results = {}
    for number, verb in enumerate(verbs, 1):
        arguments = [f"+experiment={experiment}", *overrides]
        log.info("\n[%s/%s] python -m saepipe.%s %s", number, len(verbs), verb, " ".join(arguments))
        # A process per verb: training, above all, starts without the language-model libraries that caching loaded.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results[verb] = process.submit(run_verb, verb, arguments).result()
    return results


def run_verb(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run one verb in this process, as its command line would."""
    entry.prepare_process()
    function = getattr(importlib.import_module(f"saepipe.{verb}"), verb)
    return function(entry.load_config(verb, overrides))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Sum up the demo for the terminal."""
    evaluated = results["evaluate"]
    rows = [
        ("L0", f"{evaluated['l0']:.1f}"),
        ("explained variance", f"{evaluated['explained_variance']:.3f}"),
        ("CE score", f"{evaluated['ce_loss_score']:.3f}"),
        ("dead latents", f"{evaluated['dead_fraction']:.1%}"),
        *((f"{verb}, tokens/s", _rate(results[verb])) for verb in VERBS),
        ("store", results["cache"]["dir"]),
        ("SAE", results["train"]["sae"]),
        ("features", results["analyze"]["page"]),
    ]
    width = max(len(name) for name, _ in rows)
    held_out = f"{evaluated['tokens']:,} held-out tokens"
    return "\n".join(
        [f"saepipe demo, measured on {held_out}", *(f"  {name:<{width}}  {value}" for name, value in rows)]
    )


def _rate(result: dict[str, Any]) -> str:
    rate = result["tokens_per_s"]
    return f"{rate:,.0f}" if rate else "done before"
