"""A grid in one job against its points one after the other: what sharing a stream costs, and what it saves.

Each side is the train verb in processes of its own. The slow disk is made by holding every read back, so that the rows
come at a third of the rate at which a point trains on them.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

from saepipe.bench_figure import Figure
from saepipe.bench_store import HOOK, WIDTH, synthetic
from saepipe.config import RunConfig
from saepipe.shard import DTYPES
from saepipe.store import Store

COEFFICIENTS = (1, 2, 4, 8)
STEPS = 60
BATCH = 1024


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Train four points in one job and in four, on a disk as it is and on a slow one."""
    gb = 1.1 * STEPS * BATCH * WIDTH * DTYPES[config.store.dtype].itemsize / 1e9
    store = synthetic(config, folder, gb)
    rounds = [_Round(store, folder / f"round-{number}") for number in range(config.bench.rounds)]
    made_of = {
        "grid_s": rounds[-1].grid_s,
        "points_s": sum(rounds[-1].points_s),
        "start_up_s": rounds[-1].start_up_s,
        "slow_grid_s": rounds[-1].slow_grid_s,
        "slow_points_s": rounds[-1].slow_points_s,
    }
    return [
        Figure(
            "grid, time of four points over that of four runs less three start-ups",
            [each.grid_s / (sum(each.points_s) - (len(COEFFICIENTS) - 1) * each.start_up_s) for each in rounds],
            made_of,
            at_most=1.03,
        ),
        Figure(
            "grid, the same over the runs as they are, on a disk of a third of the step's rate",
            [each.slow_grid_s / each.slow_points_s for each in rounds],
            made_of,
            at_most=0.5,
        ),
    ]


class _Round:
    """One turn of everything."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        one, grid = f"sae.l1_coefficient={COEFFICIENTS[0]}", f"grid.l1_coefficient={[*COEFFICIENTS]}".replace(" ", "")
        self.start_up_s = self._train("start", one, steps=1)
        self.points_s = [self._train(f"point-{value}", f"sae.l1_coefficient={value}") for value in COEFFICIENTS]
        self.grid_s = self._train("grid", grid)
        rate = STEPS * BATCH / (min(self.points_s) - self.start_up_s) / 3
        slow = self._train("slow", one, rows_per_s=rate)
        self.slow_points_s = len(COEFFICIENTS) * slow  # they wait for the disk, so one is as long as another
        self.slow_grid_s = self._train("slow-grid", grid, rows_per_s=rate)

    def _train(self, name: str, key: str, steps: int = STEPS, rows_per_s: float | None = None) -> float:
        """Return the seconds that a train command takes, from its start to its end."""
        module = ["saepipe.train"] if rows_per_s is None else ["saepipe.bench_grid", str(rows_per_s)]
        keys = [
            f"store.dir={self._store.folder}",
            f"run.dir={self._folder / name}",
            f"stream.hook={HOOK}",
            f"stream.batch_tokens={BATCH}",
            f"stream.window_tokens={8 * BATCH}",
            "sae=standard",
            f"sae.d_sae={2 * WIDTH}",
            f"train.tokens={steps * BATCH}",
            key,
        ]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", *module, *keys], check=True, capture_output=True)
        return time.perf_counter() - begin


def _on_a_slow_disk(rows_per_s: float) -> None:
    """Be the train verb on a disk that gives so many rows a second."""
    from saepipe.train import main

    read, one_at_a_time = Store.read_block_into, threading.Lock()

    def slowly(self: Store, *arguments: object, **names: object) -> int:
        with one_at_a_time:
            rows = read(self, *arguments, **names)  # type: ignore[arg-type]
            time.sleep(rows / rows_per_s)
        return rows

    Store.read_block_into = slowly  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    rate = float(sys.argv.pop(1))
    _on_a_slow_disk(rate)
