"""The training step: `SAEModule` drives an SAE under Lightning from a stream of activations.

The module's own count of optimizer steps, `steps_done`, is the position in the stream: it is checkpointed with the
weights, so a resumed run reads the batches that an uninterrupted one would have read.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import progress
from saepipe.config import OptimConfig
from saepipe.errors import UserError
from saepipe.saes.base import SAE, Losses, Step
from saepipe.stream import Stream

DENSITY_BATCHES = 1000
"""Batches over which the firing density of a latent is averaged (exponentially, once that many were seen)."""


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of a step; a pure function, so that a resumed run needs no scheduler's state.

    Warm-up rises linearly to `lr`, decay falls linearly to 0 over the last steps; between them the rate is constant or
    falls along a half cosine to `lr_end`.

    Args:
        optim: Peak rate, end, course, lengths of warm-up and decay.
        step: Optimizer step, from 0.
        total_steps: Steps of the whole run.
    """
    course = max(1, total_steps - optim.lr_warm_up_steps - optim.lr_decay_steps)
    rate = optim.lr
    if optim.lr_scheduler_name == "cosineannealing":
        end = optim.lr / 10 if optim.lr_end is None else optim.lr_end
        done = min(1.0, max(0, step - optim.lr_warm_up_steps) / course)
        rate = end + (optim.lr - end) * (1 + math.cos(math.pi * done)) / 2
    if step < optim.lr_warm_up_steps:
        rate *= (step + 1) / optim.lr_warm_up_steps
    remaining = total_steps - step
    if remaining <= optim.lr_decay_steps:
        rate *= remaining / optim.lr_decay_steps
    return rate


class Batches:
    """The batches that a run still needs, as the iterable that Lightning asks for, with a bar for whoever waits."""

    def __init__(self, stream: Stream, module: "SAEModule", batch_tokens: int) -> None:
        self._stream = stream
        self._module = module
        self._batch_tokens = batch_tokens

    def __iter__(self) -> Iterator[Tensor]:
        """Read on from the module's own step; by now a checkpoint has been restored."""
        module, tokens = self._module, self._batch_tokens
        batches = self._stream.iterate(start=module.steps_done)
        with progress.bar("train", module.total_steps * tokens, module.steps_done * tokens) as bar:
            for _ in range(module.steps_done, module.total_steps):
                batch = next(batches)
                assert isinstance(batch, Tensor)  # no pairs: `train` refuses stream.target_hook
                yield batch
                bar.update(tokens)
                bar.set_postfix(module.bar_values(), refresh=False)


class SAEModule(pl.LightningModule):
    """Trains one SAE; counts steps, dead latents and densities itself, so that all of it is in the checkpoint.

    Args:
        sae: The SAE, initialised.
        optim: Adam's settings and the course of the learning rate.
        total_steps: Steps of the whole run.
        log_every_steps: Steps between two rows of metrics.
        store_identity: Identity of the store that the batches come from; a checkpoint of another one is refused.
    """

    tokens_since_fired: Tensor
    density: Tensor

    def __init__(
        self, sae: SAE, optim: OptimConfig, *, total_steps: int, log_every_steps: int, store_identity: str
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # steps are counted, and the rate is set, by this module alone
        self.sae = sae
        self.optim = optim
        self.total_steps = total_steps
        self.log_every_steps = log_every_steps
        self.steps_done = 0
        self.last_metrics: dict[str, float] = {}
        self.register_buffer("tokens_since_fired", torch.zeros(sae.d_sae, dtype=torch.int64))
        self.register_buffer("density", torch.zeros(sae.d_sae))
        self.store_identity = store_identity
        self._last_loss = torch.zeros(())
        self._last_log: tuple[float, int] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build fused Adam over the SAE's parameters."""
        return torch.optim.Adam(
            self.sae.parameters(),
            lr=self.optim.lr,
            betas=(self.optim.betas[0], self.optim.betas[1]),
            eps=self.optim.eps,
            fused=True,
        )

    @property
    def dead(self) -> Tensor:
        """Latents that did not fire in the last `sae.dead_after_tokens` tokens."""
        return self.tokens_since_fired >= self.sae.cfg.dead_after_tokens

    def _to_revive(self) -> Int[Tensor, " dead"]:
        """Indices of the dead latents where the SAE revives them; counting them waits for the device."""
        if not self.sae.revives:
            return torch.zeros(0, dtype=torch.int64, device=self.density.device)
        return self.dead.nonzero().squeeze(1)

    @property
    def _logs_now(self) -> bool:
        """Whether the step under way ends with a row of metrics."""
        done = self.steps_done + 1
        return done % self.log_every_steps == 0 or done == self.total_steps

    def training_step(self, batch: Float[Tensor, "token d_in"], batch_idx: int) -> None:
        """Take one optimizer step on one global batch."""
        x = batch.float()
        losses = self.sae.loss(x, x, Step(self.steps_done, self._to_revive()))
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        optimizer.zero_grad()
        total = losses.total
        self.manual_backward(total)
        self._last_loss = total.detach()
        grad_norm = self._clip()
        rate = learning_rate(self.optim, self.steps_done, self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self.sae.after_step(losses)
        self._count(losses, tokens=len(x))
        logs = self._logs_now
        self.steps_done += 1
        if logs:
            self._log(losses, len(x), rate, grad_norm)

    def _clip(self) -> Tensor:
        """Clip the gradient in place where asked, and return its norm before that."""
        limit = math.inf if self.optim.grad_clip is None else self.optim.grad_clip
        parameters = list(self.sae.parameters())
        if self.optim.grad_clip is None and not self._logs_now:
            return torch.zeros((), device=self.density.device)  # nobody reads the norm of this step
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    @torch.no_grad()
    def _count(self, losses: Losses, tokens: int) -> None:
        """Update what is known of each latent's firing."""
        fired = losses.fired
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired > 0, 0)
        weight = max(1 / (self.steps_done + 1), 1 / DENSITY_BATCHES)
        self.density.lerp_(fired / tokens, weight)

    def _log(self, losses: Losses, tokens: int, rate: float, grad_norm: Tensor) -> None:
        """Send one row of metrics to every logger, under SAELens's names; waits for the device once."""
        with torch.no_grad():
            spread = (losses.target - losses.target.mean(0)).square().sum()
            values = {
                **{f"losses/{name}": term for name, term in losses.terms.items()},
                "losses/overall_loss": losses.total,
                "metrics/l0": losses.l0,
                "metrics/explained_variance": 1 - (losses.target - losses.reconstruction).square().sum() / spread,
                "sparsity/dead_features": self.dead.sum(),
                **{f"metrics/{name}": note for name, note in losses.notes.items()},
                "details/grad_norm": grad_norm,
            }
            numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
        metrics = dict(zip(values, numbers, strict=True))
        for name, value in metrics.items():
            # An explained variance is infinite where all rows of the batch are equal: that is no divergence.
            if not math.isfinite(value) and name != "metrics/explained_variance":
                raise self._diverged(f"{name} is {value}")
        now = time.perf_counter()
        if self._last_log:
            then, step = self._last_log
            metrics["details/tokens_per_s"] = (self.steps_done - step) * tokens / (now - then)
        self._last_log = (now, self.steps_done)
        metrics["details/current_learning_rate"] = rate
        metrics["details/n_training_samples"] = float(self.steps_done * tokens)
        self.last_metrics = metrics
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.steps_done)

    def refuse_non_finite(self) -> None:
        """Refuse to save a state that is not finite, which would make every resume fail as well.

        Raises:
            UserError: The last loss or a weight is not finite; the message names it and the step.
        """
        for name, value in [("losses/overall_loss", self._last_loss), *self.sae.named_parameters()]:
            if not torch.isfinite(value).all():
                raise self._diverged(f"{name} is not finite")

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what} at step {self.steps_done}; the last checkpoint is good: lower optim.lr (now {self.optim.lr}) or "
            "set optim.grad_clip=1, and start a new run.dir"
        )

    def bar_values(self) -> dict[str, str]:
        """The last logged figures that a progress bar has room for."""
        names = {"loss": "losses/overall_loss", "L0": "metrics/l0", "EV": "metrics/explained_variance"}
        return {short: f"{self.last_metrics[name]:.4g}" for short, name in names.items() if name in self.last_metrics}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the run's position beside the weights."""
        checkpoint["saepipe"] = {
            "steps_done": self.steps_done,
            "last_metrics": self.last_metrics,
            "store_identity": self.store_identity,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the position that the weights belong to."""
        if checkpoint["saepipe"]["store_identity"] != self.store_identity:
            raise UserError(
                "store.dir holds another store than the one that this run began on; give that one, or another run.dir"
            )
        self.steps_done = checkpoint["saepipe"]["steps_done"]
        self.last_metrics = checkpoint["saepipe"]["last_metrics"]
