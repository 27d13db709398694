"""A grid in one job beside one of its points: what sharing a stream costs, and what it saves where the disk is slow.

Both are the train verb, and take turns. The slow disk is made by holding every read back, so that the rows come at a
third of the rate at which a point trains on them.
"""

import statistics
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from saepipe import bench_train
from saepipe.bench_figure import Figure, speed
from saepipe.bench_train import random_store, verb
from saepipe.config import RunConfig
from saepipe.contest import in_turns
from saepipe.store import Store

LRS = (1e-4, 2e-4, 3e-4, 4e-4)
"""Learning rates of the points, whose steps take as long as each other's."""
TURN_STEPS = 20
"""Steps of a turn, summed over the points."""
WINDOW_BATCHES = 8
"""Batches of a window: few, since what was read ahead hides how slow a disk is."""
SLOWER = 3


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Have a grid of four points and a run of one take turns, on a disk as it is and on a slow one."""
    seconds = _seconds(config, folder, None)
    rows_per_s = config.bench.batch_tokens / statistics.median(seconds["run"]) / SLOWER
    slow = _seconds(config, folder, rows_per_s)
    return [
        _figure(config, "grid, time of four points over that of four runs", seconds, 1.03),
        _figure(config, f"grid, the same on a disk of about 1/{SLOWER} of a run's rate", slow, 0.5),
    ]


def _seconds(config: RunConfig, folder: Path, rows_per_s: float | None) -> dict[str, list[float]]:
    """Return the seconds of a point's step, in each turn."""
    config = replace(config, stream=replace(config.stream, window_tokens=WINDOW_BATCHES * config.bench.batch_tokens))
    store = random_store(config, folder)
    program = bench_train.PROGRAM if rows_per_s is None else ("-m", "saepipe.bench_grid", str(rows_per_s))
    keys = {"run": f"optim.lr={LRS[0]}", "grid": f"grid.lr={[*LRS]}".replace(" ", "")}
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(verb(config, store, folder / f"{name}-{rows_per_s}", key, program=program))
            for name, key in keys.items()
        }
        contestants = {name: contestant.ready() for name, contestant in started.items()}
        return in_turns(contestants, config.bench.rounds, steps=TURN_STEPS)


def _figure(config: RunConfig, name: str, seconds: dict[str, list[float]], bar: float) -> Figure:
    rates = {side: config.bench.batch_tokens / statistics.median(each) for side, each in seconds.items()}
    return Figure(
        name,
        [grid / run for grid, run in zip(seconds["grid"], seconds["run"], strict=True)],
        {f"{side}_tokens_per_s": rate for side, rate in rates.items()},
        at_most=bar,
        told=f"{speed(rates['grid'])}, of all points; the run: {rates['run']:,.0f} tokens/s",
    )


def _on_a_slow_disk(rows_per_s: float) -> None:
    """Be the train verb on a disk that gives so many rows a second."""
    read, one_at_a_time, due_s = Store.read_block_into, threading.Lock(), 0.0

    def slowly(self: Store, *arguments: object, **names: object) -> int:
        nonlocal due_s
        with one_at_a_time:
            due_s = max(due_s, time.perf_counter())  # when the disk is free
            rows = read(self, *arguments, **names)  # type: ignore[arg-type]
            due_s += rows / rows_per_s
            time.sleep(max(0.0, due_s - time.perf_counter()))
        return rows

    Store.read_block_into = slowly  # type: ignore[method-assign]
    bench_train.main(time.perf_counter())


if __name__ == "__main__":
    rate = float(sys.argv.pop(1))
    _on_a_slow_disk(rate)
