"""What a store says of itself, without reading a shard."""

from pathlib import Path
from typing import Any

from saepipe.claims import CLAIMS, owners
from saepipe.errors import DamageError
from saepipe.layout import place
from saepipe.manifest import Manifest
from saepipe.plan import Plan


def overview(folder: Path) -> dict[str, Any]:
    """Describe a store from its plan, its manifest and the sizes of its files.

    Returns:
        JSON values: dir, identity, state, complete, shards and shards_there (in full size, with a record), bytes and
        bytes_there, model, capture, device, data, context_size, dtype, rows and held_out_rows (per hook), shuffle,
        hooks (what each is and its statistics), workers (who has claims).

    Raises:
        UserError: There is no store, or its plan is damaged or of another version.
    """
    plan = Plan.load(folder)
    manifest, state = _manifest(folder, plan)
    places = list(plan.places())
    sizes = {where: plan.shard_bytes(where[0], where[1], held_out=where[2]) for where in places}
    there = [where for where in places if _is_there(folder / place(*where), sizes[where])]
    if manifest is not None and len(there) < len(places):
        state = f"damaged: {len(places) - len(there):,} of {len(places):,} shards are missing or cut"
    return {
        "dir": str(folder),
        "identity": plan.identity,
        "state": state,
        "complete": manifest is not None and len(there) == len(places),
        "shards": len(places),
        "shards_there": len(there),
        "bytes": plan.total_bytes,
        "bytes_there": sum(sizes[where] for where in there),
        "model": plan.model,
        "capture": plan.capture,
        "device": plan.device_kind,
        "data": plan.data,
        "context_size": plan.context_size,
        "dtype": plan.dtype,
        "rows": plan.tokens,
        "held_out_rows": plan.held_out_rows,
        "shuffle": {
            "shuffle_tokens": plan.shuffle_tokens,
            "shard_tokens": plan.shard_tokens,
            "companions": None if manifest is None else manifest.companions,
        },
        "hooks": {hook: _hook(plan, manifest, hook) for hook in sorted(plan.hooks)},
        "workers": owners(folder / CLAIMS),
    }


def _manifest(folder: Path, plan: Plan) -> tuple[Manifest | None, str]:
    """Read the manifest, and say how the store stands."""
    try:
        return Manifest.load(folder, plan), "complete"
    except FileNotFoundError:
        return None, "incomplete"
    except DamageError as error:
        return None, f"damaged: manifest.json {error.what}"


def _is_there(path: Path, size: int) -> bool:
    """Tell whether a shard has a record and its full size."""
    try:
        return path.with_name(f"{path.name}.safetensors").stat().st_size == size and (
            path.with_name(f"{path.name}.json").exists()
        )
    except OSError:
        return False


def _hook(plan: Plan, manifest: Manifest | None, hook: str) -> dict[str, Any]:
    known = {} if manifest is None else manifest.hooks[hook]["statistics"]
    return {
        "width": plan.hooks[hook],
        "dtype": plan.dtype,
        "rows": plan.tokens,
        "held_out_rows": plan.held_out_rows,
        "shards": plan.n_shards,
        "held_out_shards": plan.n_held_out_shards,
        "bytes": sum(
            plan.shard_bytes(hook, shard, held_out=held_out) for name, shard, held_out in plan.places() if name == hook
        ),
        "mean_norm": known.get("mean_norm"),
        "rows_counted": known.get("rows"),
    }


def table(found: dict[str, Any]) -> str:
    """Lay an overview out for a terminal."""
    shuffle, companions = found["shuffle"], found["shuffle"]["companions"]
    same = "" if companions is None else f"; a row meets {companions:.2f} of its own context where chance gives 1"
    facts = {
        "store": found["dir"],
        "identity": found["identity"],
        "state": f"{found['state']} ({found['shards_there']:,} of {found['shards']:,} shards, "
        f"{size(found['bytes_there'])} of {size(found['bytes'])})",
        "model": f"{_pairs(found['model'])}; captured by {found['capture']} on {found['device']}",
        "data": f"{_pairs(found['data'])}; contexts of {found['context_size']} tokens",
        "rows": f"{found['rows']:,} for training and {found['held_out_rows']:,} held out, per hook",
        "shuffle": f"{shuffle['shuffle_tokens']:,} rows together, in shards of {shuffle['shard_tokens']:,}{same}",
        "workers": ", ".join(
            f"process {who['process']} on {who['host']} (at {who['what']}, {who['touched_s']} s ago)"
            for who in found["workers"]
        )
        or "nobody",
    }
    columns = ["hook", "width", "dtype", "rows", "held out", "shards", "bytes", "mean norm", "rows counted"]
    lines = [columns, *(_line(hook, of) for hook, of in found["hooks"].items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    rows = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([*(f"{name:<10}{value}" for name, value in facts.items()), "", *rows])


def _line(hook: str, of: dict[str, Any]) -> list[str]:
    mean_norm = "-" if of["mean_norm"] is None else f"{of['mean_norm']:.4g}"
    counted = "-" if of["rows_counted"] is None else f"{of['rows_counted']:,}"
    shards = f"{of['shards']}+{of['held_out_shards']}"
    sizes = [f"{of['rows']:,}", f"{of['held_out_rows']:,}", shards, size(of["bytes"])]
    return [hook, str(of["width"]), of["dtype"], *sizes, mean_norm, counted]


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items() if value not in (None, False, ""))


def size(count: int) -> str:
    """Write a number of bytes for people."""
    for unit, value in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= value:
            return f"{count / value:.1f} {unit}"
    return f"{count} B"
