"""A stream of rows, shuffled through a buffer in memory."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor


def mixed(
    parts: Iterable[dict[str, Float[Tensor, "token _"]]],
    size: int,
    batch: int,
    permutation: Callable[[int], Int[Tensor, " n"]],
) -> Iterator[dict[str, Float[Tensor, "token _"]]]:
    """Fill a buffer, give half of it in random order, fill it up again, and so on until the parts end.

    Rows that are copied per row given stay at about two, however large the buffer is.

    Args:
        parts: Rows of the same tokens, by name; each part has as many rows under each name.
        size: Rows that the buffer holds; at least two batches are.
        batch: Rows of a batch.
        permutation: Gives the numbers below n in random order.
    """
    size = max(size, 2 * batch)
    waiting: list[dict[str, Tensor]] = []
    held = 0
    for part in parts:
        waiting.append(part)
        held += _rows(part)
        if held < size:
            continue
        order = permutation(held)
        buffer = {name: torch.cat([rows[name] for rows in waiting])[order] for name in part}
        given = (held - size // 2) // batch * batch
        for start in range(0, given, batch):
            yield {name: rows[start : start + batch] for name, rows in buffer.items()}
        waiting, held = [{name: rows[given:] for name, rows in buffer.items()}], held - given


def _rows(part: dict[str, Tensor]) -> int:
    return len(next(iter(part.values())))
