"""The manifest of a store: written last, when everything was verified, so that its absence means incomplete."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saepipe.durable import disk_errors, fits, read_sealed, write_sealed
from saepipe.errors import DamageError, UserError
from saepipe.layout import place
from saepipe.plan import Plan
from saepipe.record import Record, damaged
from saepipe.shard import tensor_shapes

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
            DamageError: It is damaged or belongs to another plan.
        """
        path = folder / "manifest.json"
        document = read_sealed(path, cure=_AGAIN)
        if document.get("plan") != plan.identity:
            raise DamageError(path, "belongs to another plan", _AGAIN)
        kind = {"format": int, "plan": str, "companions": float, "hooks": dict.fromkeys(plan.hooks, _SUMMARY)}
        sound = fits(document, kind) and all(
            len(of["records"]) == plan.n_shards
            and len(of["held_out_records"]) == plan.n_held_out_shards
            and len(of["statistics"]["mean"]) == len(of["statistics"]["spread"]) == plan.hooks[hook]
            for hook, of in document["hooks"].items()
        )
        if not sound:
            raise DamageError(path, "does not describe this store", _AGAIN)
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
            sums = Sums()
            for one in train:
                sums.add(one)
            hooks[hook] = {
                "statistics": sums.statistics(hook),
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


@dataclass
class Sums:
    """What the statistics of a hook are made of: the sums of its shards, added one by one."""

    counted: int = 0
    sum_norm: float = 0.0
    sum: Float64[np.ndarray, " d_in"] | float = 0.0
    sum_squares: Float64[np.ndarray, " d_in"] | float = 0.0

    def add(self, record: Record) -> None:
        """Add a training shard."""
        self.counted += record.counted
        self.sum_norm += record.sum_norm
        self.sum = self.sum + record.sum
        self.sum_squares = self.sum_squares + record.sum_squares

    def statistics(self, hook: str) -> dict[str, Any]:
        """Return what the manifest says of a hook.

        Raises:
            UserError: The hook has no row to take statistics of.
        """
        mean_norm = self.sum_norm / max(self.counted, 1)
        if not mean_norm:
            raise UserError(
                f"model.hooks: {hook} has no ordinary row (neither special token nor position 0) that is not zero; "
                "choose another hook, or text with more than special tokens"
            )
        mean = np.asarray(self.sum / self.counted)
        spread = np.sqrt(np.maximum(self.sum_squares / self.counted - mean**2, 0))
        return {"rows": self.counted, "mean_norm": mean_norm, "mean": mean.tolist(), "spread": spread.tolist()}


def load_record(folder: Path, plan: Plan, manifest: Manifest | None, where: tuple[str, int, bool]) -> Record:
    """Read the record of a shard: it must be of the plan's sizes, and the one that the finaliser saw.

    Args:
        folder: Folder of the store.
        plan: The store's plan.
        manifest: Its manifest; None where it has none yet.
        where: Hook, number of the shard, and whether it is held out.

    Raises:
        DamageError: The record is missing, damaged, or another one.
    """
    hook, shard, held_out = where
    name, width = place(*where), plan.hooks[hook]
    found = Record.load(folder, name, plan.identity)
    if (found.rows, found.bytes, len(found.blocks), len(found.sum), len(found.sum_squares), set(found.tensors)) != (
        plan.shard_rows(shard, held_out=held_out),
        plan.shard_bytes(hook, shard, held_out=held_out),
        plan.n_blocks(hook, shard, held_out=held_out),
        width,
        width,
        set(tensor_shapes(1, 1, plan.dtype)) - {"activations", "row_scale"},
    ):
        raise damaged(folder, name, "has a record of another size")
    if manifest is not None and found.digest != manifest.digest(*where):
        raise damaged(folder, name, "has a record that is not the one in manifest.json")
    return found
