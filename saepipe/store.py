"""A store of activations: a folder of shards that describes itself.

- `plan.json`: immutable; its hash is the store's identity
- `tokens/`: the token store
- `<hook>/000123.*`: training rows in shuffled order, shard and record
- `heldout/<hook>/`: held-out rows in natural order
- `manifest.json`: written last, after everything was verified; absent = incomplete
"""

import functools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor

from saepipe import int8, progress, shard_writer
from saepipe.durable import disk_errors, remove_stale
from saepipe.errors import DamageError, UserError, unknown
from saepipe.int8 import Scales
from saepipe.layout import place
from saepipe.manifest import Manifest, Statistics, load_record
from saepipe.parallel import concurrently
from saepipe.plan import Plan
from saepipe.record import Record
from saepipe.shard import DTYPES, ShardReader, check_size, verify
from saepipe.shuffle import companions
from saepipe.token_store import TokenStore

_OPEN_FILES = 256  # well under the usual limit of 1024 a process
_HELD_OUT_CHUNK = 4096


class Store:
    """A store, open for writing (`create`) or for reading (`open`)."""

    def __init__(self, folder: Path, plan: Plan, tokens: TokenStore) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self.plan = plan
        self.tokens = tokens
        self._manifest: Manifest | None = None
        self._records: dict[str, Record] = {}
        self._reader = functools.lru_cache(_OPEN_FILES)(self._open_reader)
        for name in plan.folders:
            if (folder / name).is_symlink():
                raise DamageError(folder / name, "is a link", f"make it a folder, or link the whole store.dir={folder}")

    @classmethod
    def create(cls, folder: str | Path, plan: Plan, tokens: TokenStore) -> "Store":
        """Make a store, or open one of the same plan to go on with it; the caller holds the folder's lock.

        Raises:
            UserError: The folder belongs to another plan or holds something else, or the tokens are damaged.
        """
        folder = Path(folder)
        assert plan.token_store == tokens.hash
        there = Plan.found(folder)
        with disk_errors("store.dir", folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
        if there is not None:
            there.check(plan, folder=folder)
        tokens.verify()  # what is captured from damaged ids would be sealed as sound
        if there is None:
            plan.save(folder)
        return cls(folder, there or plan, tokens)

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
            store._manifest = store._load_manifest()
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
        try:
            Manifest.load(self.folder, self.plan)
        except (FileNotFoundError, UserError):
            return False
        return True

    def width(self, hook: str) -> int:
        """Return the width of a hook's rows."""
        if hook not in self.plan.hooks:
            raise unknown("stream.hook", hook, self.hooks, f"Those are the hooks of store.dir={self.folder}.")
        return self.plan.hooks[hook]

    def statistics(self, hook: str) -> Statistics:
        """Return the statistics of a hook's training rows, from the manifest."""
        self.width(hook)
        return self.manifest.statistics(hook)

    @property
    def manifest(self) -> Manifest:
        """What the finaliser found.

        Raises:
            UserError: The store is incomplete, or manifest.json or a shard's size is damaged.
        """
        if self._manifest is None:
            self._manifest = self._load_manifest()
        return self._manifest

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
        """Read a block of rows, verified against its hash: in the store's type, or float32 from int8.

        Raises:
            UserError: The shard is missing or damaged; names it and the cure.
        """
        size, width = self.plan.block_rows[hook], self.width(hook)
        out, row_scale = torch.empty(size, width, dtype=DTYPES[self.plan.dtype]), None
        if self.plan.dtype == "int8":
            row_scale = torch.empty(size)
        rows = self.read_block_into(hook, shard, block, out, row_scale, held_out=held_out)
        if row_scale is None:
            return out[:rows]
        return int8.decode(out[:rows], row_scale[:rows], self.scales(hook, shard, held_out=held_out))

    def announce(self, hook: str, shard: int, block: int) -> None:
        """Have the disk begin to read a block of training rows."""
        self._reader(hook, shard, False).announce(block)

    def read_block_into(
        self,
        hook: str,
        shard: int,
        block: int,
        out: Shaped[Tensor, "token d_in"],
        row_scale: Float32[Tensor, " token"] | None = None,
        *,
        held_out: bool = False,
    ) -> int:
        """Read a block into the first rows of `out` (see `ShardReader.read_into`); any number of threads may do so.

        Returns:
            How many rows the block has.
        """
        return self._reader(hook, shard, held_out).read_into(block, out, row_scale)

    def scales(self, hook: str, shard: int, *, held_out: bool = False) -> Scales:
        """Return what the rows of an int8 shard are decoded with."""
        scales = self._reader(hook, shard, held_out).scales
        assert scales is not None
        return scales

    def norm(self, hook: str, shard: int) -> Float32[np.ndarray, " token"]:
        """Read the norm of every row of a training shard, as it was before it was rounded to the store's type."""
        return self._reader(hook, shard, False).norm()

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
        known = self._record(hook, shard, held_out)
        width, block_rows = self.plan.hooks[hook], self.plan.block_rows[hook]
        return ShardReader(self.folder, known, width=width, dtype=self.plan.dtype, block_rows=block_rows)

    def _record(self, hook: str, shard: int, held_out: bool) -> Record:
        """Load a shard's record, once; it must be the one that the finaliser saw."""
        name = place(hook, shard, held_out)
        if name not in self._records:
            self._records[name] = load_record(self.folder, self.plan, self._manifest, (hook, shard, held_out))
        return self._records[name]

    def _load_manifest(self) -> Manifest:
        """Read the manifest, and check that every shard file is there in its full size."""
        try:
            manifest = Manifest.load(self.folder, self.plan)
        except FileNotFoundError:
            raise self._incomplete() from None
        for hook, shard, held_out in self.plan.places():
            check_size(self.folder, place(hook, shard, held_out), self.plan.shard_bytes(hook, shard, held_out=held_out))
        return manifest

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
            known = self._record(hook, shard, held_out)
            check_size(self.folder, known.place, known.bytes)
        except UserError:
            return False
        return True

    def lacks(self, group: int | None) -> bool:
        """Tell whether a shard of a shuffle group is missing, of any hook; None stands for the held-out rows."""
        held_out = group is None
        shards = range(self.plan.n_held_out_shards) if group is None else self.plan.group_shards(group)
        return not all(self.written(hook, shard, held_out) for hook in self.hooks for shard in shards)

    def missing_groups(self) -> list[int | None]:
        """Return the shuffle groups that the store lacks, the held-out rows (None) first."""
        return [group for group in (None, *range(self.plan.n_groups)) if self.lacks(group)]

    def write(self, hook: str, shard: int, activations: Float[Tensor, "token d_in"], *, held_out: bool = False) -> None:
        """Write one shard (see `shard_writer.write_shard`).

        Where that changes the shard's record, the store is incomplete until `finalise`.
        """
        assert activations.shape == (self.plan.shard_rows(shard, held_out=held_out), self.plan.hooks[hook])
        assert self.plan.dtype == "int8" or activations.dtype == DTYPES[self.plan.dtype]
        name = place(hook, shard, held_out)
        self._reader.cache_clear()
        self._records[name] = shard_writer.write_shard(
            self.folder,
            name,
            activations,
            self.ordinary(shard, held_out=held_out),
            plan=self.plan.identity,
            block_rows=self.plan.block_rows[hook],
            dtype=self.plan.dtype,
            model_dtype=self.plan.model.get("dtype"),
        )
        try:
            known = Manifest.load(self.folder, self.plan).digest(hook, shard, held_out)
        except (UserError, FileNotFoundError):
            known = None
        if known != self._records[name].digest:
            with disk_errors("store.dir", self.folder):
                (self.folder / "manifest.json").unlink(missing_ok=True)
            self._manifest = None

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
        work = concurrently(lambda where: verify(self.folder, self._record(*where)), places)
        with progress.bar("verify", sum(rows)) as bar, closing(work):
            for count, _ in zip(rows, work, strict=True):
                bar.update(count)
        manifest = Manifest.of(self.plan, self._record, companions=companions(self.plan))
        manifest.save(self.folder, self.plan)
        self._manifest = manifest
