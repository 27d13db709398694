"""A store of activations: a folder of shards that describes itself.

- `plan.json`: immutable; its hash is the store's identity
- `tokens/`: the token store
- `<hook>/000123.*`: training rows in shuffled order, shard and record
- `heldout/<hook>/`: held-out rows in natural order
- `manifest.json`: written last, after everything was verified; absent = incomplete
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepipe import progress, shards
from saepipe.durable import disk_errors, fits, is_temporary, read_sealed, remove_stale, write_sealed
from saepipe.errors import UserError, unknown
from saepipe.lock import LOCK
from saepipe.plan import Plan
from saepipe.shards import DTYPES, Record, ShardReader
from saepipe.token_store import TokenStore

_OPEN_FILES = 256  # well under the usual limit of 1024 a process
_HELD_OUT_CHUNK = 4096
# What the manifest says of each hook
_SUMMARY = {
    "statistics": {"rows": int, "mean_norm": float, "mean": list[float], "spread": list[float]},
    "records": list[str],
    "held_out_records": list[str],
}


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


class Store:
    """A store, open for writing (`create`) or for reading (`open`)."""

    def __init__(self, folder: Path, plan: Plan, tokens: TokenStore) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self.plan = plan
        self.tokens = tokens
        self._manifest: dict[str, Any] | None = None
        self._records: dict[str, Record] = {}
        self._reader = functools.lru_cache(_OPEN_FILES)(self._open_reader)
        for name in ("tokens", "heldout", *plan.hooks, *(f"heldout/{hook}" for hook in plan.hooks)):
            if (folder / name).is_symlink():
                raise UserError(f"{folder / name} is a link; make it a folder, or link the whole store.dir={folder}")

    @classmethod
    def create(cls, folder: str | Path, plan: Plan, tokens: TokenStore) -> "Store":
        """Make a store, or open one of the same plan to go on with it; the caller holds the folder's lock.

        Raises:
            UserError: The folder belongs to another plan or holds something else, or the tokens are damaged.
        """
        folder = Path(folder)
        assert plan.token_store == tokens.hash
        there = existing_plan(folder)
        with disk_errors("store.dir", folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
        if there is not None:
            there.check(plan, folder=folder)
        tokens.verify()  # what is captured from damaged ids would be sealed as sound
        if there is None:
            plan.save(folder)
        return cls(folder, plan, tokens)

    @classmethod
    def open(cls, folder: str | Path, *, complete: bool = True) -> "Store":
        """Open a store.

        Args:
            folder: Its folder.
            complete: Refuse a store that is not finished, and verify its tokens (shards are verified as they are read).

        Raises:
            UserError: No store, an incomplete one, or a file that is missing or damaged.
        """
        folder = Path(folder)
        plan = Plan.load(folder)
        tokens = TokenStore.open(folder / "tokens")
        if tokens.hash != plan.token_store:
            raise UserError(
                f"store.dir={folder} has the tokens of another store; delete {folder / 'tokens'} and run the same "
                "`python -m saepipe.cache` command again"
            )
        store = cls(folder, plan, tokens)
        if complete:
            store._load_manifest()
            tokens.verify()
        return store

    # ---- what it holds

    @property
    def hooks(self) -> list[str]:
        """Hook points, sorted."""
        return sorted(self.plan.hooks)

    @property
    def rows(self) -> int:
        """Training rows per hook."""
        return self.plan.tokens

    @property
    def complete(self) -> bool:
        """Whether the store has been finished, which `create` and `open(complete=False)` do not ask."""
        return (self.folder / "manifest.json").exists()

    def width(self, hook: str) -> int:
        """Return the width of a hook's rows."""
        if hook not in self.plan.hooks:
            raise unknown("stream.hook", hook, self.hooks, f"Those are the hooks of store.dir={self.folder}.")
        return self.plan.hooks[hook]

    def statistics(self, hook: str) -> Statistics:
        """Return the statistics of a hook's training rows, from the manifest."""
        numbers = self._of_manifest(hook)["statistics"]
        vectors = {key: torch.tensor(numbers[key], dtype=torch.float32) for key in ("mean", "spread")}
        return Statistics(numbers["rows"], numbers["mean_norm"], **vectors)

    def ordinary(
        self, shard: int, start: int = 0, stop: int | None = None, *, held_out: bool = False
    ) -> Bool[np.ndarray, " token"]:
        """Return which rows of a shard, from `start` to before `stop`, are ordinary (see `token_store.ordinary`)."""
        if not held_out:
            return self.tokens.train.ordinary(self.plan.row_tokens(shard, start, stop))
        first = shard * self.plan.shard_tokens
        stop = self.plan.shard_rows(shard, held_out=True) if stop is None else stop
        return self.tokens.heldout.ordinary(np.arange(first + start, first + stop))

    # ---- reading

    def read_block(self, hook: str, shard: int, block: int, *, held_out: bool = False) -> Float[Tensor, "token d_in"]:
        """Read a block of rows in the store's type, verified against its hash.

        Raises:
            UserError: The shard is missing or damaged; names it and the cure.
        """
        buffer = torch.empty(self.plan.block_rows[hook], self.width(hook), dtype=DTYPES[self.plan.dtype])
        return buffer[: self.read_block_into(hook, shard, block, buffer, held_out=held_out)]

    def read_block_into(
        self, hook: str, shard: int, block: int, out: Float[Tensor, "token d_in"], *, held_out: bool = False
    ) -> int:
        """Read a block into the first rows of `out` (see `ShardReader.read_into`); any number of threads may do so.

        Returns:
            How many rows the block has.
        """
        return self._reader(hook, shard, held_out).read_into(block, out)

    def held_out(self, hook: str) -> Iterator[tuple[Float[Tensor, "token d_in"], Bool[np.ndarray, " token"]]]:
        """Read the held-out rows in natural order, some thousand at a time, each with its `ordinary` mask."""
        block_rows = self.plan.block_rows[hook]
        step = max(1, _HELD_OUT_CHUNK // block_rows)
        for shard in range(self.plan.n_held_out_shards):
            n_blocks = self.plan.n_blocks(hook, shard, held_out=True)
            for first in range(0, n_blocks, step):
                blocks = range(first, min(first + step, n_blocks))
                rows = torch.cat([self.read_block(hook, shard, block, held_out=True) for block in blocks])
                start = first * block_rows
                yield rows, self.ordinary(shard, start, start + len(rows), held_out=True)

    def _open_reader(self, hook: str, shard: int, held_out: bool) -> ShardReader:
        record = self._record(hook, shard, held_out)
        return ShardReader(self.folder, record, block_rows=self.plan.block_rows[hook])

    def _record(self, hook: str, shard: int, held_out: bool) -> Record:
        """Load a shard's record, once; it must be the one that the finaliser saw."""
        name = place(hook, shard, held_out)
        if name not in self._records:
            record = Record.load(self.folder, name, self.plan.identity)
            if self._manifest is not None:
                known = self._manifest["hooks"][hook]["held_out_records" if held_out else "records"][shard]
                if record.digest != known:
                    raise shards.damaged(self.folder, name, "has a record that is not the one in manifest.json")
            self._records[name] = record
        return self._records[name]

    def _of_manifest(self, hook: str) -> dict[str, Any]:
        self.width(hook)
        if self._manifest is None:
            self._load_manifest()
        assert self._manifest is not None
        return dict(self._manifest["hooks"][hook])

    def _load_manifest(self) -> None:
        """Read the manifest, and check that every shard file is there in its full size."""
        path = self.folder / "manifest.json"
        again = "delete it and run the same `python -m saepipe.cache` command again (it keeps the shards)"
        try:
            manifest = read_sealed(path, cure=again)
        except FileNotFoundError:
            raise self._incomplete() from None
        if manifest.get("plan") != self.plan.identity:
            raise UserError(f"{path} belongs to another plan; {again}")
        if not self._described_by(manifest):
            raise UserError(f"{path} does not describe this store; {again}")
        for hook, shard, held_out in self.plan.places():
            name = place(hook, shard, held_out)
            shards.check_size(self.folder, name, self.plan.shard_bytes(hook, shard, held_out=held_out))
        self._manifest = manifest

    def _described_by(self, manifest: dict[str, Any]) -> bool:
        kind = {"format": int, "plan": str, "hooks": dict.fromkeys(self.plan.hooks, _SUMMARY)}
        return fits(manifest, kind) and all(
            len(of["records"]) == self.plan.n_shards
            and len(of["held_out_records"]) == self.plan.n_held_out_shards
            and len(of["statistics"]["mean"]) == len(of["statistics"]["spread"]) == self.plan.hooks[hook]
            for hook, of in manifest["hooks"].items()
        )

    def _incomplete(self) -> UserError:
        places = list(self.plan.places())
        written = sum(self.written(*where) for where in places)
        verified = "" if written < len(places) else ", but not verified"
        return UserError(
            f"store.dir={self.folder} is incomplete ({written} of {len(places)} shards are written{verified}); run the "
            "same `python -m saepipe.cache` command again, with all its overrides, to go on"
        )

    # ---- writing

    def written(self, hook: str, shard: int, held_out: bool = False) -> bool:
        """Tell whether a shard is finished: its record is sound and the file has the record's size."""
        try:
            record = self._record(hook, shard, held_out)
            shards.check_size(self.folder, record.place, record.bytes)
        except UserError:
            return False
        return True

    def missing_groups(self) -> list[int | None]:
        """Return the shuffle groups with a shard still to write, for any hook; None stands for the held-out rows."""
        missing = {
            None if held_out else self.plan.shard_group(shard)
            for hook, shard, held_out in self.plan.places()
            if not self.written(hook, shard, held_out)
        }
        return sorted(missing, key=lambda group: -1 if group is None else group)

    def write(self, hook: str, shard: int, activations: Float[Tensor, "token d_in"], *, held_out: bool = False) -> None:
        """Write one shard (see `shards.write_shard`); the store is incomplete from now until `finalise`."""
        assert activations.shape == (self.plan.shard_rows(shard, held_out=held_out), self.plan.hooks[hook])
        assert activations.dtype == DTYPES[self.plan.dtype]
        with disk_errors("store.dir", self.folder):
            (self.folder / "manifest.json").unlink(missing_ok=True)
        self._manifest = None
        self._reader.cache_clear()
        name = place(hook, shard, held_out)
        self._records[name] = shards.write_shard(
            self.folder,
            name,
            activations,
            self.ordinary(shard, held_out=held_out),
            plan=self.plan.identity,
            block_rows=self.plan.block_rows[hook],
            model_dtype=self.plan.model.get("dtype"),
        )

    def finalise(self) -> None:
        """Verify every byte, sum up the records and write manifest.json, which makes the store complete.

        Raises:
            UserError: A shard is missing or damaged; names it and the cure.
        """
        places = list(self.plan.places())
        if not all(self.written(*where) for where in places):
            raise self._incomplete()
        self.tokens.verify()
        rows = [self.plan.shard_rows(shard, held_out=held_out) for _, shard, held_out in places]
        with progress.bar("verify", sum(rows)) as bar:
            for where, count in zip(places, rows, strict=True):
                shards.verify(self.folder, self._record(*where))
                bar.update(count)
        manifest = {"format": 1, "plan": self.plan.identity, "hooks": {h: self._summary(h) for h in self.hooks}}
        with disk_errors("store.dir", self.folder):
            write_sealed(self.folder / "manifest.json", manifest)
        self._manifest = manifest

    def _summary(self, hook: str) -> dict[str, Any]:
        """Sum up a hook's records for the manifest."""
        train = [self._record(hook, shard, False) for shard in range(self.plan.n_shards)]
        held_out = [self._record(hook, shard, True) for shard in range(self.plan.n_held_out_shards)]
        counted = sum(record.counted for record in train)
        mean_norm = sum(record.sum_norm for record in train) / max(counted, 1)
        if not mean_norm:
            raise UserError(
                f"model.hooks: {hook} has no ordinary row (neither special token nor position 0) that is not zero; "
                "choose another hook, or text with more than special tokens"
            )
        mean = np.sum([record.sum for record in train], axis=0) / counted
        variance = np.sum([record.sum_squares for record in train], axis=0) / counted - mean**2
        statistics = {
            "rows": counted,
            "mean_norm": mean_norm,
            "mean": mean.tolist(),
            "spread": np.sqrt(np.maximum(variance, 0)).tolist(),
        }
        return {
            "statistics": statistics,
            "records": [record.digest for record in train],
            "held_out_records": [record.digest for record in held_out],
        }


def existing_plan(folder: Path) -> Plan | None:
    """Read the plan of the store in a folder where one is to be made; None where there is none yet.

    Call it before anything is written there, the lock too: tokens without a plan are an unfinished store's only beside
    its lock.

    Raises:
        UserError: The folder is a file, cannot be read, or holds something else.
    """
    with disk_errors("store.dir", folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"store.dir={folder} is a file; choose another store.dir")
        paths = folder.iterdir() if folder.is_dir() else ()
        names = {path.name for path in paths if not is_temporary(path)}
    if "plan.json" in names:
        return Plan.load(folder)
    if strange := names - ({LOCK, "tokens"} if LOCK in names else set()):
        raise UserError(
            f"store.dir={folder} is not empty and holds no store (it has {min(strange)}); choose another store.dir"
        )
    return None


def place(hook: str, shard: int, held_out: bool) -> str:
    """Return the path of a shard in the store, without its ending."""
    return f"{'heldout/' if held_out else ''}{hook}/{shard:06d}"
