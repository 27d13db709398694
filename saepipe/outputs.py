"""What a forward pass returns: logits, the loss of the next token, or both."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from saepipe.errors import UserError
from saepipe.prompts import Batch

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch seq vocab"]
    loss: Tensor


def check(return_type: str | None) -> None:
    """Refuse what is none of RETURN_TYPES."""
    if return_type not in RETURN_TYPES:
        raise UserError(f"return_type={return_type} is not known; give logits, loss, both or None")


def output(
    logits: Float[Tensor, "batch seq vocab"], batch: Batch, return_type: str | None, *, loss_per_token: bool
) -> Tensor | Output | None:
    """Make of the logits what was asked for.

    Args:
        logits: The model's.
        batch: What it read.
        return_type: One of RETURN_TYPES.
        loss_per_token: Give the loss of each token but the first, not the mean; 0 where it is padding.
    """
    if return_type is None or return_type == "logits":
        return logits if return_type else None
    ids = batch.ids.to(logits.device)
    loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    real = (torch.arange(1, ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).to(loss)
    loss = loss.view(len(ids), -1) * real
    loss = loss if loss_per_token else loss.sum() / real.sum()
    return Output(logits, loss) if return_type == "both" else loss
