"""Checkpoints that survive a crash: durable, hashed, and the newest whole one is found again.

Lightning's own save goes through TMPDIR and is torn when that is another filesystem; here the file is written beside
its target and renamed, and a record with its size and hash follows. A checkpoint without a matching record is passed
over and the one before it is used.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saepipe import durable
from saepipe.errors import UserError

log = logging.getLogger(__name__)

KEPT = 2
"""Newest checkpoints that stay: the last one, and one to fall back on."""
_NAME = re.compile(r"step-(\d+)\.ckpt")


def step_of(path: Path) -> int:
    """Read a checkpoint's step from its name."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path} is not named like a checkpoint"
    return int(match[1])


def newest(folder: Path) -> Path | None:
    """Find the newest checkpoint whose record matches its bytes; None where there is none."""
    step = newest_common([folder])
    return None if step is None else _path(folder, step)


def newest_common(folders: Sequence[Path]) -> int | None:
    """Find the newest step of which every folder has a whole checkpoint; None where there is none."""
    steps = [{step_of(path) for path in _all_in(folder)} for folder in folders]
    for step in sorted(set.intersection(*steps), reverse=True):
        damaged = [_path(folder, step) for folder in folders if not _is_whole(_path(folder, step))]
        if not damaged:
            return step
        log.warning("%s is damaged or incomplete; going back to the checkpoint before it", damaged[0])
    return None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.ckpt"


def drop_later(folder: Path, step: int) -> None:
    """Delete the checkpoints beyond a step from which a run goes on, which it will come to again."""
    if later := [path for path in _all_in(folder) if step_of(path) > step]:
        log.warning(
            "%s: going on from step %s, not from step %s", folder.parent, f"{step:,}", f"{step_of(later[-1]):,}"
        )
    for path in later:
        _delete(path)


def save(states: Mapping[Path, dict[str, Any]], step: int) -> None:
    """Write a checkpoint into each of some folders, then delete what is older than the newest two.

    A crash in between leaves every folder a checkpoint of one same step.

    Args:
        states: Folder -> what to keep: tensors and plain values.
        step: Steps done.
    """
    for folder, state in states.items():
        path = _path(folder, step)
        try:
            durable.write(path, lambda file, state=state: torch.save(state, file))  # type: ignore[misc]
        except RuntimeError as error:
            raise _disk_error(error) or error from None
        durable.write_sealed(_record(path), {"bytes": path.stat().st_size, "xxh3": durable.xxh3(path)})
    for folder in states:
        for old in _all_in(folder)[:-KEPT]:
            _delete(old)


def load(folder: Path, step: int) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values, no code.

    Raises:
        UserError: It is not there, as on a machine that does not see the disk of the others.
    """
    path = _path(folder, step)
    if not path.exists():
        raise UserError(f"{path} is not there, but for the first rank; put run.dir on a disk that all machines share")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _delete(path: Path) -> None:
    _record(path).unlink(missing_ok=True)  # first, so that no record is left without its file
    path.unlink()


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


def _is_whole(path: Path) -> bool:
    try:
        record = durable.read_sealed(_record(path), cure="the checkpoint before it is used")
        return record == {"bytes": path.stat().st_size, "xxh3": durable.xxh3(path)}
    except (OSError, UserError):
        return False


def _disk_error(error: BaseException) -> OSError | None:
    """Find the full disk behind torch.save's own complaint about it."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link


def _all_in(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)), key=step_of)
