"""The run under Lightning: its trainer, its checkpoints, and how a signal ends it."""

import logging
import signal
import threading
import warnings
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from saepipe import provenance
from saepipe.checkpoints import AtomicCheckpointIO, Checkpoints, step_of
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.loggers import close, open_loggers
from saepipe.module import Batches, SAEModule
from saepipe.runs import Run
from saepipe.stream import Stream

log = logging.getLogger(__name__)


def fit(config: RunConfig, stream: Stream, module: SAEModule, run: Run, restored: Path | None) -> str:
    """Run Lightning's loop over the batches that are left.

    Args:
        config: The run.
        stream: Its batches.
        module: What is trained; ends in its final state.
        run: Folder for checkpoints and metrics.
        restored: Checkpoint to go on from; None begins anew.

    Returns:
        Name of the device.

    Raises:
        UserError: The accelerator is not there, or the loss is not finite.
        SystemExit: SIGTERM or Ctrl-C came; a checkpoint was saved between two steps.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its tips and device table say nothing of this run
    interrupted = _interrupt_between_steps()
    opened = open_loggers(config, start_step=step_of(restored) if restored else 0)
    failed = True
    try:
        trainer = pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=1,
            precision=config.trainer.precision,  # type: ignore[arg-type]  # TrainerConfig checks it
            max_epochs=1,
            logger=opened,
            plugins=[AtomicCheckpointIO()],
            callbacks=[Checkpoints(run.checkpoints, config.train.checkpoint_every_steps)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=r".*isinstance\(treespec, LeafSpec\)"
            )  # lightning 2.6, torch 2.13
            trainer.fit(module, Batches(stream, module, config.stream.batch_tokens), ckpt_path=restored)
        failed = False
    except MisconfigurationException as error:
        raise UserError(
            f"trainer.accelerator={config.trainer.accelerator} cannot be had on this machine "
            f"({str(error).splitlines()[0]}); try trainer.accelerator=auto"
        ) from error
    except SIGTERMException:  # Lightning's own exit code would be 0, as if the run had finished
        log.info("stopped at step %s; the same command goes on", f"{module.steps_done:,}")
        raise SystemExit(128 + (signal.SIGINT if interrupted else signal.SIGTERM)) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        close(opened, failed=failed)
    return provenance.device_name(trainer.strategy.root_device)


def _interrupt_between_steps() -> list[int]:
    """Let the first Ctrl-C end the run as SIGTERM does: between two steps, with a checkpoint. A second one is Python's.

    Returns:
        A list that holds the signal once it came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        return came  # only the main thread may set a handler

    def on_interrupt(number: int, _: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, on_interrupt)
    return came
