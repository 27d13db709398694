"""The plan of a store: everything that decides its bytes, and from it where each row of each shard comes from.

Work is owned by shuffle group. A keyed permutation of all training contexts picks the contexts of each group; a keyed
permutation of the group's rows says in which order they lie in its shards. So a shard is a pure function of the plan
and its number, whoever writes it, in whatever order, after whatever crash, and neighbours on disk share no context.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from saepipe.config import StoreConfig
from saepipe.durable import disk_errors, fits, read_sealed, seal, write_sealed
from saepipe.errors import UserError
from saepipe.permutation import Permutation, derive_key
from saepipe.token_store import TokenStore

FORMAT = 1
HEADER_BYTES = 4096
"""Size of a shard's header: one page, so that blocks of whole pages stay aligned."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HELD_OUT_ROWS = 65_536
"""Most held-out rows that are stored, in whole contexts."""
_BLOCK_BYTES = 1 << 20
_BLOCKS = 4096
_LEAST_BLOCK_ROWS = 16
_HOOK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_RESERVED = ("tokens", "heldout", "plan.json", "manifest.json")
_CURE = "choose another store.dir, or put this file back as it was"
# Fields that are keys of the `store` group
_SETTINGS = ("tokens", "dtype", "shard_tokens", "shuffle_tokens", "batch_prompts", "seed")
# What an error calls other fields
_NAMES = {
    "token_store": "data (hash of the text's tokens)",
    "hooks": "model (widths)",
    "device_kind": "model.device (kind)",
    "capture": "capture (path)",
    "context_size": "data.context_size",
}


@dataclass(frozen=True)
class Plan:
    """What decides the bytes of a store; see `make`."""

    token_store: str
    """Hash of the token store."""
    contexts: int
    """Training contexts in the token store."""
    held_out_contexts: int
    """Held-out contexts whose activations are stored: the first ones of the token store."""
    context_size: int
    """Tokens per context."""
    model: dict[str, Any]
    """What identifies the language model, under the names of the `model` group."""
    hooks: dict[str, int]
    """Width of each hook point."""
    capture: str
    """Code path that captures the activations: `huggingface` or `bridge`."""
    device_kind: str
    """Kind of device that computes them: `cpu`, `cuda` or `mps`."""
    dtype: str
    """Type on disk."""
    tokens: int
    """Training rows per hook."""
    shard_tokens: int
    """Rows per shard; the last shard of a group may hold fewer."""
    shuffle_tokens: int
    """Rows that are shuffled together, before rounding to whole contexts."""
    block_rows: dict[str, int]
    """Rows per block (the unit of reading and hashing) of each hook."""
    batch_prompts: int
    """Contexts per forward pass; a batch's size shows in the last bits of its activations."""
    seed: int
    """Seed of the shuffle."""
    data: dict[str, Any]
    """Where the text came from, under the names of the `data` group."""
    format: int = FORMAT
    """Version of the store's layout."""

    def __post_init__(self) -> None:
        """Check what would lead outside the store's folder or has no rows."""
        for hook in self.hooks:
            if not _HOOK.fullmatch(hook) or ".." in hook or hook in _RESERVED or hook.endswith("."):
                raise UserError(
                    f"model.hooks: {hook!r} cannot name a folder of the store; give a hook name of letters, digits, "
                    "'_', '-' and single dots"
                )
        if self.tokens > self.contexts * self.context_size:
            raise UserError(
                f"store.tokens={self.tokens} is more than the {self.contexts * self.context_size} training tokens of "
                "the data; lower it, or give more text in data.path"
            )

    @classmethod
    def make(
        cls,
        tokens: TokenStore,
        store: StoreConfig,
        *,
        model: dict[str, Any],
        hooks: dict[str, int],
        capture: str,
        device_kind: str,
        data: dict[str, Any],
    ) -> "Plan":
        """Plan a store.

        Args:
            tokens: The token store.
            store: Size, type and shuffle.
            model: What identifies the language model: JSON values under the names of the `model` group.
            hooks: Width of each hook point.
            capture: Code path that captures the activations.
            device_kind: Type of the torch device.
            data: Where the text came from: JSON values under the names of the `data` group.
        """
        most = max(1, HELD_OUT_ROWS // tokens.context_size)
        return cls(
            token_store=tokens.hash,
            contexts=len(tokens.train),
            held_out_contexts=min(len(tokens.heldout), most),
            context_size=tokens.context_size,
            model=json.loads(json.dumps(model)),  # a tuple would differ from the list that the file gives back
            hooks=dict(sorted(hooks.items())),
            capture=capture,
            device_kind=device_kind,
            dtype=store.dtype,
            tokens=store.tokens,
            shard_tokens=store.shard_tokens,
            shuffle_tokens=store.shuffle_tokens,
            block_rows={hook: _block_rows(store, width) for hook, width in sorted(hooks.items())},
            batch_prompts=store.batch_prompts,
            seed=store.seed,
            data=json.loads(json.dumps(data)),
        )

    # ---- the file

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read plan.json.

        Raises:
            UserError: There is none, it is damaged, or another version of saepipe wrote it.
        """
        path = folder / "plan.json"
        try:
            document = read_sealed(path, cure=_CURE)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"there is no store in store.dir={folder}; make one with `python -m saepipe.cache store.dir={folder}`"
            ) from None
        if document.get("format") != FORMAT or document.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise UserError(
                f"store.dir={folder} was written by another version of saepipe (format {document.get('format')}, and "
                f"this one reads {FORMAT}); use that version, or another store.dir"
            )
        sizes = ("contexts", "context_size", "tokens", "shard_tokens", "shuffle_tokens", "batch_prompts")
        sound = (
            fits(document, {field.name: field.type for field in dataclasses.fields(cls)})
            and document["dtype"] in ITEM_BYTES
            and document["hooks"].keys() == document["block_rows"].keys()
            and min(*(document[key] for key in sizes), *document["hooks"].values(), *document["block_rows"].values())
            > 0
        )
        if not sound:
            raise UserError(f"{path} does not describe a store; {_CURE}")
        return cls(**document)

    def save(self, folder: Path) -> None:
        """Write plan.json."""
        with disk_errors("store.dir", folder):
            write_sealed(folder / "plan.json", dataclasses.asdict(self))

    @cached_property
    def identity(self) -> str:
        """Identity of the store: the sha256 of the plan's canonical JSON."""
        return seal(dataclasses.asdict(self))

    def settings(self) -> dict[str, Any]:
        """Return what the plan fixes under the names of the configuration, such as `model.name` and `store.dtype`."""
        return {
            **{f"model.{key}": value for key, value in sorted(self.model.items())},
            "model.hooks": sorted(self.hooks),
            **{f"data.{key}": value for key, value in sorted(self.data.items())},
            **{f"store.{key}": getattr(self, key) for key in _SETTINGS},
        }

    def check(self, wanted: "Plan", *, folder: Path) -> None:
        """Compare the plan of the store in `folder` (this one) with the one that a run wants.

        Raises:
            UserError: Names the first key that differs and both values.
        """
        here, there = wanted.settings(), self.settings()
        for field in dataclasses.fields(self):
            if field.name not in ("model", "data", *_SETTINGS):
                name = _NAMES.get(field.name, field.name)
                here[name], there[name] = getattr(wanted, field.name), getattr(self, field.name)
        for key in {**there, **here}:
            theirs, ours = there.get(key, "not set"), here.get(key, "not set")
            if theirs != ours:
                raise UserError(
                    f"store.dir={folder} belongs to another plan: {key} is {theirs} there and {ours} here; give the "
                    "same, or choose another store.dir"
                )

    # ---- shards and groups

    @property
    def group_size(self) -> int:
        """Contexts in a whole shuffle group."""
        return max(1, self.shuffle_tokens // self.context_size)

    @property
    def n_groups(self) -> int:
        """Number of shuffle groups."""
        return math.ceil(math.ceil(self.tokens / self.context_size) / self.group_size)

    @property
    def _shards_per_group(self) -> int:
        return math.ceil(self.group_size * self.context_size / self.shard_tokens)

    def group_rows(self, group: int) -> int:
        """Return how many rows a group has; the last one may be smaller."""
        whole = self.group_size * self.context_size
        return min(whole, self.tokens - group * whole)

    def group_shards(self, group: int) -> range:
        """Return the numbers of a group's shards."""
        first = group * self._shards_per_group
        return range(first, first + math.ceil(self.group_rows(group) / self.shard_tokens))

    def shard_group(self, shard: int) -> int:
        """Return the group that a shard belongs to."""
        return shard // self._shards_per_group

    @property
    def n_shards(self) -> int:
        """Number of training shards of one hook."""
        return self.group_shards(self.n_groups - 1).stop

    @property
    def n_held_out_shards(self) -> int:
        """Number of held-out shards of one hook."""
        return math.ceil(self.held_out_rows / self.shard_tokens)

    @property
    def held_out_rows(self) -> int:
        """Held-out rows per hook."""
        return self.held_out_contexts * self.context_size

    def shard_rows(self, shard: int, *, held_out: bool = False) -> int:
        """Return how many rows a shard has."""
        if held_out:
            return min(self.shard_tokens, self.held_out_rows - shard * self.shard_tokens)
        group, index = divmod(shard, self._shards_per_group)
        return min(self.shard_tokens, self.group_rows(group) - index * self.shard_tokens)

    def shard_start(self, shard: int) -> int:
        """Return the number of the shard's first row among all training rows in natural order."""
        group, index = divmod(shard, self._shards_per_group)
        return group * self.group_size * self.context_size + index * self.shard_tokens

    def n_blocks(self, hook: str, shard: int, *, held_out: bool = False) -> int:
        """Return the number of blocks of a shard; the last one may be smaller."""
        return math.ceil(self.shard_rows(shard, held_out=held_out) / self.block_rows[hook])

    def shard_bytes(self, hook: str, shard: int, *, held_out: bool = False) -> int:
        """Return the size of a shard's file."""
        row = self.hooks[hook] * ITEM_BYTES[self.dtype] + 4  # and the float32 norm
        return HEADER_BYTES + self.shard_rows(shard, held_out=held_out) * row

    def places(self) -> Iterator[tuple[str, int, bool]]:
        """Go through every shard of the store, as hook, number, and whether it is held out."""
        for hook in sorted(self.hooks):
            for held_out, n in ((False, self.n_shards), (True, self.n_held_out_shards)):
                for shard in range(n):
                    yield hook, shard, held_out

    @property
    def total_bytes(self) -> int:
        """Size of all shard files of the store."""
        return sum(self.shard_bytes(hook, shard, held_out=held_out) for hook, shard, held_out in self.places())

    # ---- rows

    def group_contexts(self, group: int) -> Int64[np.ndarray, " context"]:
        """Return the training contexts of a group, in the order in which the language model reads them."""
        first = group * self.group_size
        return self._context_order(np.arange(first, first + self._n_contexts(group)))

    def group_targets(self, group: int) -> Int64[np.ndarray, "context seq"]:
        """Return where in its group each token of `group_contexts` is stored; -1 where it is not.

        Only the last group leaves tokens out: it ends with the row that completes `tokens`.
        """
        targets = np.full((self._n_contexts(group), self.context_size), -1)
        rows = np.arange(self.group_rows(group))
        targets.reshape(-1)[self._row_order(group)(rows)] = rows
        return targets

    def row_tokens(self, shard: int, start: int = 0, stop: int | None = None) -> Int64[np.ndarray, " token"]:
        """Return the training token that each row of a shard belongs to, as context * context_size + position.

        Args:
            shard: Number of the shard.
            start: First row of the shard to tell.
            stop: Row of the shard to end before; None is its end.
        """
        group, index = divmod(shard, self._shards_per_group)
        stop = self.shard_rows(shard) if stop is None else stop
        sources = self._row_order(group)(np.arange(start, stop) + index * self.shard_tokens)
        contexts, positions = np.divmod(sources, self.context_size)
        return self._context_order(contexts + group * self.group_size) * self.context_size + positions

    @cached_property
    def _context_order(self) -> Permutation:
        return Permutation(derive_key("contexts", self.token_store, self.seed), self.contexts)

    def _row_order(self, group: int) -> Permutation:
        n = self._n_contexts(group) * self.context_size
        return Permutation(derive_key("rows", self.token_store, self.seed, group), n)

    def _n_contexts(self, group: int) -> int:
        return math.ceil(self.group_rows(group) / self.context_size)


def _block_rows(store: StoreConfig, width: int) -> int:
    """Pick a hook's rows per block: a power of two, at most 1 MiB, and few enough that a small store has many blocks.

    Reading loses speed below 1 MiB (cold 1 MiB blocks read at 0.68 GB/s, 64 KiB blocks at 0.41); the stream's shuffle
    and its lanes want about 4096 blocks, which only a small store has trouble to give.
    """
    fitting = _power_of_two(_BLOCK_BYTES / (width * ITEM_BYTES[store.dtype]))
    wanted = max(_LEAST_BLOCK_ROWS, _power_of_two(store.tokens / _BLOCKS))
    return min(fitting, wanted)


def _power_of_two(value: float) -> int:
    """Return the largest power of two up to `value`, at least 1."""
    return 1 << max(0, math.floor(math.log2(value)))
