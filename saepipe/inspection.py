"""Inspecting a store: every byte of every file, and all that is wrong with it, not only the first fault."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saepipe import progress, token_store
from saepipe.claims import CLAIMS
from saepipe.durable import is_temporary, read_sealed
from saepipe.errors import DamageError, UserError
from saepipe.layout import place
from saepipe.lock import LOCK
from saepipe.manifest import Manifest, Sums, load_record
from saepipe.parallel import concurrently
from saepipe.plan import Plan
from saepipe.record import Record
from saepipe.shard import check_size, verify

Where = tuple[str, int, bool]
"""A shard: its hook, its number, and whether it is held out."""


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a store."""

    path: Path
    """The file (or folder) that is not as it should be."""
    what: str
    """What is wrong with it, as the rest of a sentence that begins with its path."""
    where: Where | None = None
    """The shard that is lost with it."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    folder: Path
    plan: Plan | None
    """The store's plan; None where it is damaged, and then only the tokens could be looked at beside it."""
    faults: list[Fault]
    """All that is wrong."""
    unexpected: list[Path]
    """What is there and belongs to no store: no fault, but maybe not meant."""
    missing: int
    """Shards that an incomplete store still lacks; in a complete one, each of them is a fault."""

    @property
    def damaged(self) -> list[Where]:
        """The shards that have to be written again."""
        return list(dict.fromkeys(fault.where for fault in self.faults if fault.where is not None))

    @property
    def rows(self) -> int | None:
        """Rows of all hooks, training and held-out; None where the plan is damaged."""
        return None if self.plan is None else len(self.plan.hooks) * (self.plan.tokens + self.plan.held_out_rows)

    @property
    def affected_rows(self) -> int | None:
        """How many of these are in damaged shards: all where the tokens are damaged, since nothing says whose they are.

        None where the plan is damaged.
        """
        if self.plan is None:
            return None
        tokens = self.folder / "tokens"
        if any(tokens in (fault.path, *fault.path.parents) for fault in self.faults):
            return self.rows
        return sum(self.plan.shard_rows(shard, held_out=held_out) for _, shard, held_out in self.damaged)


def inspect(folder: Path) -> Inspection:
    """Check every file of a store against the plan, the records and the manifest, reading all bytes in some threads.

    Nothing is written. Where others work on the store meanwhile, what they are just writing may be told as a fault.

    Raises:
        UserError: There is no store, or another version of saepipe wrote it.
    """
    plan = _plan(folder)
    faults = []
    if plan is None:
        faults.append(Fault(folder / "plan.json", "is damaged (its content does not match its own hash)"))
    faults += _token_faults(folder / "tokens", plan)
    if plan is None:
        return Inspection(folder, None, faults, [], 0)
    begun = not (folder / "manifest.json").exists()
    manifest = None
    try:
        manifest = Manifest.load(folder, plan)
    except FileNotFoundError:
        pass
    except DamageError as error:
        faults.append(Fault(error.path, error.what))
    unexpected = []
    for path, fault in _walk(folder, plan):
        if fault is None:
            unexpected.append(path)
        else:
            faults.append(fault)
    missing = [where for where in plan.places() if begun and not (folder / f"{place(*where)}.json").exists()]
    faults += _shard_faults(folder, plan, manifest, set(missing))
    if begun:
        n = len(list(plan.places()))
        what = f"is missing: the store is incomplete ({n - len(missing):,} of {n:,} shards are written)"
        faults.append(Fault(folder / "manifest.json", what))
    return Inspection(folder, plan, faults, unexpected, len(missing))


def examine(folder: Path, plan: Plan, manifest: Manifest | None, where: Where) -> Record | list[Fault]:
    """Check one shard, and return its record, or all that is wrong."""
    try:
        record = load_record(folder, plan, manifest, where)
    except DamageError as error:
        faults = [Fault(error.path, error.what, where)]
        try:
            check_size(folder, place(*where), plan.shard_bytes(where[0], where[1], held_out=where[2]))
        except DamageError as other:
            faults.append(Fault(other.path, other.what, where))
        return faults
    try:
        verify(folder, record)
    except DamageError as error:
        return [Fault(error.path, error.what, where)]
    return record


def _plan(folder: Path) -> Plan | None:
    """Read the plan; None where it is damaged."""
    try:
        with os.scandir(folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be read as a folder ({error.strerror}); give the folder of a store") from None
    try:
        read_sealed(folder / "plan.json", cure="")
    except FileNotFoundError:
        pass  # which loading words
    except DamageError:
        return None
    return Plan.load(folder)


def _token_faults(folder: Path, plan: Plan | None) -> Iterator[Fault]:
    for error in token_store.faults(folder, None if plan is None else plan.token_store):
        if isinstance(error, DamageError):
            yield Fault(error.path, error.what)
        else:
            yield Fault(folder / "plan.json", "is missing or of another version")


def _shard_faults(folder: Path, plan: Plan, manifest: Manifest | None, missing: set[Where]) -> Iterator[Fault]:
    """Check all shards, and the manifest's statistics where the records that they are made of are sound."""
    places = [where for where in plan.places() if where not in missing]
    rows = [plan.shard_rows(shard, held_out=held_out) for _, shard, held_out in places]
    sums = {hook: Sums() for hook in plan.hooks}
    work = concurrently(lambda where: examine(folder, plan, manifest, where), places)
    with progress.bar("verify", sum(rows)) as bar, closing(work):
        for (hook, _, held_out), count, found in zip(places, rows, work, strict=True):
            bar.update(count)
            if isinstance(found, list):
                yield from found
                sums.pop(hook, None)
            elif hook in sums and not held_out:
                sums[hook].add(found)
    if manifest is not None:
        for hook, total in sums.items():
            if not _agree(manifest.hooks[hook]["statistics"], total.statistics(hook)):
                yield Fault(folder / "manifest.json", f"has statistics of {hook} that are not those of its shards")


def _agree(told: dict[str, object], found: dict[str, object]) -> bool:
    """Compare statistics: another machine may add in another order."""
    scale = 1e-9 * abs(float(str(found["mean_norm"])))
    return told["rows"] == found["rows"] and all(
        np.allclose(np.asarray(told[key]), np.asarray(found[key]), rtol=1e-6, atol=1e3 * scale)
        for key in ("mean_norm", "mean", "spread")
    )


def _walk(folder: Path, plan: Plan) -> Iterator[tuple[Path, Fault | None]]:
    """Go through what is in the store's folders: links that lead out of it, and what does not belong there (None)."""
    known: dict[str, Where | None] = {"plan.json": None, "manifest.json": None, LOCK: None, "tokens/plan.json": None}
    known |= {f"tokens/{side}.{name}": None for side in token_store.SIDES for name in token_store.CHAT_ARRAYS}
    for where in plan.places():
        known |= {f"{place(*where)}.{ending}": where for ending in ("safetensors", "json")}
    folders = {*plan.folders, CLAIMS, "tokens/partial"}
    skipped = {CLAIMS, "tokens/partial"}
    inside = folder.resolve()
    waiting = [""]
    while waiting:
        base = waiting.pop()
        for path in sorted((folder / base).iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() and name in folders:
                yield path, Fault(path, "is a link, which no store follows")
            elif path.is_symlink() and name in known and not path.resolve().is_relative_to(inside):
                yield path, Fault(path, "is a link that leads out of the store", known[name])
            elif path.is_dir() and not path.is_symlink() and name in folders:
                waiting += [name] if name not in skipped else []
            elif name not in known and not is_temporary(path):
                yield path, None
