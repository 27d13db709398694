"""Checkpoints that survive a crash: durable, hashed, and the newest whole one is found again.

Lightning's own save goes through TMPDIR and is torn when that is another filesystem; here the file is written beside
its target and renamed, and a record with its size and hash follows. A checkpoint without a matching record is passed
over and the one before it is used.
"""

import logging
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from saepipe import durable
from saepipe.errors import UserError
from saepipe.module import SAEModule

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
    for path in reversed(_all_in(folder)):
        if _is_whole(path):
            return path
        log.warning("%s is damaged or incomplete; going back to the checkpoint before it", path)
    return None


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


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to the disk, made durable."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint, then the record that vouches for it."""
        target = Path(path)
        try:
            durable.write(target, lambda file: torch.save(checkpoint, file))
        except RuntimeError as error:
            raise _disk_error(error) or error from None
        durable.write_sealed(_record(target), {"bytes": target.stat().st_size, "xxh3": durable.xxh3(target)})

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; only tensors and plain values, no code."""
        return torch.load(Path(path), map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint, its record first, so that no record is left without its file."""
        _record(Path(path)).unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)


class Checkpoints(pl.Callback):
    """Saves every so many steps and at the end, counted by the module; keeps the newest two.

    Args:
        folder: Where they go.
        every_steps: Steps between two.
    """

    def __init__(self, folder: Path, every_steps: int) -> None:
        self._folder = folder
        self._every_steps = every_steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save where the step is due."""
        assert isinstance(pl_module, SAEModule)
        if pl_module.steps_done % self._every_steps and pl_module.steps_done != pl_module.total_steps:
            return
        self._save(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save when a SIGTERM ends the run, which Lightning lets it do between two steps only."""
        if isinstance(exception, SIGTERMException):
            assert isinstance(pl_module, SAEModule)
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: SAEModule) -> None:
        pl_module.refuse_non_finite()
        trainer.save_checkpoint(self._folder / f"step-{pl_module.steps_done:09d}.ckpt")
        for old in _all_in(self._folder)[:-KEPT]:
            trainer.strategy.remove_checkpoint(old)
