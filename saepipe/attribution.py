"""What the latents of an SAE have to do with one prediction: a logit, or the difference of two.

`direct` says what each latent adds through the unembedding alone, by which the logit is divided up without rest.
`by_gradient` says what later layers make of the latents as well, to first order, or by integrated gradients. What an
ablation really does to the loss is in `saepipe.ablation`.

In both, the SAE changes nothing that the model computes: what it does not reconstruct is kept as an error term.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import places
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.prompts import Input
from saepipe.saes import token_norm
from saepipe.saes.base import SAE
from saepipe.splicing import Splice

Token = str | int
"""A token's text, or its id."""


@dataclass(frozen=True)
class Direct:
    """A logit, or a difference of two, as the sum of what is written to the residual stream at its position."""

    latents: Float[Tensor, " d_sae"]
    """What each latent adds; 0 where it is not active."""
    activations: Float[Tensor, " d_sae"]
    """How active each is there."""
    bias: float
    """What the SAE's bias adds (and a transcoder's skip connection)."""
    error: float
    """What the SAE does not reconstruct adds."""
    others: float
    """What the rest of the model adds: later layers, and other parts of the model where the hook is one part's."""
    constant: float
    """What is there without any activation: the biases of the final norm and of the unembedding."""
    logit: float
    """What all of these add up to; where the model caps its logits, before that."""

    @property
    def total(self) -> float:
        """Sum of the parts: the logit, but for rounding."""
        return float(self.latents.double().sum()) + self.bias + self.error + self.others + self.constant


@dataclass(frozen=True)
class ByGradient:
    """What each latent at each position does to a logit, or to the difference of two."""

    latents: Float[Tensor, "seq d_sae"]
    """Activation times gradient."""
    activations: Float[Tensor, "seq d_sae"]
    """How active each is."""
    logit: float
    """The logit."""
    without: float
    """The same with all latents at 0 and all else (the error term, the bias) as it is."""

    @property
    def total(self) -> float:
        """Sum over all latents; integrated gradients make it `logit - without`, one gradient comes near at best."""
        return float(self.latents.double().sum())


def direct(
    model: HookedSAETransformer,
    sae: SAE,
    prompt: Input,
    target: Token,
    against: Token | None = None,
    *,
    position: int = -1,
) -> Direct:
    """Divide a logit up among the latents that are active where it is predicted, and what else adds to it.

    What the final norm divides by is held fixed, as it is for all parts alike; then the logit is a sum. Latents at
    other positions add nothing directly: see `by_gradient`.

    Args:
        model: The language model.
        sae: An SAE at a hook point of the residual stream, or of what attention or an MLP adds to it.
        prompt: One prompt.
        target: Token whose logit it is.
        against: Token whose logit is taken off it.
        position: Where it is predicted.

    Raises:
        UserError: A token is none, the prompt is several or too long, or the SAE's hook does not write to the stream.

    Source: nostalgebraist 2020 (the logit lens); Elhage et al. 2021 (A Mathematical Framework for Transformer
    Circuits), on direct paths.
    """
    splice = Splice(sae)
    if splice.hook_out.rsplit(".")[-1] not in places.RESIDUAL:
        raise UserError(
            f"{splice.hook_out} is no hook point that writes to the residual stream, so its latents have no direct "
            f"part in a logit; take the gradient, or an SAE of one of {', '.join(places.RESIDUAL)}"
        )
    ids, place = _prompt(model, prompt, position)
    number = _number(model, target, against, place)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, return_type=None, names_filter=[splice.hook_in, splice.hook_out, last])
        read, written, end = (cache[name][0, place].to(sae.device) for name in (splice.hook_in, splice.hook_out, last))
        f = sae.encode(read[None])
        reconstruction, bias = sae.decode(f, read[None])[0], sae.decode(torch.zeros_like(f), read[None])[0]
        directions = sae.directions()
        if sae.token_norm != "none":
            _, moments = token_norm.normalise(read[None], sae.token_norm)
            assert moments is not None
            directions = directions * moments.scale
    reader, constant, logit = _read_off(model, ids, last, place, number)
    reader = reader.to(sae.device)

    def adds(part: Tensor) -> float:
        return float(part.double() @ reader)

    return Direct(
        latents=(f[0].double() * (directions.double() @ reader)).float(),
        activations=f[0],
        bias=adds(bias),
        error=adds(written - reconstruction),
        others=adds(end - written),
        constant=constant,
        logit=logit,
    )


def _read_off(
    model: HookedSAETransformer,
    ids: Int[Tensor, "1 seq"],
    last: str,
    place: int,
    number: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, " d"], float, float]:
    """Find the vector by which a number is read off the last residual stream, at a fixed scale of the final norm.

    The norm is left to the model, whatever its kind. It takes what is along the stream itself out of the gradient,
    since it fixes the length; the number itself says how much that was.

    Returns:
        The vector, in float64; what the number is without any stream; and the number.
    """
    with torch.enable_grad():
        _, cache = model.run_with_cache(ids, return_type=None, names_filter=[last])
        stream = cache[last].detach()
        stream = torch.cat([stream, stream.index_fill(1, torch.tensor([place], device=stream.device), 0.0)])
        stream.requires_grad_()
        logits = model.run_with_hooks(ids.expand(2, -1), fwd_hooks=[(last, lambda found, hook: stream)])
        value, constant = number(logits[:1]), float(number(logits[1:]).detach())
        (gradient,) = torch.autograd.grad(value, stream)
    along, gradient = stream[0, place].detach().double(), gradient[0, place].double()
    if model.takes_off_mean:
        along = along - along.mean()
    logit = float(value.detach())
    missing = (logit - constant - gradient @ along) / along.square().sum()
    return gradient + missing * along, constant, logit


def by_gradient(
    model: HookedSAETransformer,
    sae: SAE,
    prompt: Input,
    target: Token,
    against: Token | None = None,
    *,
    position: int = -1,
    steps: int | None = None,
) -> ByGradient:
    """Attribute a logit to the latents at all positions by its gradient, with error terms kept.

    Args:
        model: The language model.
        sae: The SAE.
        prompt: One prompt.
        target: Token whose logit it is.
        against: Token whose logit is taken off it.
        position: Where it is predicted.
        steps: Take the gradient at so many points between no latent at all and the activations as they are, and their
            mean: integrated gradients, complete as far as the points are dense. None: at the activations alone.

    Raises:
        UserError: A token is none, the prompt is several or too long, or steps is below 1.

    Source: Nanda 2023 (attribution patching); Marks et al. 2024 (Sparse Feature Circuits, arXiv 2403.19647), whose
    error terms and integrated gradients these are; Sundararajan et al. 2017 (arXiv 1703.01365).
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps} takes no gradient; give at least 1, or None")
    ids, place = _prompt(model, prompt, position)
    number = _number(model, target, against, place)
    at = model.get_sae_hook_name(sae)
    found: dict[str, Tensor] = {}

    def value(share: float) -> Tensor:
        """The number with all latents at a share of what they are."""

        def shrink(f: Tensor, hook: Any) -> Tensor:
            found["f"], found["shrunk"] = f.detach(), (share * f.detach()).requires_grad_()
            return found["shrunk"]

        logits = model.run_with_hooks_with_saes(
            ids, saes=[sae], fwd_hooks=[(at, shrink)], use_error_term=True, exclude_special_tokens=model.special_ids
        )
        return number(logits)

    with torch.enable_grad():
        logit, without = float(value(1.0).detach()), float(value(0.0).detach())
        shares = [1.0] if steps is None else [(step + 0.5) / steps for step in range(steps)]
        gradients = [torch.autograd.grad(value(share), found["shrunk"])[0][0] for share in shares]
    activations = found["f"][0]
    return ByGradient(activations * torch.stack(gradients).mean(0), activations, logit, without)


def _prompt(model: HookedSAETransformer, prompt: Input, position: int) -> tuple[Int[Tensor, "1 seq"], int]:
    """Take a prompt's ids, and its position counted from 0."""
    batch = model.read(prompt)
    if len(batch.lengths) != 1:
        raise UserError(f"prompt holds {len(batch.lengths)} prompts; give one at a time")
    n = batch.lengths[0]
    if not -n <= position < n:
        raise UserError(
            f"position={position} is none of the prompt's {n}; give one from 0 to {n - 1}, or -1 for the last"
        )
    return batch.ids, position % n


def _number(
    model: HookedSAETransformer, target: Token, against: Token | None, place: int
) -> Callable[[Float[Tensor, "1 seq vocab"]], Tensor]:
    """Return what takes the logit, or the difference, from the model's output; a cap on logits is undone."""
    ids = [_id(model, "target", target), *([] if against is None else [_id(model, "against", against)])]
    cap = getattr(model.hf_model.config.get_text_config(), "final_logit_softcapping", None)

    def number(logits: Float[Tensor, "1 seq vocab"]) -> Tensor:
        chosen = logits[0, place, ids].double()
        chosen = chosen if cap is None else cap * torch.atanh(chosen / cap)
        return chosen[0] - chosen[1] if len(ids) == 2 else chosen[0]

    return number


def _id(model: HookedSAETransformer, key: str, token: Token) -> int:
    if isinstance(token, str):
        try:
            return model.to_single_token(token)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    if not 0 <= token < model.cfg.d_vocab:
        raise UserError(f"{key}={token} is no token of {model.model_name}; give an id below {model.cfg.d_vocab}")
    return token
