"""The plan of a store: everything that decides its bytes, in a sealed file whose hash is the store's identity.

A shard is a pure function of the plan and its number: whoever writes it, in whatever order, after whatever crash, on
the same kind of device, writes the same bytes. Where rows lie is `saepipe.layout`.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saepipe.config import STORE_DTYPES, StoreConfig
from saepipe.durable import disk_errors, fits, is_temporary, read_sealed, seal, write_sealed
from saepipe.errors import UserError
from saepipe.layout import Layout, choose_block_rows
from saepipe.lock import LOCK
from saepipe.token_store import TokenStore

FORMAT = 2
HELD_OUT_ROWS = 65_536
"""Most held-out rows that are stored, in whole contexts."""
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


@dataclass(frozen=True, kw_only=True)
class Plan(Layout):
    """What decides the bytes of a store; see `make`."""

    model: dict[str, Any]
    """What identifies the language model, under the names of the `model` group."""
    capture: str
    """Code path that captures the activations: `huggingface` or `bridge`."""
    device_kind: str
    """Kind of device that computes them: `cpu`, `cuda` or `mps`."""
    threads: int
    """PyTorch's threads, which show in the last bits of what a CPU computes; 0 where another device does."""
    batch_prompts: int
    """Contexts per forward pass; a batch's size shows in the last bits of its activations."""
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
        threads: int,
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
            threads: PyTorch's threads where that is the CPU, else 0.
            data: Where the text came from: JSON values under the names of the `data` group.
        """
        most = max(1, HELD_OUT_ROWS // tokens.context_size)
        contexts = max(1, store.shuffle_tokens // tokens.context_size)
        return cls(
            token_store=tokens.hash,
            contexts=len(tokens.train),
            held_out_contexts=min(len(tokens.heldout), most),
            context_size=tokens.context_size,
            model=json.loads(json.dumps(model)),  # a tuple would differ from the list that the file gives back
            hooks=dict(sorted(hooks.items())),
            capture=capture,
            device_kind=device_kind,
            threads=threads,
            dtype=store.dtype,
            tokens=store.tokens,
            shard_tokens=store.shard_tokens,
            shuffle_tokens=store.shuffle_tokens,
            block_rows={
                hook: choose_block_rows(width, store.dtype, tokens=store.tokens, contexts=contexts)
                for hook, width in sorted(hooks.items())
            },
            batch_prompts=store.batch_prompts,
            seed=store.seed,
            data=json.loads(json.dumps(data)),
        )

    # ---- the file

    @classmethod
    def found(cls, folder: Path) -> "Plan | None":
        """Read the plan of the store in a folder where one is to be made; None where there is none yet.

        Call it before anything is written there, the lock too: tokens without a plan are an unfinished store's only
        beside its lock.

        Raises:
            UserError: The folder is a file, cannot be read, or holds something else.
        """
        with disk_errors("store.dir", folder):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"store.dir={folder} is a file; choose another store.dir")
            paths = folder.iterdir() if folder.is_dir() else ()
            names = {path.name for path in paths if not is_temporary(path)}
        if "plan.json" in names:
            return cls.load(folder)
        if strange := names - ({LOCK, "tokens"} if LOCK in names else set()):
            raise UserError(
                f"store.dir={folder} is not empty and holds no store (it has {min(strange)}); choose another store.dir"
            )
        return None

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
            if (folder / "tokens").is_dir():
                raise UserError(
                    f"store.dir={folder} has no plan yet: its text is being tokenised, or that was stopped; run the "
                    "same `python -m saepipe.cache` command again to go on"
                ) from None
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
            and document["dtype"] in STORE_DTYPES
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
            # block_rows follows from the others, and a store keeps the number of threads that it was begun with
            if field.name not in ("model", "data", "threads", "block_rows", *_SETTINGS):
                name = _NAMES.get(field.name, field.name)
                here[name], there[name] = getattr(wanted, field.name), getattr(self, field.name)
        for key in {**there, **here}:
            theirs, ours = there.get(key, "not set"), here.get(key, "not set")
            if theirs != ours:
                raise UserError(
                    f"store.dir={folder} belongs to another plan: {key} is {theirs} there and {ours} here; give the "
                    "same, or choose another store.dir"
                )
