"""The whole train verb over its step alone: what stream, logging and checkpoints cost.

The verb runs in a process of its own, in `main`: it takes turns with the step alone, and waits before a step
until it is told to go on. Its threads wait as well, so that all its work falls into its own turns.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saepipe.bench_figure import Figure, speed
from saepipe.bench_step import N_BATCHES, first_task, save_batches
from saepipe.bench_store import HOOK, synthetic
from saepipe.config import RunConfig
from saepipe.contest import Contestant, answering, in_turns
from saepipe.shard import DTYPES
from saepipe.store import Store

TURN_STEPS = 25
"""Steps of a turn, as many as from one row of metrics to the next."""
CHECKPOINT_STEPS = 50
"""Steps between two checkpoints: twenty times as often as by default."""
PROGRAM = (
    "-c",
    "import time, lightning.pytorch; now = time.perf_counter(); from saepipe.bench_train import main; main(now)",
)
"""The verb, as an interpreter's arguments: lightning is imported before all else, and the clock starts."""
_STORE_WINDOWS = 1.1
"""Windows that a store fills, of which the first is read before the first step; but two batches at least."""


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Have the verb and the step alone take turns with TopK, and compare all of their seconds."""
    rows = folder / "rows.safetensors"  # of the store's kind, which a step takes another time for than for features
    save_batches((torch.randn(config.bench.batch_tokens, config.bench.d_in) for _ in range(N_BATCHES)), rows)
    task = replace(first_task(config, folder), library="saepipe", batches=str(rows))
    keys = [f"train.log_every_steps={TURN_STEPS}", f"train.checkpoint_every_steps={CHECKPOINT_STEPS}"]
    store = random_store(config, folder)
    with (
        Contestant("saepipe's step", task.command()) as step,
        verb(config, store, folder / "run", *keys) as whole,
    ):
        contestants = {"step": step.ready(), "verb": whole.ready()}
        seconds = in_turns(contestants, config.bench.rounds, steps=TURN_STEPS)
    rates = {name: config.bench.batch_tokens * len(each) / sum(each) for name, each in seconds.items()}
    return [
        Figure(
            "train, tokens/s of the whole verb over its step alone",
            [rates["verb"] / rates["step"]],  # a checkpoint falls into some turns only, so the sums count
            {f"{name}_tokens_per_s": rate for name, rate in rates.items()},
            at_least=0.9,
            told=speed(rates["verb"]),
        )
    ]


def verb(config: RunConfig, store: Store, run_dir: Path, *keys: str, program: Sequence[str] = PROGRAM) -> Contestant:
    """Start a train job of TopK that goes on for ever.

    The first that one hears from it are the seconds from the time that `main` was given, with `PROGRAM` that of
    lightning's import, to the end of its first step and of what follows it.

    Args:
        config: The bench's run.
        store: What it trains on, as `random_store` makes it.
        run_dir: Its run folder.
        keys: More of its keys.
        program: The interpreter's arguments that run it.
    """
    bench = config.bench
    all_keys = [
        f"store.dir={store.folder}",
        f"run.dir={run_dir}",
        f"stream.hook={HOOK}",
        f"stream.batch_tokens={bench.batch_tokens}",
        f"stream.window_tokens={config.stream.window_tokens}",
        "sae=topk",
        f"sae.d_sae={bench.d_sae}",
        f"sae.k={bench.k}",
        f"trainer.accelerator={config.trainer.accelerator}",
        f"trainer.precision={config.trainer.precision}",
        f"train.tokens={10**12}",
        *keys,
    ]
    return Contestant("the train verb", [sys.executable, *program, *all_keys])


def random_store(config: RunConfig, folder: Path) -> Store:
    """Make a store of random rows that is a little larger than a window."""
    of_the_bench = replace(config, stream=replace(config.stream, batch_tokens=config.bench.batch_tokens))
    return synthetic(of_the_bench, folder, store_gb(config), config.bench.d_in)


def store_gb(config: RunConfig) -> float:
    """Return the size of that store in GB."""
    rows = max(_STORE_WINDOWS * config.stream.window_tokens, 2.1 * config.bench.batch_tokens)
    return rows * config.bench.d_in * DTYPES[config.store.dtype].itemsize / 1e9


class _Turns:
    """What waits until its turn comes."""

    def __init__(self, answer: Callable[[float], None], began: float) -> None:
        self._answer = answer
        self._left = 1  # steps of this turn
        self._began = began
        self._mine = threading.Event()
        self._mine.set()

    def before_step(self) -> None:
        """Wait, where the turn is over."""
        if not self._left:
            self._mine.clear()
            self._answer(_now() - self._began)
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self._left = json.loads(line)["steps"]
            self._began = _now()
            self._mine.set()
        self._left -= 1

    def before_block(self) -> None:
        """Wait while the turn is another's, in a thread of the stream."""
        self._mine.wait()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(began: float) -> None:
    """Be the train verb, whose steps wait for their turn.

    Args:
        began: Time of `time.perf_counter` from which the first step is timed.
    """
    from saepipe.background import Background
    from saepipe.point import Point
    from saepipe.train import main as train

    turns = _Turns(answering(), began)
    Point.take_step = _after(turns.before_step, Point.take_step)  # type: ignore[method-assign]
    Background.check = _after(turns.before_block, Background.check)  # type: ignore[method-assign]
    train()


def _after(wait: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a method wait before it does what it does."""

    def waits(*arguments: Any, **names: Any) -> Any:
        wait()
        return method(*arguments, **names)

    return waits
