"""Repairing a store: what is damaged goes, and the language model of the plan writes it again."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from saepipe.capturing import Group, claim_name, fill
from saepipe.claims import CLAIMS, Claims
from saepipe.config import ModelConfig
from saepipe.durable import disk_errors, remove_stale
from saepipe.errors import UserError, explained_memory
from saepipe.inspection import Inspection, Where, examine, inspect
from saepipe.language_model import LanguageModel
from saepipe.layout import place
from saepipe.lock import hold
from saepipe.manifest import Manifest
from saepipe.plan import Plan
from saepipe.store import Store
from saepipe.workers import Worker

log = logging.getLogger(__name__)

_WAIT_S = 0.5


def repair(
    folder: Path, *, model: str | None = None, device: str = "auto", n_devices: int = 1, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Inspect a store, delete what is damaged, write it again, and finish the store.

    It may run many times at once, beside cache commands too: all work on one store.

    Args:
        folder: The store.
        model: Where the language model is now; None is where the plan says.
        device: As `model.device`; `auto` is the CPU for a store that was made on one.
        n_devices: As `model.n_devices`.
        trust_remote_code: As `model.trust_remote_code`.

    Returns:
        dir, faults (how many there were), deleted_shards and captured_tokens (by this process), seconds.

    Raises:
        UserError: No store, a damaged plan or damaged tokens, or another language model than the plan's: nothing was
            deleted then. Later: no space on the disk, or out of memory.
    """
    start = time.perf_counter()
    found = inspect(folder)
    result = {"dir": str(folder), "faults": len(found.faults), "deleted_shards": 0, "captured_tokens": 0}
    for fault in found.faults:
        log.info("%s: %s", fault.path, fault.what)
    plan = _repairable(found)
    if found.faults:
        # What needs no model is not made to wait for one
        reader = None
        if found.damaged or found.missing:
            reader = _model(plan, folder, model, device, n_devices, trust_remote_code)
        with hold(folder, key="store.dir", wait=True), disk_errors("store.dir", folder):
            result["deleted_shards"] = _delete(found, plan)
        result["captured_tokens"] = _finish(folder, plan, reader)
    return {**result, "seconds": time.perf_counter() - start}


def _repairable(found: Inspection) -> Plan:
    """Refuse faults that no language model can mend."""
    if found.plan is None:
        raise UserError(
            f"{found.folder / 'plan.json'} is damaged, and nothing else says what the store holds; put this file back "
            "as it was, or make the store again in another store.dir"
        )
    tokens = found.folder / "tokens"
    for fault in found.faults:
        if fault.path.is_symlink() and fault.where is None and fault.path.name != "manifest.json":
            raise UserError(f"{fault.path} {fault.what}; put there what it leads to, then repair again")
        if tokens in (fault.path, *fault.path.parents):
            raise UserError(
                f"{fault.path} {fault.what}; delete {tokens} and run the same `python -m saepipe.cache` command again, "
                "which writes the tokens anew, then repair the shards"
            )
    return found.plan


# ---- the language model


def _model(
    plan: Plan, folder: Path, name: str | None, device: str, n_devices: int, trust_remote_code: bool
) -> LanguageModel:
    """Open the language model of a plan, with its weights, and make sure that it is the same one."""
    wanted = plan.model
    config = ModelConfig(
        name=name or str(wanted.get("name", "")),
        hooks=sorted(plan.hooks),
        dtype=str(wanted.get("dtype", "float32")),
        device="cpu" if device == "auto" and plan.device_kind == "cpu" else device,
        n_devices=n_devices,
        revision=None if name else wanted.get("revision"),
        compatibility_mode=bool(wanted.get("compatibility_mode", False)),
        trust_remote_code=trust_remote_code,
    )
    model = LanguageModel.open(config, local_rank=Worker.here(os.environ).local_rank)
    if model.device.type != plan.device_kind:
        raise UserError(
            f"{folder} was computed on {plan.device_kind}, and --device={device} is {model.device.type} here, which "
            f"gives other bytes; repair it on a machine with {plan.device_kind}"
        )
    moved = ("name",) if name and wanted.get("weights") else ()
    there, here = wanted | {"capture": plan.capture}, model.identity | {"capture": model.capture_path}
    for key in {**there, **here}:
        if key not in moved and there.get(key) != here.get(key):
            raise UserError(
                f"model.name={config.name} is not the language model that {folder} was made with: {key} is "
                f"{there.get(key)} there and {here.get(key)} here; put that model back, or say with --model where it is"
            )
    with _memory(model, n_devices):
        ids = torch.zeros(1, plan.context_size, dtype=torch.int64)
        seen = model.capture(ids, sorted(plan.hooks))  # loads the weights: later is too late to find them missing
    if (widths := {hook: rows.shape[-1] for hook, rows in seen.items()}) != plan.hooks:
        raise UserError(
            f"model.name={config.name} is not the language model that {folder} was made with: its hooks are "
            f"{plan.hooks} wide there and {widths} here; put that model back, or say with --model where it is"
        )
    return model


@contextmanager
def _memory(model: LanguageModel, n_devices: int) -> Iterator[None]:
    gpus = explained_memory("repairing", **{"--n-devices": str(n_devices + 1)})
    with gpus if model.device.type == "cuda" else nullcontext():
        yield


# ---- the store


def _delete(found: Inspection, plan: Plan) -> int:
    """Delete what is still damaged, the manifest first, and return how many shards that were.

    Since it was found, another process may have written it again. A group is claimed while its shards are looked at, so
    that what another process is just writing is not taken for damage.
    """
    folder, deleted = found.folder, 0
    remove_stale(folder)
    try:
        manifest = Manifest.load(folder, plan)
    except (UserError, FileNotFoundError):
        manifest = None
    if any(fault.path == folder / "manifest.json" for fault in found.faults):
        (folder / "manifest.json").unlink(missing_ok=True)
    with Claims(folder / CLAIMS) as claims:
        for group, shards in _groups(found.damaged, plan).items():
            while not claims.take(claim_name(group)):
                time.sleep(_WAIT_S)
            for where in shards:
                paths = [folder / f"{place(*where)}.{ending}" for ending in ("json", "safetensors")]
                linked = any(path.is_symlink() for path in paths)
                if linked or isinstance(examine(folder, plan, manifest, where), list):
                    (folder / "manifest.json").unlink(missing_ok=True)  # absent is incomplete: everything is verified
                    for path in paths:
                        path.unlink(missing_ok=True)
                    deleted += 1
            claims.release(claim_name(group))
    return deleted


def _groups(shards: list[Where], plan: Plan) -> dict[Group, list[Where]]:
    groups: dict[Group, list[Where]] = {}
    for where in shards:
        groups.setdefault(None if where[2] else plan.shard_group(where[1]), []).append(where)
    return groups


def _finish(folder: Path, plan: Plan, model: LanguageModel | None) -> int:
    """Write what is missing and finalise; returns the tokens that this process captured."""
    captured = 0
    while True:
        if model is not None:
            with _memory(model, model.config.n_devices):
                captured += fill(Store.open(folder, complete=False), model, Worker.here(os.environ))
        with hold(folder, key="store.dir", wait=True):
            # Another repair may have deleted more since, and what this process remembers of the records is old
            store = Store.open(folder, complete=False)
            if model is not None and store.missing_groups():
                continue
            if not store.complete:
                store.finalise()
            shutil.rmtree(folder / CLAIMS, ignore_errors=True)  # of processes that were killed
            return captured
