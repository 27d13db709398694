"""SAEs in the place of activations of a language model: which hook points they read and replace, and their own points.

An SAE's own hook points go by the name of the hook point that it replaces, with SAELens's name of the point behind:
`blocks.8.hook_resid_pre.hook_sae_acts_post`. All of them hold one vector per token, heads joined.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepipe import model_names, places
from saepipe.errors import UserError
from saepipe.saes.base import SAE

POINTS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)
"""An SAE's own hook points, in the order in which they are passed; that of the error only with an error term."""

At = Callable[[str, Tensor], Tensor]
"""Lets the functions at one of the SAE's own points see, and replace, what passes it."""
Step = Callable[[Tensor], Tensor]


class Splice:
    """An SAE at its place: it reads the hook point `hook_in`, and what it makes of it replaces `hook_out`.

    Args:
        sae: The SAE; a transcoder replaces another hook point than it reads.
        use_error_term: Add what the SAE does not reconstruct, so that without an intervention nothing changes. It is
            held fixed: no gradient and no intervention reaches it through the SAE. None: what
            `sae.use_error_term` says.
        special: Ids of tokens whose activations are left as they are.

    Raises:
        UserError: It is no SAE, or it does not say where it belongs.
    """

    def __init__(self, sae: Any, *, use_error_term: bool | None = None, special: Sequence[int] = ()) -> None:
        if not isinstance(sae, SAE):
            kind = type(sae).__name__
            cure = "give the first of these three" if isinstance(sae, tuple) else "give what saepipe.SAE.load returns"
            raise UserError(f"saes holds {kind}, which is no SAE; {cure}")
        if not sae.metadata.get("hook_name"):
            raise UserError(
                "saes holds an SAE whose metadata names no hook; set sae.metadata['hook_name'], such as "
                "blocks.8.hook_resid_pre"
            )
        for key in ("hook_name", "hook_name_out"):
            if not isinstance(named := sae.metadata.get(key), str | None):
                raise UserError(f"saes holds an SAE whose metadata says {key}={named}, which is no name; set it to one")
        self.sae = sae
        self.hook_in: str = sae.metadata["hook_name"]
        self.hook_out: str = sae.metadata.get("hook_name_out") or self.hook_in
        wanted = sae.use_error_term if use_error_term is None else use_error_term
        self.use_error_term = bool(wanted)
        self._special = list(special)

    @property
    def points(self) -> list[str]:
        """Names of its own hook points."""
        return [f"{self.hook_out}.{point}" for point in POINTS]

    def steps(self, at: At, ids: Int[Tensor, "batch seq"]) -> list[tuple[str, Step]]:
        """Return what to do at which hook point, with activations of one vector per token.

        Args:
            at: Called at each of its own points, with the point's name.
            ids: Token ids of the forward pass.
        """
        kept = torch.isin(ids, torch.tensor(self._special, device=ids.device)) if self._special else None
        if self.hook_in == self.hook_out:
            return [(self.hook_out, lambda found: self._replaced(found, found, at, kept))]
        read: list[Tensor] = []

        def keep(found: Tensor) -> Tensor:
            read.append(found)
            return found

        def replace(found: Tensor) -> Tensor:
            if not read:
                raise UserError(
                    f"the transcoder of {self.hook_in} to {self.hook_out} is to predict what the model comes by before "
                    "it has read anything; set metadata['hook_name'] to an earlier hook"
                )
            return self._replaced(read[-1], found, at, kept)

        return [(self.hook_in, keep), (self.hook_out, replace)]

    def _replaced(
        self,
        read: Float[Tensor, "batch seq d_in"],
        found: Float[Tensor, "batch seq d_out"],
        at: At,
        kept: Bool[Tensor, "batch seq"] | None,
    ) -> Float[Tensor, "batch seq d_out"]:
        """Run the SAE on what was read, in the place of what was found."""
        self._check_width("d_in", self.hook_in, self.sae.d_in, read)
        self._check_width("d_out", self.hook_out, self.sae.d_out, found)
        weights = self.sae.W_dec
        read, target = (each.to(weights.device, weights.dtype) for each in (read, found))
        whole = kept.to(weights.device).unsqueeze(-1) if kept is not None else None
        x = at(f"{self.hook_out}.hook_sae_input", read)
        hidden_pre = at(f"{self.hook_out}.hook_sae_acts_pre", self.sae.pre_activations(x))
        f = at(f"{self.hook_out}.hook_sae_acts_post", self.sae.activate(hidden_pre))
        output = at(f"{self.hook_out}.hook_sae_recons", self.sae.decode(f, x))
        if self.use_error_term:
            with torch.no_grad():  # a second time, so that no function changes the error
                error = target - self.sae.decode(self.sae.encode(read), read)
                error = error if whole is None else error.masked_fill(whole, 0.0)
            output = output + at(f"{self.hook_out}.hook_sae_error", error)
        if whole is not None:
            output = torch.where(whole, target, output)
        return at(f"{self.hook_out}.hook_sae_output", output).to(found.device, found.dtype)

    def _check_width(self, key: str, hook: str, width: int, found: Tensor) -> None:
        if found.shape[-1] != width:
            raise UserError(
                f"{hook} is {found.shape[-1]} wide in this model, and the SAE's {key} is {width}; give the SAE of this "
                "model and hook"
            )


def doubts(sae: SAE, *, model_name: str, compatibility_mode: bool, centred: bool) -> list[str]:
    """Say where an SAE was trained on another model's activations, or on this one's with other numerics.

    Args:
        sae: The SAE.
        model_name: Name of the model.
        compatibility_mode: Whether it has HookedTransformer numerics.
        centred: Whether these change the residual stream, as they do where LayerNorm is folded.
    """
    found = []
    hook, trained_on = sae.metadata.get("hook_name"), sae.metadata.get("model_name")
    if trained_on and not model_names.same(trained_on, model_name):
        found.append(f"the SAE of {hook} was trained on model_name={trained_on}, and this is {model_name}")
    processed = sae.metadata.compatibility_mode_of_training()
    hooks = [sae.metadata.get(key) or "" for key in ("hook_name", "hook_name_out")]
    alike = not centred and all(name.rsplit(".")[-1] in ("", *places.RESIDUAL) for name in hooks)
    if processed is not None and not alike and processed != compatibility_mode:
        theirs, cure = _PROCESSED if processed else _PLAIN
        found.append(f"the SAE of {hook} was trained on {theirs}, and this model has others; use {cure}")
    return found


_PLAIN = ("plain activations", "load_model or HookedSAETransformer.from_pretrained_no_processing")
_PROCESSED = (
    "the activations of folded and centred weights (compatibility mode)",
    "HookedSAETransformer.from_pretrained, or load_model with compatibility_mode=True",
)
