"""The contract that every architecture keeps: a configuration, tensors, encode, decode, a loss with named terms.

An architecture gives its own mathematics: `_activate`, which encodes, and `_pass`, one pass over a training batch. What
surrounds them is here: normalising, centring, the squared error, a transcoder's skip connection, dead latents.

One class serves training and inference. `encode`, `decode` and `loss` take raw activations: the scale that
`normalize_activations` asks for lives here and nowhere else, until `folded` multiplies it into exported weights.

A training step is `loss` and its backward, `before_step`, the optimizer's step, `after_step`, and now and then
`resample`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from saepipe import sparse
from saepipe.errors import UserError
from saepipe.saes import dead, start, token_norm
from saepipe.saes.config import SAEConfig
from saepipe.saes.step import Losses, Pass, Step, warm_up
from saepipe.saes.stored import Metadata, Name, Stored

__all__ = ["SAE", "Losses", "Pass", "SAEConfig", "Step", "warm_up"]  # what an architecture's file needs


_WITH_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z")
"""Hook points whose activations have an axis of heads in TransformerLens."""


class SAE(Stored, nn.Module, ABC):
    """A sparse autoencoder, or a transcoder, which predicts the activations of another hook.

    Args:
        cfg: The architecture's own configuration.
        d_in: Width of the activations that are encoded.
        d_out: Width of the activations that a transcoder predicts. Giving it makes one, also where it is d_in; None
            makes an autoencoder.
    """

    config_class: ClassVar[type[SAEConfig]]
    """Configuration of this architecture; its `architecture` is the name of the file."""
    latent_parameters: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters that hold a value per latent; the first is the bias that decides whether it is active."""
    log_parameters: ClassVar[tuple[str, ...]] = ()
    """Those of them that multiply, by their exponential, what a latent would be."""
    sparse_step: ClassVar[bool] = False
    """Whether every training step is sparse after the encoder's product, whatever it finds there."""
    b_enc: nn.Parameter

    def __init__(self, cfg: SAEConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__()
        self.is_transcoder = d_out is not None
        self.d_in, self.d_out, self.d_sae = d_in, d_out or d_in, cfg.resolve(d_in)
        self.cfg: Any = copy.copy(cfg)  # Any: each architecture reads its own keys; a copy: it gets this SAE's
        vars(self.cfg).update(
            architecture=Name(cfg.architecture),
            d_in=d_in,
            d_sae=self.d_sae,
            expansion=cfg.expansion if self.d_sae % d_in else self.d_sae // d_in,
            metadata=Metadata(),
        )
        self.token_norm = "none"
        """One of TOKEN_NORMS: what another library normalised each token by."""
        self._moments: token_norm.Moments | None = None
        if self.is_transcoder and cfg.apply_b_dec_to_input:
            raise UserError(
                "sae.apply_b_dec_to_input=True does not go with a transcoder, whose b_dec is of another hook than its "
                "input; set it to false"
            )
        if cfg.skip_connection and not self.is_transcoder:
            raise UserError(
                "sae.skip_connection=True lets an autoencoder copy its input; set it to false, or make it a transcoder "
                "with stream.target_hook"
            )
        # Stored as [d_sae, d_in]: a latent's weights are one row of memory, which is what sparse gradients write.
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, d_in).T)
        for name in self.latent_parameters:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.d_sae)))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in)) if cfg.skip_connection else None
        self.norm_scale: Tensor
        self.register_buffer("norm_scale", torch.ones(()))
        self.target_scale: Tensor
        self.register_buffer("target_scale", torch.ones(()))
        self._say_where()

    def _say_where(self) -> None:
        vars(self.cfg).update(device=str(self.device), dtype=str(self.dtype).removeprefix("torch."))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Do what torch does to move or convert a module; `cfg.device` and `cfg.dtype` follow, as in SAELens."""
        super()._apply(fn, recurse)
        self._say_where()
        return self

    @property
    def revives(self) -> bool:
        """Whether the loss makes use of the dead latents; their list costs a wait for the device in every step."""
        return self.cfg.dead_method in ("ghost", "auxk")

    @property
    def start_norm(self) -> float:
        """Norm of a decoder row at the start."""
        return 1.0 if self.cfg.normalize_sae_decoder else self.cfg.decoder_init_norm

    @torch.no_grad()
    def initialise(
        self,
        generator: torch.Generator,
        *,
        mean: Float[Tensor, " d_out"] | None = None,
        norm_scale: float = 1.0,
        target_scale: float | None = None,
    ) -> None:
        """Set every weight: the same generator state gives the same weights.

        Args:
            generator: Source of the decoder's directions; the other weights follow from them.
            mean: Centre of the raw activations to reconstruct, where `b_dec` starts; None is zero.
            norm_scale: sqrt(d_in) / mean norm of the raw activations; ignored under `normalize_activations=none`.
            target_scale: The same of a transcoder's target, with d_out; None: the target is scaled as the input is.
        """
        start.initialise(self, generator, mean, norm_scale, target_scale)

    def adopt(self, other: "SAE") -> None:
        """Take the weights of another SAE, in the place of those that `initialise` set; its scales stay.

        Args:
            other: One that does the same on raw activations afterwards; where latents are kept by their rank, as far as
                their decoder rows' norms agree, and with activations in units of this run's scale.

        Raises:
            UserError: Its widths or weights do not fit this one, or it has more than this one would keep.
        """
        start.adopt(self, other)

    def encode(self, x: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of the latents, zero where inactive.

        Args:
            x: Raw activations [..., d_in]; those of a hook with heads may have these on an axis of their own.

        Raises:
            UserError: They are of another width.
        """
        return self.activate(self.pre_activations(x))

    def activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of the latents from what `pre_activations` gives, zero where inactive."""
        return self._activate(hidden_pre)

    def pre_activations(self, x: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_sae"]:
        """What the activation function is given."""
        return self._hidden_pre(self._centre(self._normalise(x)))

    def decode(
        self, f: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*input"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction, in the units of the raw activations.

        Args:
            f: Activations of the latents.
            x: Raw activations that were encoded, for the skip connection; None (and SAELens) leaves it out. Where
                `token_norm` normalises each token, None stands for what `encode` was given last.
        """
        reconstruction = self._reconstruct(f)
        normalised = None if x is None else self._normalise(x)
        if self.W_skip is not None and normalised is not None:
            reconstruction = reconstruction + self._skip(normalised)
        reconstruction = reconstruction / self.target_scale
        if self.token_norm == "none":
            return reconstruction
        moments = self._moments
        if moments is None or moments.scale.shape[:-1] != f.shape[:-1]:
            raise UserError(
                f"this SAE normalises each token (normalize_activations={self.token_norm}), and latents of shape "
                f"{list(f.shape)} are not of what was encoded last; give what they are of: decode(f, x)"
            )
        return reconstruction * moments.scale + moments.shift

    def directions(self, latents: Sequence[int] | slice = slice(None)) -> Float[Tensor, "latent d_out"]:
        """What each unit of a latent's activation adds to the reconstruction.

        That is in the units of the raw activations; where `token_norm` normalises each token, in those of the
        normalised ones.

        Args:
            latents: Which of them; all where nothing is said.
        """
        return self.W_dec[latents] / self.target_scale

    def forward(self, x: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_out"]:
        """Encode and decode; with `use_error_term`, what an autoencoder lacks is added, held fixed."""
        reconstruction = self.decode(self.encode(x), x)
        if self.use_error_term and not self.is_transcoder:
            reconstruction = reconstruction + (self._joined(x) - reconstruction).detach()
        return reconstruction

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
        normalised, target = self._normalise(x), self._normalise_target(y)
        centred = self._centre(normalised)
        # The latents are asked for what the skip connection leaves over, which is the same as adding it to all that
        # they reconstruct, and no architecture needs to know of it.
        skipped = None if self.W_skip is None else self._skip(normalised)
        wanted = target if skipped is None else target - skipped
        done = self._pass(centred, wanted, step)
        terms = {"mse_loss": self._mse(wanted, done.reconstruction), **done.terms}
        if self.cfg.dead_method == "ghost":
            terms["ghost_grad_loss"] = dead.ghost(
                self, centred, (wanted - done.reconstruction).detach(), step.find_dead()
            )
        return Losses(
            terms=terms,
            target=target.detach(),
            reconstruction=(done.reconstruction if skipped is None else done.reconstruction + skipped).detach(),
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
    def before_step(self) -> None:
        """Do what comes between the gradients, complete over all ranks, and their clipping.

        Source: Bricken et al. 2023 (Towards Monosemanticity), on training: what a gradient says about the norm of a
        decoder row that is held at 1 would only disturb Adam's moments.
        """
        if self.cfg.normalize_sae_decoder:
            assert self.W_dec.grad is not None
            rows = functional.normalize(self.W_dec, dim=1)
            self.W_dec.grad.sub_((self.W_dec.grad * rows).sum(1, keepdim=True) * rows)

    @torch.no_grad()
    def after_step(self, losses: Losses) -> None:
        """Do what follows an optimizer step: constraints on the weights, averages over steps.

        Args:
            losses: What `loss` returned for the step.
        """
        if self.cfg.normalize_sae_decoder:
            self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def resample(
        self,
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"],
        errors: Float[Tensor, " token"],
        latents: Int[Tensor, " dead"],
        generator: torch.Generator,
    ) -> Int[Tensor, " reset"]:
        """Give dead latents new weights, from rows that are reconstructed badly; every rank is given the same.

        A latent's encoder row takes the direction of a row's input, and its decoder row that of an autoencoder's input,
        centred, or of what a transcoder's prediction lacks. Where more latents are dead than rows have an error, the
        last of them wait for the next time.

        Source: Bricken et al. 2023 (Towards Monosemanticity), appendix on neuron resampling.

        Args:
            x: Raw activations.
            y: What to reconstruct.
            errors: Squared error of each row.
            latents: Indices of the dead latents.
            generator: A generator of the CPU.

        Returns:
            The latents that were reset; the optimizer's moments of them (see `latent_axis`) are the caller's to reset.
        """
        return dead.resample(self, x, y, errors, latents, generator)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Give every decoder row norm 1, and its latent the scale that the row had: what is reconstructed stays.

        Raises:
            UserError: The latents are ranked without their rows' norms, so that others would be kept afterwards.
        """
        if not getattr(self.cfg, "rescale_acts_by_decoder_norm", True):
            raise UserError(
                "rescale_acts_by_decoder_norm=False ranks latents as they are, and folding would change their order; "
                "divide by W_dec.norm(dim=1) where unit rows are needed"
            )
        norms = self.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        for name in set(self.latent_parameters) - set(self.log_parameters):
            self.get_parameter(name).mul_(norms)

    def latent_axis(self, name: str) -> int | None:
        """Which axis of a parameter counts latents; None: none does."""
        return {"W_enc": 1, "W_dec": 0, **dict.fromkeys(self.latent_parameters, 0)}.get(name)

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
            target: Normalised target, less what a skip connection gives, for terms that compare something else with it
                than the reconstruction.
            step: As in `loss`.
        """

    @abstractmethod
    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents from pre-activations."""

    def _start_of(self, name: str) -> float:
        """Value of a latent's parameter at the start."""
        return 0.0

    def _normalise(self, x: Tensor) -> Tensor:
        x = self._joined(x)
        if self.token_norm != "none":
            x, self._moments = token_norm.normalise(x, self.token_norm)
        return x * self.norm_scale

    def _joined(self, x: Tensor) -> Tensor:
        """Join the heads of a hook that has them on an axis of their own; refuse any other width than d_in."""
        x = x.to(self.W_enc.dtype)
        if x.shape[-1] == self.d_in:
            return x
        hook = str(self.metadata.get("hook_name"))
        if hook.endswith(_WITH_HEADS) and x.ndim > 1 and x.shape[-2:].numel() == self.d_in:
            return x.flatten(-2)
        raise UserError(
            f"activations of shape {list(x.shape)} are not d_in={self.d_in} wide; give those of hook {hook}"
        )

    def extra_repr(self) -> str:
        """Say in `repr` what it is."""
        out = f", d_out={self.d_out}" if self.is_transcoder else ""
        return f"d_in={self.d_in}{out}, d_sae={self.d_sae}, hook_name={self.metadata.get('hook_name')}"

    def _normalise_target(self, y: Tensor) -> Tensor:
        return y.to(self.W_dec.dtype) * self.target_scale

    def _centre(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def _hidden_pre(self, centred: Tensor) -> Tensor:
        """Pre-activations of normalised and centred input."""
        return functional.linear(centred, self.W_enc.T, self.b_enc)

    def _hidden_pre_of(self, centred: Tensor, latents: Tensor) -> Tensor:
        """Pre-activations of some latents, with the bias that decides, and gradients for all that they come from."""
        bias = self.get_parameter(self.latent_parameters[0])
        return functional.linear(centred, self.W_enc.T.index_select(0, latents), bias.index_select(0, latents))

    def _reconstruct(self, f: Tensor) -> Tensor:
        """Reconstruction in the normalised space."""
        return f @ self.W_dec + self.b_dec

    def _product(self, centred: Tensor, bias: Tensor | None) -> Tensor:
        """Return the encoder's product in training, where it has gradients for the weights alone."""
        if torch.compiler.is_compiling():
            return functional.linear(centred, self.W_enc.T, bias)
        return sparse.product(centred.detach(), self.W_enc.T, bias, self._input_centre)

    def _selected(self, found: sparse.Entries, centred: Tensor, bias: Tensor | None) -> Tensor:
        """Return some of what `_product` does, with the gradients that these have."""
        values = found.values.to(self.W_enc.dtype)
        x, rows = centred.detach(), self.W_enc.T
        return sparse.select(values, found.indices, x, rows, bias, found.offsets, self._input_centre)

    @property
    def _input_centre(self) -> Tensor | None:
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _reconstruct_from(self, f: Tensor, found: sparse.Entries) -> Tensor:
        """Do as `_reconstruct`, where all other latents are inactive."""
        return sparse.decode(f, found.indices, self.W_dec, found.offsets) + self.b_dec

    def _skip(self, normalised: Tensor) -> Tensor:
        assert self.W_skip is not None
        return functional.linear(normalised, self.W_skip)

    def _mse(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        squared = (target - reconstruction).square()
        return squared.sum(-1).mean() if self.cfg.mse_reduction == "sum" else squared.mean()

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (as SAELens names it) and float64 weights that do the same without a normalisation."""
        scale, target_scale = self.norm_scale.detach().double(), self.target_scale.detach().double()
        weights = {name: value.detach().double() for name, value in self.named_parameters()}
        weights["W_enc"] = weights["W_enc"] * scale
        weights["W_dec"] = weights["W_dec"] / target_scale
        weights["b_dec"] = weights["b_dec"] / target_scale
        if self.W_skip is not None:
            weights["W_skip"] = weights["W_skip"] * (scale / target_scale)
        values = {
            "architecture": self.cfg.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "apply_b_dec_to_input": self.cfg.apply_b_dec_to_input,
            "normalize_activations": self.token_norm,
            "reshape_activations": "none",
            **({"d_out": self.d_out} if self.is_transcoder else {}),
        }
        return values, weights
