"""One SAE under training: its weights, its optimizer, and what is counted of its latents.

A run trains one point, a grid trains several from the same batches; each does exactly what it would do alone.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saepipe.config import OptimConfig
from saepipe.permutation import derive_key
from saepipe.ranks import ALONE, Ranks
from saepipe.saes.base import SAE, Losses, Step
from saepipe.schedule import learning_rate

DENSITY_BATCHES = 1000
"""Batches over which the firing density of a latent is averaged (exponentially, once that many were seen)."""

Part = tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]
"""Rows of the hook, and what to reconstruct for each; the same for an autoencoder."""


@dataclass
class Batch:
    """What a global batch came to, over all its parts and ranks."""

    tokens: int
    """Rows of the global batch."""
    terms: dict[str, Float[Tensor, ""]]
    """Loss terms: means over the tokens."""
    fired: Float[Tensor, " d_sae"]
    """Number of tokens on which each latent was active."""
    explained_variance: Float[Tensor, ""] | None
    """Of the batch, where it was asked for."""


class Point(nn.Module):
    """One SAE under training.

    Args:
        sae: The SAE, initialised.
        optim: Adam's settings and the course of the learning rate.
        total_steps: Steps of the whole run.
        lanes: Number of lanes of the stream, which tell the order of a global batch.
        seed: Seed of what is drawn at random on the way.
        micro_batches: Parts that a rank takes its share of a batch in.
        compile: Compile the loss.
    """

    tokens_since_fired: Tensor
    density: Tensor
    broken: Tensor

    def __init__(
        self,
        sae: SAE,
        optim: OptimConfig,
        *,
        total_steps: int,
        lanes: int = 1,
        seed: int = 0,
        micro_batches: int = 1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.sae, self.optim = sae, optim
        self._total_steps, self._lanes, self._seed, self._micro_batches = total_steps, lanes, seed, micro_batches
        self.register_buffer("tokens_since_fired", torch.zeros(sae.d_sae, dtype=torch.int64))
        # Of the weights' type, which a checkpoint keeps: what is converted when training starts would lose bits first.
        self.register_buffer("density", torch.zeros(sae.d_sae, dtype=sae.W_enc.dtype))
        # 1 once a loss was not finite: from then on no step changes anything.
        self.register_buffer("broken", torch.zeros(()))
        self.optimizer: torch.optim.Optimizer | None = None
        self._optimizer_state: dict[str, Any] | None = None
        self._compiled = compile
        self._loss: Callable[..., Losses] = torch.compile(sae.loss) if compile else sae.loss
        self._ranks = ALONE
        self._reducer: DistributedDataParallel | None = None

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Build fused Adam, in the state of the checkpoint if there was one; the weights are on their device by now."""
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(),
            lr=self.optim.lr,
            betas=(self.optim.betas[0], self.optim.betas[1]),
            eps=self.optim.eps,
            fused=True,
        )
        if self._optimizer_state is not None:
            self.optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None  # twice the weights' size
        return self.optimizer

    def join(self, ranks: Ranks) -> None:
        """Share batches with other ranks: gradients are averaged from here on, while the backward pass goes on."""
        self._ranks = ranks
        if ranks.world_size > 1:
            devices = None if self.density.device.type == "cpu" else [self.density.device]
            reducer = DistributedDataParallel(_LossOf(self.sae, self._loss), devices, gradient_as_bucket_view=True)
            object.__setattr__(self, "_reducer", reducer)  # no submodule, or the weights would be in the state twice

    @property
    def dead(self) -> Tensor:
        """Latents that did not fire in the last `sae.dead_after_tokens` tokens."""
        return self.tokens_since_fired >= self.sae.cfg.dead_after_tokens

    def take_step(self, x: Tensor, y: Tensor, number: int, *, measure: bool) -> tuple[Batch, Tensor]:
        """Take an optimizer step on this rank's share of a global batch.

        Args:
            x: Rows of the hook.
            y: What to reconstruct.
            number: Steps done so far.
            measure: Work out what the logs want and training does not.

        Returns:
            The batch, and the norm of its gradient.
        """
        assert self.optimizer is not None
        parts: list[Part] = list(zip(x.chunk(self._micro_batches), y.chunk(self._micro_batches), strict=True))
        step = Step(torch.tensor(number) if self._compiled else number, self._to_revive(), self._ranks)
        if len(parts) > 1:
            step = replace(step, survey=self.sae.survey([part for part, _ in parts], step))
        self.optimizer.zero_grad()
        done = list(self._backward(parts, step))
        batch = gathered(done, self._ranks, measure=measure)
        self.sae.before_step()
        norm = self._clip()
        with torch.no_grad():
            finite = torch.stack([*batch.terms.values(), norm]).isfinite().all()
            self.broken.copy_(torch.where(finite, self.broken, 1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.optim, number, self._total_steps)
            self.optimizer.found_inf = self.broken.float()  # type: ignore[attr-defined]  # fused Adam then changes nothing
            self.optimizer.step()
            self._follow(done[-1], batch, number)
            if self.sae.cfg.resamples(number + 1) and not self.broken:
                self._resample(x, y, done, number)
        return batch, norm

    def _backward(self, parts: list[Part], step: Step) -> Iterator[Losses]:
        """Add each part's gradient up; that of the last is reduced over the ranks."""
        for left, (x, y) in zip(reversed(range(len(parts))), parts, strict=True):
            with self._reducer.no_sync() if left and self._reducer else nullcontext():
                losses = (self._reducer or self._loss)(x, y, step)
                (losses.total / len(parts)).backward()
            yield losses

    def _to_revive(self) -> Int[Tensor, " dead"] | Callable[[], Int[Tensor, " dead"]]:
        """Indices of the dead latents where the SAE revives them, or what finds them.

        A GPU counts them before the step's own work, and the host waits for the count only once it has begun that work:
        at the beginning it would wait for the whole step before, and the GPU then for the host.
        """
        if not self.sae.revives:
            return torch.zeros(0, dtype=torch.int64, device=self.density.device)
        if self.density.device.type != "cuda" or self._compiled:
            return self.dead.nonzero().squeeze(1)
        dead = self.dead
        count = dead.sum().to("cpu", non_blocking=True)
        counted = torch.cuda.Event()
        counted.record()
        in_order = dead.to(torch.uint8).argsort(descending=True, stable=True)

        def find() -> Tensor:
            counted.synchronize()
            return in_order[: int(count)]

        return find

    def _clip(self) -> Float[Tensor, ""]:
        """Clip the gradient in place where asked, and return its norm before that."""
        weights = list(self.sae.parameters())
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if self.optim.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(weights, self.optim.grad_clip, norm)
        return norm

    def _follow(self, losses: Losses, batch: Batch, number: int) -> None:
        """Do what follows the optimizer's step: the SAE's own part, and the counts of what fired."""
        counted = [*self.sae.buffers(), self.tokens_since_fired, self.density]
        before = [value.clone() for value in counted]
        self.sae.after_step(losses)
        self.tokens_since_fired += batch.tokens
        self.tokens_since_fired.masked_fill_(batch.fired > 0, 0)
        weight = max(1 / (number + 1), 1 / DENSITY_BATCHES)
        self.density.lerp_((batch.fired / batch.tokens).to(self.density.dtype), weight)
        for value, old in zip(counted, before, strict=True):
            value.copy_(torch.where(self.broken > 0, old, value))

    def _resample(self, x: Tensor, y: Tensor, done: list[Losses], number: int) -> None:
        """Give the dead latents new weights, from the global batch of the step that was just taken."""
        assert self.optimizer is not None
        errors = torch.cat([(part.target - part.reconstruction).square().sum(1) for part in done])
        rows = [self._ranks.lanes(each, self._lanes) for each in (x, y, errors)]
        generator = torch.Generator().manual_seed(derive_key("resample", self._seed, number))
        reset = self.sae.resample(rows[0], rows[1], rows[2], self.dead.nonzero().squeeze(1), generator)
        self.tokens_since_fired[reset] = 0
        for name, parameter in self.sae.named_parameters():
            if (axis := self.sae.latent_axis(name)) is not None:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][moment].index_fill_(axis, reset, 0)

    def metrics(self, batch: Batch, grad_norm: Tensor, number: int) -> dict[str, float]:
        """Name what is logged of a step, as SAELens names it; waits for the device once."""
        with torch.no_grad():
            log_density = (self.density + 1e-10).log10()
            values = {
                **{f"losses/{name}": term for name, term in batch.terms.items()},
                "losses/overall_loss": torch.stack(list(batch.terms.values())).sum(),
                "metrics/l0": batch.fired.sum() / batch.tokens,
                "metrics/explained_variance": batch.explained_variance,
                "metrics/mean_log10_feature_sparsity": log_density.mean(),
                "sparsity/dead_features": self.dead.sum(),
                "sparsity/mean_passes_since_fired": (self.tokens_since_fired / batch.tokens).mean(),
                "sparsity/below_1e-5": (self.density < 1e-5).sum(),
                "sparsity/below_1e-6": (self.density < 1e-6).sum(),
                **{f"weights/{name}": value for name, value in self._norms()},
                "details/grad_norm": grad_norm,
            }
            present = {name: value for name, value in values.items() if value is not None}
            numbers = torch.stack([value.detach().float().to(self.density.device) for value in present.values()])
        metrics = dict(zip(present, numbers.tolist(), strict=True))
        metrics["details/current_learning_rate"] = learning_rate(self.optim, number, self._total_steps)
        metrics["details/n_training_samples"] = float((number + 1) * batch.tokens)
        return metrics

    def _norms(self) -> Iterator[tuple[str, Tensor]]:
        yield "W_enc_norm", self.sae.W_enc.norm(dim=0).mean()
        yield "W_dec_norm", self.sae.W_dec.norm(dim=1).mean()
        yield "b_dec_norm", self.sae.b_dec.norm()
        if (threshold := getattr(self.sae, "threshold", None)) is not None:
            yield "threshold", threshold.mean()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        assert self.optimizer is not None
        return {"state_dict": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, before the optimizer is made."""
        self.load_state_dict(state["state_dict"])
        self._optimizer_state = state["optimizer"]

    def not_finite(self) -> str | None:
        """Name a weight that is not finite; None where all are."""
        finite = {name: torch.isfinite(value).all() for name, value in self.sae.named_parameters()}
        return next((name for name, value in finite.items() if not value), None)

    def cure(self) -> str:
        """Say what to do about a loss that is not finite."""
        return (
            f"what was saved before is good: lower optim.lr (now {self.optim.lr}) or set optim.grad_clip=1, or leave "
            "outliers out with stream.max_norm=10, and start a new run.dir"
        )


class _LossOf(nn.Module):
    """The loss as a forward pass, which DistributedDataParallel takes; without buffers, equal on all ranks anyway."""

    def __init__(self, sae: SAE, loss: Callable[..., Losses]) -> None:
        super().__init__()
        self._parameters_of_sae = nn.ParameterList(sae.parameters())
        self._loss = loss

    def forward(self, x: Tensor, y: Tensor, step: Step) -> Losses:
        return self._loss(x, y, step)


def gathered(parts: list[Losses], ranks: Ranks, *, measure: bool) -> Batch:
    """Sum up what the parts of a rank, and then the ranks, came to; in float64, in one exchange.

    Args:
        parts: Losses of equal parts of this rank's share.
        ranks: The ranks, with equal shares.
        measure: Work out the explained variance too.
    """
    names = list(parts[0].terms)
    wide = torch.float32 if parts[0].fired.device.type == "mps" else torch.float64
    with torch.no_grad():
        vectors = []
        for part in parts:
            terms = torch.stack([part.terms[name].detach() for name in names])
            vectors.append(torch.cat([terms.to(wide), part.fired.to(wide), *(_spread(part, wide) if measure else ())]))
        vector = ranks.sum(torch.stack(vectors).sum(0))
    shares, tokens = len(parts) * ranks.world_size, sum(len(part.target) for part in parts) * ranks.world_size
    terms, fired, spread_sums = vector.tensor_split([len(names), len(names) + len(parts[0].fired)])
    explained_variance = None
    if measure:
        error, squares, sums = spread_sums[0], spread_sums[1], spread_sums[2:]
        explained_variance = 1 - error / (squares - sums.square().sum() / tokens)
    return Batch(tokens, dict(zip(names, terms / shares, strict=True)), fired, explained_variance)


def _spread(part: Losses, wide: torch.dtype) -> list[Tensor]:
    """Return the sums that make an explained variance: of squared errors, of squares, of the rows."""
    target = part.target.to(wide)
    return [torch.stack([(target - part.reconstruction).square().sum(), target.square().sum()]), target.sum(0)]
