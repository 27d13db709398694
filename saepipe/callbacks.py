"""What is due every so many steps of a run: measurements on held-out rows, exports, checkpoints.

All ranks decide alike whether something is due; the first rank does it.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from saepipe import checkpoints
from saepipe.module import SAEModule
from saepipe.point import Point
from saepipe.ranks import Ranks
from saepipe.runs import Run


class Measurements(pl.Callback):
    """Measures every so many steps and at the end.

    Args:
        measure: Number of a point, and the point -> its figures by name.
        every_steps: Steps between two measurements.
        ranks: The ranks.
    """

    def __init__(self, measure: Callable[[int, Point], dict[str, float]], every_steps: int, ranks: Ranks) -> None:
        self._measure, self._every_steps, self._ranks = measure, every_steps, ranks

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure where it is due, and log it beside the step's own figures."""
        module = _ours(pl_module)
        if module.steps_done % self._every_steps and module.steps_done != module.total_steps:
            return
        for at, point in module.unbroken() if self._ranks.rank == 0 else ():
            module.log_row(at, self._measure(at, point), step=module.steps_done)


class Exports(pl.Callback):
    """Exports the SAEs as they are after some of the steps.

    Args:
        export: Number of a point, the point and the steps done -> nothing; writes it.
        steps: After which.
        ranks: The ranks.
    """

    def __init__(self, export: Callable[[int, Point, int], object], steps: Collection[int], ranks: Ranks) -> None:
        self._export, self._steps, self._ranks = export, steps, ranks

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Export where it is due."""
        module = _ours(pl_module)
        if module.steps_done not in self._steps:
            return
        module.settle()
        for at, point in module.unbroken() if self._ranks.rank == 0 else ():
            self._export(at, point, module.steps_done)


class Checkpoints(pl.Callback):
    """Saves every so many steps, at the end and where a signal stops the run; keeps the newest two.

    Args:
        runs: Where each point's go.
        every_steps: Steps between two.
        ranks: The ranks.
        identity: Identity of the store, which a checkpoint is of use with only.
    """

    def __init__(self, runs: Sequence[Run], every_steps: int, ranks: Ranks, identity: str) -> None:
        self._runs, self._every_steps, self._ranks, self._identity = runs, every_steps, ranks, identity

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save where it is due."""
        module = _ours(pl_module)
        if module.steps_done % self._every_steps and module.steps_done != module.total_steps and not module.stopped:
            return
        module.settle()  # not what a loss that nobody has looked at yet would be resumed into
        module.refuse_non_finite()
        if self._ranks.rank == 0:
            states = {
                self._runs[at].checkpoints: {
                    **point.state(),
                    "steps_done": module.steps_done,
                    "last_metrics": module.last_metrics[at],
                    "store_identity": self._identity,
                }
                for at, point in module.unbroken()
            }
            checkpoints.save(states, module.steps_done)
            for at, why in module.failures.items():
                if self._runs[at].failure() is None:
                    self._runs[at].fail(why)
        if module.stopped:  # a scheduler ends all ranks when one has ended
            self._ranks.sum(torch.zeros(1, device=module.device))


def _ours(module: pl.LightningModule) -> SAEModule:
    assert isinstance(module, SAEModule)
    return module
