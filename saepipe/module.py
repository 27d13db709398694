"""The training loop's body: `SAEModule` drives points under Lightning, from streams of activations.

The module's own count of optimizer steps, `steps_done`, is the position in the streams: it is checkpointed with the
weights, so a resumed run reads the batches that an uninterrupted one would have read.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from tqdm import tqdm

from saepipe.errors import UserError
from saepipe.loggers import log_density
from saepipe.point import Part, Point
from saepipe.ranks import Ranks
from saepipe.stream import Stream
from saepipe.watch import News, Watch

log = logging.getLogger(__name__)

_FEW = 3
"""Points whose figures a progress bar has room for."""


class Batches:
    """The batches that a run still needs, as the iterable that Lightning asks for."""

    def __init__(self, streams: Sequence[Stream], module: "SAEModule") -> None:
        self._streams, self._module = streams, module

    def __iter__(self) -> Iterator[list[Tensor | Part]]:
        """Read on from the module's own step; yields this rank's share of the batch of each stream."""
        streams = [stream.iterate(start=self._module.steps_done) for stream in self._streams]
        for _ in range(self._module.steps_done, self._module.total_steps):
            yield [next(batches) for batches in streams]


class SAEModule(pl.LightningModule):
    """Trains one SAE, or several from the same batches; counts steps itself, so that all of it is in the checkpoint.

    Args:
        points: What is trained.
        streams: Number of the stream that each point's batches come from.
        names: What the points are called.
        ranks: The processes that share each batch.
        total_steps: Steps of the whole run.
        steps_done: Steps done before.
        log_every_steps: Steps between two rows of metrics.
    """

    def __init__(
        self,
        points: Sequence[Point],
        streams: Sequence[int],
        names: Sequence[str],
        ranks: Ranks,
        *,
        total_steps: int,
        steps_done: int,
        log_every_steps: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # steps are counted, and the rate is set, by this module and its points
        self.points = nn.ModuleList(points)
        self.watch = Watch(ranks)
        self.total_steps, self.steps_done, self.log_every_steps = total_steps, steps_done, log_every_steps
        self.point_loggers: list[list[Logger]] = [[] for _ in points]
        """Where each point's metrics go; on other ranks than 0, nowhere."""
        self.last_metrics: list[dict[str, float]] = [{} for _ in points]
        self.failures: dict[int, str] = {}
        """Numbers of the points that are frozen, since something was not finite -> what, and the cure."""
        self.bar: tqdm[Any] | None = None
        """Progress, for whoever waits."""
        self.stopped: int | None = None
        """The signal that ended the run before its last step."""
        self._ranks, self._streams, self._names = ranks, streams, names
        self._last_log: tuple[float, int] | None = None

    @property
    def trained(self) -> list[Point]:
        """The points."""
        return [point for point in self.points if isinstance(point, Point)]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Build a fused Adam for each point."""
        return [point.make_optimizer() for point in self.trained]

    def on_train_start(self) -> None:
        """Join the other ranks, now that everything is on its device."""
        for point in self.trained:
            point.join(self._ranks)

    def training_step(self, batch: list[Tensor | Part], batch_idx: int) -> None:
        """Take one optimizer step of each point on one global batch, of which each stream has rows of its own width."""
        parts = [_part(rows, self.trained[0].sae.W_enc.dtype) for rows in batch]
        logs = (self.steps_done + 1) % self.log_every_steps == 0 or self.steps_done + 1 == self.total_steps
        terms: dict[tuple[int, str], Tensor] = {}
        for at, point in self.unbroken():
            x, y = parts[self._streams[at]]
            done, norm = point.take_step(x, y, self.steps_done, measure=logs)
            terms |= {(at, f"losses/{name}"): term for name, term in done.terms.items()}
            terms[at, "details/grad_norm"] = norm
            if logs:
                self._log(at, point.metrics(done, norm, self.steps_done), done.tokens)
        news = self.watch.tell(self.steps_done, terms)
        self.steps_done += 1
        if logs:
            self._last_log = (time.perf_counter(), self.steps_done)
        if self.bar is not None:
            self.bar.update(done.tokens)
            self.bar.set_postfix(self._bar_values(), refresh=False)
        self._heed(news)
        if self.steps_done == self.total_steps:
            self.settle()

    def settle(self) -> None:
        """Wait for the news of the last step, for whoever is about to save its outcome."""
        self._heed(self.watch.read())

    def unbroken(self) -> list[tuple[int, Point]]:
        """The points that go on, with their numbers."""
        return [(at, point) for at, point in enumerate(self.trained) if at not in self.failures]

    def refuse_non_finite(self) -> None:
        """Freeze the points whose weights are not finite, which would make every resume fail as well.

        Raises:
            UserError: No point is left.
        """
        for at, point in self.unbroken():
            if (name := point.not_finite()) is not None:
                self._fail(at, f"{name} is not finite after step {self.steps_done}")

    def _heed(self, news: News | None) -> None:
        """Freeze the points whose loss was not finite, and stop where a signal asked for it.

        Raises:
            UserError: No point is left; the message names step, term and batch.
        """
        if news is None:
            return
        for at, name in news.broken:
            if at not in self.failures:
                self._fail(at, f"{name} was not finite at step {news.step + 1} (batch {news.step} of the stream)")
        if news.signal and not self.stopped:
            self.stopped = news.signal
            self.trainer.should_stop = True

    def _fail(self, at: int, what: str) -> None:
        point = self.trained[at]
        point.broken.fill_(1.0)
        self.failures[at] = f"{what}; {point.cure()}"
        if len(self.failures) == len(self.trained):
            raise UserError(self.failures[at])
        log.warning("%s is frozen, the others go on: %s", self._names[at], what)

    def _log(self, at: int, metrics: dict[str, float], tokens: int) -> None:
        """Log a step's figures, with the pace."""
        if self._last_log:
            then, step = self._last_log
            rate = (self.steps_done + 1 - step) * tokens / (time.perf_counter() - then)
            metrics["details/tokens_per_s"] = rate
            metrics["details/seconds_left"] = (self.total_steps - self.steps_done - 1) * tokens / rate
        self.log_row(at, metrics, step=self.steps_done + 1)
        for logger in self.point_loggers[at]:
            log_density(logger, self.trained[at].density, self.steps_done + 1)

    def log_row(self, at: int, metrics: dict[str, float], *, step: int) -> None:
        """Send figures to the loggers of a point, and keep them for its summary.

        Args:
            at: Number of the point.
            metrics: Figures by name.
            step: Steps done.
        """
        self.last_metrics[at] = {**self.last_metrics[at], **metrics}
        for logger in self.point_loggers[at]:
            logger.log_metrics(metrics, step=step)

    def _bar_values(self) -> dict[str, str]:
        """The last logged figures that a progress bar has room for."""
        names = {"loss": "losses/overall_loss", "L0": "metrics/l0", "EV": "metrics/explained_variance"}
        more = "/..." if self.last_metrics[_FEW:] else ""
        return {
            short: "/".join(f"{metrics[name]:.4g}" for metrics in self.last_metrics[:_FEW]) + more
            for short, name in names.items()
            if all(name in metrics for metrics in self.last_metrics[:_FEW])
        }


def _part(rows: Tensor | Part, dtype: torch.dtype) -> Part:
    """Return what to encode and what to reconstruct, once where they are the same."""
    if isinstance(rows, Tensor):
        rows = rows.to(dtype)
        return rows, rows
    x, y = rows
    return x.to(dtype), y.to(dtype)
