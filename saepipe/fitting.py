"""The run under Lightning: its trainer, what is due every so many steps, and how a signal ends it."""

import logging
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy

from saepipe import progress, provenance
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.launched import Launch
from saepipe.module import Batches, SAEModule
from saepipe.rank_processes import losing_ranks
from saepipe.stream import Stream

log = logging.getLogger(__name__)


def fit(
    config: RunConfig,
    streams: Sequence[Stream],
    module: SAEModule,
    callbacks: Sequence[pl.Callback],
    launch: Launch,
) -> str:
    """Run Lightning's loop over the batches that are left.

    Args:
        config: The run; its trainer group is read.
        streams: Where the batches come from.
        module: What is trained; ends in its final state.
        callbacks: What is due every so many steps.
        launch: Which rank this process is.

    Returns:
        Name of the device.

    Raises:
        UserError: The accelerator is not there, a loss is not finite, or another rank died.
        SystemExit: A signal came; a checkpoint was saved between two steps.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its tips and device table say nothing of this run
    try:
        with warnings.catch_warnings(), module.watch.listening(), losing_ranks(launch.ranks):
            warnings.filterwarnings(
                "ignore", message=r".*isinstance\(treespec, LeafSpec\)"
            )  # lightning 2.6, torch 2.13
            warnings.filterwarnings("ignore", message="The `srun` command is available")  # ours is a choice
            trainer = _trainer(config, callbacks, launch)
            # Lightning's own handlers would broadcast from inside of a handler, which hangs where ranks are elsewhere.
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            tokens = config.stream.batch_tokens
            with progress.bar("train", module.total_steps * tokens, module.steps_done * tokens) as module.bar:
                trainer.fit(module, Batches(streams, module))
    except MisconfigurationException as error:
        raise UserError(
            f"trainer.accelerator={config.trainer.accelerator} with {launch.local_world_size} ranks on this machine "
            f"cannot be had ({str(error).splitlines()[0]}); try trainer.accelerator=auto, or as many ranks "
            "(trainer.devices) as there are devices"
        ) from error
    except SystemExit as stop:  # Lightning's answer to the second Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if module.stopped:
        log.info("stopped at step %s; the same command goes on", f"{module.steps_done:,}")
        raise SystemExit(128 + module.stopped)
    return provenance.device_name(trainer.strategy.root_device)


def _trainer(config: RunConfig, callbacks: Sequence[pl.Callback], launch: Launch) -> pl.Trainer:
    """Make a trainer that leaves logs, checkpoints and the batches' distribution to saepipe."""
    # Each rank may see a GPU of its own alone, as under `srun --gpus-per-task=1`.
    own_device = config.trainer.accelerator not in ("cpu", "mps") and torch.cuda.device_count() == 1
    environment = _Environment(launch, own_device=own_device)
    alone = launch == Launch.alone()
    return pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1 if own_device else launch.local_world_size,
        strategy="auto" if alone else _Joined(cluster_environment=environment),
        plugins=[environment] if alone else None,
        precision=config.trainer.precision,  # type: ignore[arg-type]  # TrainerConfig checks it
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


class _Joined(DDPStrategy):
    """Lightning's DDP, but for the wrapping: each point has its own, since each has a backward pass of its own."""

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def setup_distributed(self) -> None:
        """Keep the process group (`Launch.join`) and the ranks that there are."""

    def set_world_ranks(self) -> None:
        """Keep the ranks that `_Environment` knows, whatever number of devices this one sees."""


class _Environment(LightningEnvironment):
    """What Lightning asks of whoever started the ranks."""

    def __init__(self, launch: Launch, *, own_device: bool) -> None:
        super().__init__()
        self.launch, self.own_device = launch, own_device
        self.set_global_rank(launch.ranks.rank)
        self.set_world_size(launch.ranks.world_size)

    @property
    def creates_processes_externally(self) -> bool:
        """So Lightning starts none."""
        return True

    def local_rank(self) -> int:
        """Which of the devices that it sees is this rank's."""
        return 0 if self.own_device else self.launch.local_rank

    def node_rank(self) -> int:
        """Which machine this rank is on."""
        return self.launch.ranks.rank // self.launch.local_world_size

    def teardown(self) -> None:
        """Leave the environment as it is: another point of a sweep may come."""
