"""What a user sees of a hook point, one vector per token, and changes there."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.activations import HookFunction
from saepipe.errors import UserError
from saepipe.hook_names import split_head, with_head

Edit = Callable[[Tensor], Tensor]
"""Receives a hook point's activations [batch, seq, d] and returns their replacement."""


def per_token(hook: str, found: Tensor | None, shape: tuple[int, ...]) -> Float[Tensor, "batch seq _"]:
    """Join heads, or take the one that the name selects; refuse what is not one vector per token.

    Args:
        hook: Name of the hook point.
        found: What passed it; None where nothing did.
        shape: Shape of the token ids.
    """
    head = split_head(hook)[1]
    if found is None:
        raise UserError(f"model.hooks={hook} is not passed by this model's forward pass; choose another hook")
    if found.ndim < 3 or found.shape[:2] != shape:
        raise UserError(
            f"model.hooks={hook} has shape {list(found.shape)}, not one vector per token; choose another hook"
        )
    if head is None:
        return found.flatten(2)
    check_head(hook, found.shape[2] if found.ndim == 4 else 0)
    return found[:, :, head]


def check_head(hook: str, heads: int) -> None:
    """Refuse a head that is not there.

    Args:
        hook: Name of the hook point.
        heads: How many heads it has.
    """
    base, head = split_head(hook)
    if head is not None and not heads:
        raise UserError(f"model.hooks={hook} names a head of {base}, which has no heads; give {base}")
    if head is not None and head >= heads:
        raise UserError(
            f"model.hooks={hook} names head {head} of a hook with {heads}; the last is {with_head(base, heads - 1)}"
        )


def functions(edits: Mapping[str, Edit], shape: tuple[int, ...], device: torch.device) -> dict[str, HookFunction]:
    """Turn edits into functions at the hook points themselves, in the order given where several meet at one.

    Args:
        edits: Hook name -> function from its activations [batch, seq, d] to their replacement.
        shape: Shape of the token ids.
        device: Where edits want the activations.
    """
    made: dict[str, HookFunction] = {}

    def add(point: str, function: HookFunction) -> None:
        made[point] = _both(made[point], function) if point in made else function

    # What is added between attention and MLP depends on the edits before it, so it comes last
    for hook, edit in sorted(edits.items(), key=lambda item: is_mid(item[0])):
        if is_mid(hook):
            for point, function in mid_functions(hook, edit, device).items():
                add(point, function)
        else:
            add(split_head(hook)[0], shown(hook, edit, shape, device))
    return made


def _both(first: HookFunction, second: HookFunction) -> HookFunction:
    def function(found: Tensor) -> Tensor | None:
        replaced = first(found)
        again = second(found if replaced is None else replaced)
        return replaced if again is None else again

    return function


def shown(hook: str, edit: Edit, shape: tuple[int, ...], device: torch.device) -> HookFunction:
    """Show an edit what `per_token` gives, and put its result in that place.

    The model goes on with a copy: it may write in place to what the edit has kept.
    """
    _, head = split_head(hook)

    def function(found: Tensor) -> Tensor:
        replaced = edit(per_token(hook, found, shape).to(device)).to(found.device)
        if head is None:
            return replaced.reshape(found.shape).clone()
        whole = found.clone()
        whole[:, :, head] = replaced
        return whole

    return function


def is_mid(hook: str) -> bool:
    """Say whether a name means the residual stream between attention and MLP."""
    return hook.endswith(".hook_resid_mid")


def mid_functions(hook: str, edit: Edit, device: torch.device) -> dict[str, HookFunction]:
    """Edit the residual stream between attention and MLP.

    The hook point itself is the MLP's input alone (in TransformerLens' bridge too): the stream that goes on beside the
    MLP would keep the old value. So what the attention adds is changed instead.
    """
    block = hook.removesuffix("hook_resid_mid")
    before: list[Tensor] = []

    def add(added: Tensor) -> Tensor | None:
        old = before[0].to(added.device)
        whole = (old + added).to(device)
        edited = edit(whole)
        # Reading changes nothing: the difference would be what is added, but for rounding
        return None if edited is whole else edited.to(added.device) - old

    return {f"{block}hook_resid_pre": before.append, f"{block}hook_attn_out": add}
