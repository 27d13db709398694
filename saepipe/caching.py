"""Running a language model and keeping what passes its hook points."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saepipe import not_taken, outputs
from saepipe.activation_cache import ActivationCache
from saepipe.errors import UserError
from saepipe.hooking import ForwardPass, Where
from saepipe.outputs import Output
from saepipe.prompts import Input, Prompts

Positions = int | slice | Sequence[int] | Tensor | None
"""Which positions to keep: one (whose axis goes), the arguments of `slice` as a tuple, a list; None is all."""

_HEADS_FIRST = ("pattern", "attn_scores")
"""Ends of names whose activations are [batch, head, query, key]."""


class Caches(Prompts):
    """The part of a model that keeps activations."""

    model: Any
    _run: Callable[..., Any]

    def run_with_cache(
        self,
        input: Input,
        return_type: str | None = "logits",
        names_filter: Where | Sequence[str] | None = None,
        stop_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        device: str | torch.device | None = None,
        prepend_bos: bool | None = None,
        loss_per_token: bool = False,
        incl_bwd: bool = False,
        pos_slice: Positions = None,
        **others: Any,
    ) -> tuple[Tensor | Output | None, ActivationCache | dict[str, Tensor]]:
        """Run the model and keep what passes its hook points, detached from gradients.

        Args:
            input: As in `forward`.
            return_type: As in `forward`.
            names_filter: Names to keep, or what says of a name whether to keep it; None keeps all that have names of
                TransformerLens, and those of SAEs.
            stop_at_layer: As in `forward`.
            remove_batch_dim: Drop the batch's axis, where it is of one prompt.
            return_cache_object: Give an `ActivationCache`, else a dictionary.
            device: Where to keep them; None is where they are.
            prepend_bos: As in `forward`.
            loss_per_token: As in `forward`.
            incl_bwd: Differentiate what is returned, one number, and keep the gradients of the same hook points, as
                `<name>_grad`.
            pos_slice: The positions to keep: one (then their axis is dropped), the arguments of `slice` as a tuple, or
                a list; None keeps all.
            **others: Arguments of TransformerLens' that have no meaning here, which say what to do instead.

        Raises:
            UserError: As in `forward`; incl_bwd of what is not one number, or where gradients are switched off.
        """
        not_taken.refuse("run_with_cache", others, not_taken.CACHE, _OWN)
        if incl_bwd and not torch.is_grad_enabled():
            raise UserError("incl_bwd=True needs gradients, which torch.no_grad switches off; leave one of them out")
        kept: dict[str, Tensor] = {}

        def keep(name: str, found: Tensor) -> Tensor:
            found = _at(found.detach(), pos_slice, 2 if name.endswith(_HEADS_FIRST) else 1)
            return found.clone().to(device or found.device)

        def record(passing: ForwardPass) -> None:
            if names_filter is None or callable(names_filter):
                names = passing.find(names_filter or (lambda name: True))
            else:
                wanted = [names_filter] if isinstance(names_filter, str) else names_filter
                names = [name for each in wanted for name in passing.find(each)]
            passing.record(names, kept, keep, gradients=incl_bwd)

        outputs.check(return_type)
        batch = self.read(input, prepend_bos=prepend_bos)
        out: Any = self._run(batch.ids, stop_at_layer, record)
        if stop_at_layer is None:
            out = outputs.output(out, batch, return_type, loss_per_token=loss_per_token)
        if incl_bwd:
            if not isinstance(out, Tensor) or out.numel() != 1:
                raise UserError(f'incl_bwd=True differentiates one number; give return_type="loss", not {return_type}')
            out.backward()
        cache = ActivationCache(kept, self.model)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return out, cache if return_cache_object else cache.cache_dict


_OWN = [name for name in Caches.run_with_cache.__annotations__ if name not in ("others", "return")]


def _at(found: Tensor, positions: Positions, axis: int) -> Tensor:
    """Take positions along an axis."""
    if positions is None:
        return found
    if isinstance(positions, int):
        return found.select(axis, positions)
    wanted: Any = slice(*positions) if isinstance(positions, tuple) else positions
    return found[(slice(None),) * axis + (wanted,)]
