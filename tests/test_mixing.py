"""The buffer: every row comes once, in random order, with half of the buffer left to mix with what follows."""

import torch

from saepipe.mixing import mixed


def batches(n_parts: int, size: int, batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = ({"a": torch.arange(10 * at, 10 * at + 10.0)[:, None].expand(10, 2)} for at in range(n_parts))
    return [found["a"][:, 0] for found in mixed(parts, size, batch, lambda n: torch.randperm(n, generator=generator))]


def test_every_row_comes_once_and_mixed() -> None:
    given = torch.cat(batches(n_parts=20, size=60, batch=7))
    assert len(given) == len(given.unique()) > 100
    assert (given.diff() != 1).sum() > 90
    first = batches(n_parts=20, size=60, batch=7)[0]
    assert first.max() >= 30  # from the whole buffer


def test_a_buffer_holds_two_batches_at_least() -> None:
    assert all(len(rows) == 16 for rows in batches(n_parts=9, size=1, batch=16))
    assert batches(n_parts=3, size=1, batch=16) == []
