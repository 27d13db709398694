"""The start of a train job: seconds from `import lightning` returning to the end of the first step.

Lightning is imported before all else, so that the command line, the composition of its keys, the store, the SAE, the
stream's first window and the step itself are all in it.
"""

from pathlib import Path

from saepipe.bench_figure import Figure
from saepipe.bench_train import random_store, verb
from saepipe.config import RunConfig


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Start jobs, one after the other."""
    store, seconds = random_store(config, folder), []
    for number in range(config.bench.rounds):
        with verb(config, store, folder / f"start-{number}") as job:
            seconds.append(job.hear())
    return [Figure("start, from lightning's import to the first step", seconds, {}, at_most=3.0, unit="s")]
