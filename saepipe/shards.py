"""Look after a store: `python -m saepipe.shards info|verify|repair STORE`.

`info` tells what a store holds and how far it is, and reads no shard. `verify` reads every byte and lists all that is
damaged or missing: exit code 0 where nothing is, 1 where something is. `repair` writes exactly that again, with the
language model that the store was made with, and finishes a store that is incomplete; any number may run at once.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import entry

if TYPE_CHECKING:
    from saepipe.inspection import Inspection


def info(folder: str | Path) -> dict[str, Any]:
    """Describe a store; see `saepipe.overview.overview`."""
    from saepipe.overview import overview

    return overview(Path(folder))


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every byte of a store.

    Args:
        folder: The store.

    Returns:
        dir, sound, faults (each with its path and what is wrong), unexpected (paths that belong to no store), rows and
        affected_rows (of all hooks; None where the plan is damaged), missing_shards (of an incomplete store).

    Raises:
        UserError: There is no store, or another version of saepipe wrote it.
    """
    from saepipe.inspection import inspect

    return _told(inspect(Path(folder)))


def repair(folder: str | Path, **options: Any) -> dict[str, Any]:
    """Write again what is damaged or missing; see `saepipe.repair.repair`."""
    from saepipe import repair as repairing

    return repairing.repair(Path(folder), **options)


def _told(found: "Inspection") -> dict[str, Any]:
    return {
        "dir": str(found.folder),
        "sound": not found.faults,
        "faults": [{"path": str(fault.path), "what": fault.what} for fault in found.faults],
        "unexpected": [str(path) for path in found.unexpected],
        "rows": found.rows,
        "affected_rows": found.affected_rows,
        "missing_shards": found.missing,
    }


def _verified(found: dict[str, Any]) -> str:
    """Word what `verify` found: a line for each fault, then the sum."""
    folder, rows = found["dir"], found["rows"]
    lines = [f"{fault['path']}: {fault['what']}" for fault in found["faults"]]
    lines += [f"{path}: belongs to no store (left alone)" for path in found["unexpected"]]
    if found["sound"]:
        return "\n".join([*lines, f"{folder} is sound and complete: all {rows:,} rows are as they were written"])
    n = len(found["faults"])
    affected = "nobody can tell how many" if rows is None else f"{found['affected_rows']:,} of {rows:,}"
    return "\n".join(
        [
            *lines,
            f"{folder} has {n} fault{'s' if n > 1 else ''}, and {affected} rows are affected; "
            f"`python -m saepipe.shards repair {folder}` writes them again, or says what it needs",
        ]
    )


def _repaired(done: dict[str, Any]) -> str:
    if not done["faults"]:
        return f"{done['dir']} is sound and complete: nothing to repair"
    return (
        f"{done['dir']} is sound and complete again (damaged shards deleted here: {done['deleted_shards']:,}; "
        f"tokens captured: {done['captured_tokens']:,}; {done['seconds']:.0f} s)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m saepipe.shards",
        description="Look after a store of activations.",
        epilog="Exit code: 0 where the store is sound, 1 where verify found faults, 2 for anything to put right first.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "info": "tell what a store holds and how far it is; reads no shard",
        "verify": "check every byte and list all that is damaged or missing",
        "repair": "write again what is damaged or missing, with the store's language model",
    }
    for name, what in helps.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_argument("store", metavar="STORE", type=Path, help="folder of the store (store.dir)")
        command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--model", metavar="PATH", help="where the language model is now; default: as in the plan")
    command.add_argument("--device", default="auto", help="as model.device: auto (default), cpu, cuda, cuda:1 or mps")
    command.add_argument("--n-devices", type=int, default=1, metavar="N", help="as model.n_devices: GPUs (default 1)")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, if you trust it"
    )
    return parser


def _run(arguments: dict[str, Any]) -> int:
    """Run a command, and return the exit code."""
    command, as_json, folder = arguments.pop("command"), arguments.pop("json"), arguments.pop("store")
    words: Callable[[dict[str, Any]], str]
    if command == "info":
        from saepipe.overview import table

        found, words = info(folder), table
    elif command == "verify":
        found, words = verify(folder), _verified
    else:
        found, words = repair(folder, **arguments), _repaired
    sys.stdout.write(f"{json.dumps(found, indent=1) if as_json else words(found)}\n")
    sys.stdout.flush()
    return int(command == "verify" and not found["sound"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool from the command line."""
    given = vars(_parser().parse_args(arguments))
    entry.prepare_process("stderr" if given["json"] else "stdout")
    with entry.polite_end():
        code = _run(given)
    sys.exit(code)


if __name__ == "__main__":
    main()
