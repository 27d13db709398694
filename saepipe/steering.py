"""Steering: latents of an SAE added, clamped or ablated while a language model runs.

    steer = Steer(sae, {12: 4.0}, typical=typical)
    model.generate("The", fwd_hooks=steer.fwd_hooks, seed=0)

What the SAE does not reconstruct stays, and so does every other latent: where a latent's activation is to change by
some amount, the model's activation moves by that amount along the latent's direction (`SAE.directions`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepipe.errors import UserError, unknown
from saepipe.saes import token_norm
from saepipe.saes.base import SAE
from saepipe.splicing import Splice
from saepipe.typical import Typical

MODES = ("add", "clamp", "ablate")

Positions = Sequence[int] | slice | Bool[Tensor, "batch seq"] | None
"""Positions counted from 0 (with the beginning-of-sequence token), a range of them, or a mask; None: all but the first.
"""


class Steer:
    """Functions for `fwd_hooks` that change what latents of an SAE write.

    - `add` adds the strength to what a latent is;
    - `clamp` holds it at the strength;
    - `ablate` holds it at 0, so that a token on which it is silent stays as it is.

    Position 0 is left alone where nothing else is asked for: SAEs are not trained on it, and what they make of the sink
    there is of no meaning.

    Args:
        sae: The SAE; its metadata says where it belongs. A transcoder's latents are read at one hook and written at
            another.
        latents: Latent -> strength, or just their numbers to ablate them.
        mode: `add`, `clamp` or `ablate`.
        typical: Typical activations, in units of which the strengths are then; None: in the latents' own.
        positions: Where. While text is generated these are positions of the whole text, so `slice(5, None)` is what
            follows a prompt of five tokens; with a cache of keys and values too, whose passes read one new token each.

    Raises:
        UserError: A latent is none of the SAE's, comes twice or never fired, a strength is missing or no number, or a
            position is negative.
    """

    def __init__(
        self,
        sae: SAE,
        latents: Mapping[int, float] | Sequence[int],
        mode: str = "add",
        *,
        typical: Typical | None = None,
        positions: Positions = None,
    ) -> None:
        splice = Splice(sae)
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        check_latents(sae, latents)
        if mode != "ablate" and not isinstance(latents, Mapping):
            raise UserError(
                f"latents={list(latents)} has no strengths to {mode}; give a dictionary, latent -> strength"
            )
        if isinstance(positions, Sequence) and any(position < 0 for position in positions):
            raise UserError(
                f"positions={list(positions)} counts from the end, which moves as text is generated; count from 0"
            )
        self._sae, self._mode, self._positions = sae, mode, positions
        self._latents = list(latents)
        strengths = latents if isinstance(latents, Mapping) and mode != "ablate" else dict.fromkeys(latents, 0.0)
        self.amounts = {
            latent: strength * (typical.of(latent) if typical is not None and mode != "ablate" else 1.0)
            for latent, strength in strengths.items()
        }
        """Latent -> what is added, or what it is held at, in the latent's own units."""
        for latent, amount in self.amounts.items():
            if not math.isfinite(amount):
                raise UserError(f"latents={{{latent}: {amount}}} is no strength; give a number")
        self._hook_in, self._hook_out = splice.hook_in, splice.hook_out
        self._read: Tensor | None = None

    @property
    def fwd_hooks(self) -> list[tuple[str, Callable[..., Tensor | None]]]:
        """Pairs of a hook point and a function, as `generate`, `run_with_hooks` and `hooks` take them.

        A pass over one token, after another pass of the same functions, reads the next token of the same texts.
        """
        read_before = 0

        def steered(found: Tensor, hook: Any) -> Tensor:
            nonlocal read_before
            first = read_before if found.shape[1] == 1 else 0
            read_before = first + found.shape[1]
            return self._steered(found, found if self._hook_in == self._hook_out else self._read, first)

        reads = [] if self._hook_in == self._hook_out else [(self._hook_in, self._keep)]
        return [*reads, (self._hook_out, steered)]

    def _keep(self, found: Tensor, hook: Any) -> None:
        self._read = found

    def _steered(self, found: Tensor, read: Tensor | None, first: int) -> Tensor:
        """Move the activations that are found from a position on, by what the SAE makes of those that it reads."""
        if read is None:
            raise UserError(
                f"the transcoder of {self._hook_in} to {self._hook_out} is to write before it has read anything; set "
                "metadata['hook_name'] to an earlier hook"
            )
        directions = self._sae.directions(self._latents)
        read = read.to(directions.device, directions.dtype)
        heads = found.ndim - 3  # TransformerLens gives the heads of hook_z and its like an axis of their own
        moved = self._change(read, found.shape[:2], first) @ directions
        if self._sae.token_norm != "none":
            _, moments = token_norm.normalise(read.flatten(2), self._sae.token_norm)
            assert moments is not None
            moved = moved * moments.scale
        if moved.shape[-1] != found.shape[2:].numel():
            raise UserError(
                f"{self._hook_out} is {found.shape[2:].numel()} wide in this model, and the SAE's d_out is "
                f"{moved.shape[-1]}; give the SAE of this model and hook"
            )
        return found + (moved.view_as(found) if heads else moved).to(found.device, found.dtype)

    def _change(self, read: Tensor, shape: torch.Size, first: int) -> Float[Tensor, "batch seq latent"]:
        """By how much each latent is to change at each position."""
        amounts = torch.tensor(list(self.amounts.values()), device=read.device, dtype=read.dtype)
        change = amounts.expand(*shape, -1)
        if self._mode != "add":
            change = change - self._sae.encode(read)[..., self._latents]
        return change.masked_fill(~self._mask(shape, first).to(read.device)[..., None], 0.0)

    def _mask(self, shape: torch.Size, first: int) -> Bool[Tensor, "#batch seq"]:
        """Where to steer, in what is read from a position on."""
        where = slice(1, None) if self._positions is None else self._positions
        if isinstance(where, Tensor):
            if where.shape[1] != shape[1] or len(where) not in (1, shape[0]):
                raise UserError(
                    f"positions is a mask of shape {list(where.shape)}, and the tokens are {list(shape)}; give one of "
                    "that shape, or a slice where text is generated"
                )
            return where
        seq = first + shape[1]
        mask = torch.zeros(1, seq, dtype=torch.bool)
        mask[0, where if isinstance(where, slice) else [place for place in where if place < seq]] = True
        return mask[:, first:]


def check_latents(sae: SAE, latents: Mapping[int, float] | Sequence[int]) -> None:
    """Refuse numbers of latents that an SAE does not have, or that come twice.

    Raises:
        UserError: Names the first of them, or says that there is none.
    """
    if not latents:
        raise UserError("latents=[] names no latent; give at least one")
    for latent in latents:
        if not 0 <= latent < sae.d_sae:
            raise UserError(
                f"latents={latent} is none of the SAE's {sae.d_sae}; give a number from 0 to {sae.d_sae - 1}"
            )
    if len(set(latents)) < len(latents):
        raise UserError(f"latents={list(latents)} names a latent more than once; name each once")
