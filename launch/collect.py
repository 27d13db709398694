"""Put the points of a sweep beside each other: `python -m launch.collect RUNS` writes sweep.csv and pareto.html.

Any folder with runs in it will do, however they were started.
"""

import argparse
import csv
import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import pareto
from saepipe import durable, entry
from saepipe.errors import UserError
from saepipe.runs import Run

log = logging.getLogger("saepipe.launch")

FIGURES = {
    "l0": "L0",
    "explained_variance": "explained variance",
    "ce_loss_score": "CE score",
    "kl_div_score": "KL score",
    "dead_fraction": "dead latents",
    "dense_fraction": "dense latents",
}
"""What is compared, as `saepipe.evaluate` names it -> its words."""


def collect(run_dir: str | Path) -> list[dict[str, Any]]:
    """Compare the points of a sweep.

    Args:
        run_dir: The folder that holds their folders; or that of a single run.

    Returns:
        A row for each point, in the order of their L0: its keys, its figures where it is evaluated, its state.

    Raises:
        UserError: There is no run, or its folder cannot be written.
    """
    root = Path(run_dir)
    folders = [root] if (root / "config.yaml").exists() else sorted(path.parent for path in root.glob("*/config.yaml"))
    if not folders:
        raise UserError(f"{root} holds no run; train some there first")
    rows = sorted(
        (_row(folder, root) for folder in folders), key=lambda row: (row.get("l0") is None, row.get("l0") or 0)
    )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with durable.disk_errors("runs", root):
        durable.write_text(root / "sweep.csv", text.getvalue())
        durable.write_text(root / "pareto.svg", pareto.picture(rows))
        durable.write_text(root / "pareto.html", pareto.page(root.name, rows))
    log.info("%s", table(rows))
    log.info("%s, %s", root / "sweep.csv", root / "pareto.html")
    return rows


def _row(folder: Path, root: Path) -> dict[str, Any]:
    """Read what a run is, and how it did."""
    run = Run(folder)
    summary, failure = run.summary(), run.failure()
    config = entry.read_config(run.config_file)
    named = dict(part.split("=", 1) for part in folder.name.split(",") if "=" in part) if folder != root else {}
    figures = _figures(folder / "eval" / "metrics.json")
    row: dict[str, Any] = {"point": folder.name, "state": _state(summary, failure, figures)}
    row |= {"architecture": config.sae.architecture, **named}
    row |= {name: figures.get(name) for name in FIGURES}
    targets: dict[str, dict[str, Any]] = figures.get("targets", {})
    row["targets_missed"] = "; ".join(name for name, target in targets.items() if not target["met"])
    row["cure"] = "; ".join(target["cure"] for target in targets.values() if target["cure"])
    row["dead_in_training"] = (summary or {}).get("metrics", {}).get("sparsity/dead_features")
    row["steps"] = (summary or {}).get("steps")
    row["tokens_per_s"] = (summary or {}).get("tokens_per_s")
    features = folder / "features" / "index.html"
    row["features"] = features.relative_to(root).as_posix() if features.exists() else None
    return row


def _figures(measured: Path) -> dict[str, Any]:
    """Read what evaluation measured; nothing where it did not, or left no whole file."""
    if not measured.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(measured.read_text())
        targets = found.get("targets", {}).values()
        if all(math.isfinite(found.get(name) or 0) for name in FIGURES) and all(
            target.keys() >= {"met", "cure"} for target in targets
        ):
            return found
        why: object = "it holds no figures"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = error
    log.warning("%s is damaged (%s); python -m saepipe.evaluate makes it anew", measured, why)
    return {}


def _state(summary: dict[str, Any] | None, failure: str | None, figures: dict[str, Any]) -> str:
    if failure is not None:
        return "frozen"
    if summary is None:
        return "not finished"
    return "evaluated" if figures else "trained"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay rows out for the terminal."""
    head = ("point", "state", *FIGURES.values())
    cells = [head] + [(row["point"], row["state"], *(_judged(name, row) for name in FIGURES)) for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    if any(row["targets_missed"] for row in rows):
        lines.append("* misses the usual target; pareto.html says which key to change")
    return "\n".join(lines)


def _judged(name: str, row: dict[str, Any]) -> str:
    missed = name in row["targets_missed"].split("; ")
    return f"{pareto.shown(name, row[name])}{'*' if missed else ''}"


def main() -> None:
    """Compare runs named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.collect", description=__doc__)
    parser.add_argument("runs", help="the folder that holds the runs")
    given = parser.parse_args()
    entry.prepare_process()
    with entry.polite_end():
        collect(given.runs)


if __name__ == "__main__":
    main()
