"""What int8 costs rows, for docs/int8.md: `python docs/int8.py [FLOAT32_STORE OTHER_STORE ...]`.

Without stores, rows are drawn: of a plain kind, and of the kinds that make quantising hard. Stores have to be of one
text, model and seed, so that row for row they hold the same tokens.
"""

import sys

import numpy as np
import torch

from saepipe.int8 import Scales, decode
from saepipe.store import Store

ROWS, WIDTH = 65_536, 768


def drawn() -> None:
    """Print the error of rows that are drawn."""
    generator = np.random.Generator(np.random.PCG64(0))
    plain = generator.standard_normal((ROWS, WIDTH))
    spread = np.ones(WIDTH)
    spread[::96] = 50
    mean = np.zeros(WIDTH)
    mean[::96] = 500
    sinks = plain.copy()
    sinks[::128, 5] = 3000
    kinds = {
        "standard normal": plain,
        "8 channels with 50 times the spread": plain * spread,
        "8 channels with a mean of 500": plain + mean,
        "Student's t, 5 degrees": generator.standard_t(5, (ROWS, WIDTH)),
        "a sink of 3000 in every 128th row": sinks,
    }
    print("| rows | NMSE | worst channel |\n|---|---|---|")
    for name, rows in kinds.items():
        ordinary = np.arange(ROWS) % 128 != 0
        error, power = errors(rows, ordinary)
        print(f"| {name} | {error.sum() / power.sum():.1e} | {(error / power).max():.1e} |")


def errors(rows: np.ndarray, ordinary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared error and the variance of each channel, over the ordinary rows."""
    kept = rows[ordinary]
    scales = Scales.of(kept.mean(0), (kept**2).mean(0))
    values, row_scale = scales.encode(rows)
    decoded = decode(torch.from_numpy(values), torch.from_numpy(row_scale), scales).numpy()
    return ((decoded - rows)[ordinary] ** 2).mean(0), kept.var(0)


def stored(reference: str, others: list[str]) -> None:
    """Print the error of stores against one of float32."""
    base = Store.open(reference)
    for folder in others:
        store = Store.open(folder)
        for hook in base.hooks:
            mean = base.statistics(hook).mean.double()
            error = power = torch.zeros(len(mean), dtype=torch.float64)
            for shard in range(base.plan.n_shards):
                ordinary = torch.from_numpy(base.ordinary(shard))
                exact, found = (whole(one, hook, shard)[ordinary] for one in (base, store))
                error, power = error + (found - exact).square().sum(0), power + (exact - mean).square().sum(0)
            nmse, worst = (error.sum() / power.sum()).item(), (error / power).max().item()
            print(f"{folder} {hook} ({store.plan.dtype}): NMSE {nmse:.1e}, worst channel {worst:.1e}")


def whole(store: Store, hook: str, shard: int) -> torch.Tensor:
    """Read all rows of a shard."""
    blocks = range(store.plan.n_blocks(hook, shard))
    return torch.cat([store.read_block(hook, shard, block) for block in blocks]).double()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(__doc__)
    stored(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 2 else drawn()
