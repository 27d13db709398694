"""The manifest of a store: written last, when everything was verified, so that its absence means incomplete."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.durable import disk_errors, fits, read_sealed, write_sealed
from saepipe.errors import UserError
from saepipe.plan import Plan
from saepipe.record import Record

_SUMMARY = {
    "statistics": {"rows": int, "mean_norm": float, "mean": list[float], "spread": list[float]},
    "records": list[str],
    "held_out_records": list[str],
}
_AGAIN = "delete it and run the same `python -m saepipe.cache` command again (it keeps the shards)"


@dataclass(frozen=True)
class Statistics:
    """Statistics of a hook's ordinary training rows (rows above ten times a shard's median norm left out)."""

    rows: int
    """How many rows they are of."""
    mean_norm: float
    """Mean length of a row."""
    mean: Float[Tensor, " d_in"]
    """Mean row, float32."""
    spread: Float[Tensor, " d_in"]
    """Standard deviation of each channel, float32."""

    @property
    def norm_scale(self) -> float:
        """Factor that makes the mean length sqrt(d)."""
        return float(len(self.mean) ** 0.5 / self.mean_norm)


@dataclass(frozen=True)
class Manifest:
    """What the finaliser found: every record's hash, and the statistics of every hook."""

    hooks: dict[str, dict[str, Any]]
    companions: float
    """Same-context companions of a row in a batch of the default stream, 1 where the shuffle is as good as uniform."""

    @classmethod
    def load(cls, folder: Path, plan: Plan) -> "Manifest":
        """Read manifest.json.

        Raises:
            FileNotFoundError: There is none: the store is incomplete.
            UserError: It is damaged or belongs to another plan.
        """
        path = folder / "manifest.json"
        document = read_sealed(path, cure=_AGAIN)
        if document.get("plan") != plan.identity:
            raise UserError(f"{path} belongs to another plan; {_AGAIN}")
        kind = {"format": int, "plan": str, "companions": float, "hooks": dict.fromkeys(plan.hooks, _SUMMARY)}
        sound = fits(document, kind) and all(
            len(of["records"]) == plan.n_shards
            and len(of["held_out_records"]) == plan.n_held_out_shards
            and len(of["statistics"]["mean"]) == len(of["statistics"]["spread"]) == plan.hooks[hook]
            for hook, of in document["hooks"].items()
        )
        if not sound:
            raise UserError(f"{path} does not describe this store; {_AGAIN}")
        return cls(document["hooks"], document["companions"])

    @classmethod
    def of(cls, plan: Plan, record: Callable[[str, int, bool], Record], *, companions: float) -> "Manifest":
        """Sum up the records of a store.

        Args:
            plan: The store's plan.
            record: Gives the record of a hook's shard, held out or not.
            companions: See the attribute.

        Raises:
            UserError: A hook has no row to take statistics of.
        """
        hooks = {}
        for hook in sorted(plan.hooks):
            train = [record(hook, shard, False) for shard in range(plan.n_shards)]
            held_out = [record(hook, shard, True) for shard in range(plan.n_held_out_shards)]
            hooks[hook] = {
                "statistics": _statistics(hook, train),
                "records": [one.digest for one in train],
                "held_out_records": [one.digest for one in held_out],
            }
        return cls(hooks, companions)

    def save(self, folder: Path, plan: Plan) -> None:
        """Write manifest.json, which makes the store complete."""
        document = {"format": 1, "plan": plan.identity, "companions": self.companions, "hooks": self.hooks}
        with disk_errors("store.dir", folder):
            write_sealed(folder / "manifest.json", document)

    def digest(self, hook: str, shard: int, held_out: bool) -> str:
        """Return the hash of the record that the finaliser saw."""
        return str(self.hooks[hook]["held_out_records" if held_out else "records"][shard])

    def statistics(self, hook: str) -> Statistics:
        """Return the statistics of a hook's training rows."""
        numbers = self.hooks[hook]["statistics"]
        vectors = {key: torch.tensor(numbers[key], dtype=torch.float32) for key in ("mean", "spread")}
        return Statistics(numbers["rows"], numbers["mean_norm"], **vectors)


def _statistics(hook: str, records: list[Record]) -> dict[str, Any]:
    counted = sum(record.counted for record in records)
    mean_norm = sum(record.sum_norm for record in records) / max(counted, 1)
    if not mean_norm:
        raise UserError(
            f"model.hooks: {hook} has no ordinary row (neither special token nor position 0) that is not zero; "
            "choose another hook, or text with more than special tokens"
        )
    mean = np.sum([record.sum for record in records], axis=0) / counted
    variance = np.sum([record.sum_squares for record in records], axis=0) / counted - mean**2
    spread = np.sqrt(np.maximum(variance, 0))
    return {"rows": counted, "mean_norm": mean_norm, "mean": mean.tolist(), "spread": spread.tolist()}
