"""The contract that every architecture keeps: a configuration, tensors, encode, decode, a loss with named terms.

An architecture gives its own mathematics: `_activate`, which encodes, and `_pass`, one pass over a training batch. What
surrounds them, normalising, centring and the squared error, is here.

One class serves training and inference. `encode`, `decode` and `loss` take raw activations: the scale that
`normalize_activations` asks for lives here and nowhere else, until `folded` multiplies it into exported weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from saepipe.errors import UserError
from saepipe.keys import Group, key
from saepipe.ranks import ALONE, Ranks

NORMALISATIONS = ("none", "expected_average_only_in")
MSE_REDUCTIONS = ("sum", "mean")


@dataclass
class SAEConfig(Group, group="sae"):
    """Keys that every architecture honours; a subclass in the architecture's file adds its own."""

    architecture: str = ""
    """Name of the architecture, which is the name of its file in `saepipe/saes/`."""
    d_sae: int | None = key(None, least=1)
    """Number of latents; None is expansion times the width of the activations."""
    expansion: int = key(8, least=1)
    """Latents per input dimension, where d_sae does not say how many there are."""
    normalize_activations: str = key("expected_average_only_in", choices=NORMALISATIONS)
    """none, or expected_average_only_in: inputs scaled so that their mean norm is sqrt(d_in)."""
    apply_b_dec_to_input: bool = True
    """Subtract the decoder's bias from the input before encoding."""
    decoder_init_norm: float = key(0.1, above=0)
    """Norm of each decoder row at the start; the encoder starts as the decoder transposed."""
    mse_reduction: str = key("sum", choices=MSE_REDUCTIONS)
    """sum or mean of the squared error over d_out (always a mean over tokens); published coefficients assume sum."""
    dead_after_tokens: int = key(1_000_000, least=1)
    """A latent that has not fired for this many training tokens counts as dead."""

    def __post_init__(self) -> None:
        """Check that the keys are this architecture's, and their ranges."""
        if self.architecture != type(self).architecture:
            raise UserError(
                f"sae.architecture={self.architecture} does not go with the keys of {type(self).architecture}; "
                f"choose the whole group with sae={self.architecture}"
            )
        super().__post_init__()

    def resolve(self, d_in: int) -> int:
        """Width of the SAE on activations of width `d_in`.

        Raises:
            UserError: A key that does not fit the width; the message names it.
        """
        return self.expansion * d_in if self.d_sae is None else self.d_sae


@dataclass(frozen=True)
class Step:
    """An optimizer step, as the loss of a batch must know it."""

    number: int = 0
    """Steps done before it, for warm-ups."""
    dead: Int[Tensor, " dead"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Indices of the dead latents, for terms that revive them. Indices and not a mask, since their number decides
    shapes, which the host must know: the caller chooses when to pay for that."""
    ranks: Ranks = ALONE
    """The processes that have the other parts of the global batch."""
    survey: Tensor | None = None
    """What `SAE.survey` found, where the rank's part comes in parts itself."""


@dataclass
class Losses:
    """What one batch yields: the terms to minimise, and what counters and logs need without another pass."""

    terms: dict[str, Float[Tensor, ""]]
    """Named loss terms with their coefficients applied, under the names of SAELens; `mse_loss` is always there."""
    target: Float[Tensor, "token d_out"]
    """Normalised target, detached."""
    reconstruction: Float[Tensor, "token d_out"]
    """Reconstruction of `target`, detached."""
    fired: Float[Tensor, " d_sae"]
    """Number of tokens of the batch on which each latent was active, detached."""
    notes: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """What else `after_step` and the logs want to know of the batch, by name, detached."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """Sum of the terms: what to call `backward` on."""
        return torch.stack(list(self.terms.values())).sum()

    @property
    def l0(self) -> Float[Tensor, ""]:
        """Active latents per token, mean over the batch."""
        return self.fired.sum() / self.target.shape[0]


@dataclass
class Pass:
    """What an architecture makes of one batch, with gradients; `SAE.loss` turns it into `Losses`."""

    reconstruction: Float[Tensor, "token d_out"]
    """Reconstruction of the target, in the normalised space."""
    fired: Float[Tensor, " d_sae"]
    """Number of tokens on which each latent was active, without gradient."""
    terms: dict[str, Float[Tensor, ""]]
    """Named terms besides `mse_loss`, with their coefficients applied."""
    notes: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """As in `Losses`."""


def warm_up(step: int, steps: int) -> float:
    """Return the part of a coefficient that holds in a step, counted from 0, while it rises linearly over `steps`."""
    return min((step + 1) / max(steps, 1), 1.0)


class SAE(nn.Module, ABC):
    """A sparse autoencoder (or transcoder, where `d_out` activations of another hook are predicted).

    Args:
        cfg: The architecture's own configuration.
        d_in: Width of the activations that are encoded.
        d_out: Width of the activations that are reconstructed; None is `d_in`.
    """

    config_class: ClassVar[type[SAEConfig]]
    """Configuration of this architecture; its `architecture` is the name of the file."""
    latent_parameters: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters that hold a value per latent; they start at zero."""
    b_enc: nn.Parameter

    def __init__(self, cfg: SAEConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__()
        self.cfg: Any = cfg  # Any: each architecture reads its own keys
        self.d_in, self.d_out, self.d_sae = d_in, d_out or d_in, cfg.resolve(d_in)
        if cfg.apply_b_dec_to_input and self.d_out != d_in:
            raise UserError(
                f"sae.apply_b_dec_to_input=True does not go with a transcoder from width {d_in} to {self.d_out}; "
                "set it to false"
            )
        self.metadata: dict[str, Any] = {}
        """What it was trained on, where it was loaded from an export."""
        # Stored as [d_sae, d_in]: a latent's weights are one row of memory, which is what sparse gradients write.
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, d_in).T)
        for name in self.latent_parameters:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.d_sae)))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.norm_scale: Tensor
        self.register_buffer("norm_scale", torch.ones(()))

    @property
    def revives(self) -> bool:
        """Whether the loss makes use of the dead latents; their list costs a wait for the device in every step."""
        return False

    @torch.no_grad()
    def initialise(
        self, generator: torch.Generator, *, mean: Float[Tensor, " d_out"] | None = None, norm_scale: float = 1.0
    ) -> None:
        """Set every weight: the same generator state gives the same weights.

        Args:
            generator: Source of the decoder's directions; the other weights follow from them.
            mean: Mean of the raw activations, where `b_dec` starts; None is zero.
            norm_scale: sqrt(d_in) / mean norm of the raw activations; ignored under `normalize_activations=none`.
        """
        self.norm_scale.fill_(1.0 if self.cfg.normalize_activations == "none" else norm_scale)
        rows = torch.randn(self.W_dec.shape, generator=generator, device=generator.device)
        self.W_dec.copy_(self.cfg.decoder_init_norm * functional.normalize(rows, dim=1))
        # A transcoder's encoder reads another space, so it starts in directions of its own.
        if self.d_in != self.d_out:
            rows = torch.randn((self.d_sae, self.d_in), generator=generator, device=generator.device)
        self.W_enc.copy_((self.cfg.decoder_init_norm * functional.normalize(rows, dim=1)).T)
        for name in self.latent_parameters:
            self.get_parameter(name).zero_()
        self.b_dec.zero_()
        if mean is not None:
            self.b_dec.copy_(mean.to(self.b_dec) * self.norm_scale)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of the latents, zero where inactive."""
        return self._activate(self._hidden_pre(self._centre(self._normalise(x))))

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction, in the units of the raw activations."""
        return self._reconstruct(f) / self.norm_scale

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Encode and decode."""
        return self.decode(self.encode(x))

    def loss(
        self,
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"],
        step: Step,
    ) -> Losses:
        """Loss of one batch, or of one of equal parts of it, whose mean the batch's loss is.

        Args:
            x: Raw activations.
            y: What to reconstruct: `x` itself for an autoencoder.
            step: The step that it is for.
        """
        target = self._normalise(y)
        done = self._pass(self._centre(self._normalise(x)), target, step)
        return Losses(
            terms={"mse_loss": self._mse(target, done.reconstruction), **done.terms},
            target=target.detach(),
            reconstruction=done.reconstruction.detach(),
            fired=done.fired,
            notes=done.notes,
        )

    def survey(self, parts: Sequence[Float[Tensor, "token d_in"]], step: Step) -> Tensor | None:
        """Find what the loss of a part must know of the whole global batch; nothing by itself.

        Args:
            parts: Raw activations of all parts of this rank.
            step: The step that they are for.
        """
        return None

    @torch.no_grad()
    def after_step(self, losses: Losses) -> None:
        """Do what follows an optimizer step: constraints on the weights, averages over steps. Nothing by itself.

        Args:
            losses: What `loss` returned for the step.
        """

    @abstractmethod
    def _pass(
        self,
        centred: Float[Tensor, "token d_in"],
        target: Float[Tensor, "token d_out"],
        step: Step,
    ) -> Pass:
        """Encode and decode one batch, or a part of it, for training.

        Args:
            centred: Normalised and centred input, as `_hidden_pre` takes it.
            target: Normalised target, for terms that compare something else with it than the reconstruction.
            step: As in `loss`.
        """

    @abstractmethod
    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents from pre-activations."""

    def _normalise(self, x: Tensor) -> Tensor:
        return x.to(self.W_enc.dtype) * self.norm_scale

    def _centre(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def _hidden_pre(self, centred: Tensor) -> Tensor:
        """Pre-activations of normalised and centred input."""
        return functional.linear(centred, self.W_enc.T, self.b_enc)

    def _reconstruct(self, f: Tensor) -> Tensor:
        """Reconstruction in the normalised space."""
        return f @ self.W_dec + self.b_dec

    def _mse(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        squared = (target - reconstruction).square()
        return squared.sum(-1).mean() if self.cfg.mse_reduction == "sum" else squared.mean()

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (as SAELens names it) and float64 weights that do the same without a normalisation."""
        scale = self.norm_scale.detach().double()
        weights = {name: value.detach().double() for name, value in self.named_parameters()}
        weights["W_enc"] = weights["W_enc"] * scale
        weights["W_dec"] = weights["W_dec"] / scale
        weights["b_dec"] = weights["b_dec"] / scale
        values = {
            "architecture": self.cfg.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "apply_b_dec_to_input": self.cfg.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
        }
        return values, weights

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "SAE":
        """Open an exported folder; see `saepipe.export.load`."""
        from saepipe.export import load

        return load(folder, device=device, dtype=dtype)
