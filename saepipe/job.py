"""A training job, as each rank of it runs: the points that are left, from their checkpoints to their exports."""

import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from saepipe import checkpoints, entry, export, loggers, provenance, saes
from saepipe.callbacks import Checkpoints, Exports, Measurements
from saepipe.centre import centre
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.fitting import fit
from saepipe.heldout import measure
from saepipe.launched import Launch
from saepipe.module import SAEModule
from saepipe.point import Point
from saepipe.runs import Run
from saepipe.store import Store
from saepipe.stream import Stream

log = logging.getLogger(__name__)


@dataclass
class Job:
    """Points that train together.

    Args:
        configs: A run each; they differ in sae, optim, stream.hook and run alone.
        store: Their store.
        launch: Which rank this process is.
    """

    configs: Sequence[RunConfig]
    store: Store
    launch: Launch

    def __post_init__(self) -> None:
        """Open the streams, one for each hook."""
        self.config = self.configs[0]
        self.runs = [Run(config.run.dir) for config in self.configs]
        hooks = {config.stream.hook: config for config in self.configs}
        ranks = self.launch.ranks
        self.streams = [
            Stream(
                self.store,
                config.stream,
                exclude_special_tokens=config.data.exclude_special_tokens,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
            for config in hooks.values()
        ]
        self.stream_of = [list(hooks).index(config.stream.hook) for config in self.configs]
        self.total_steps = total_steps(self.config, ranks.world_size)

    def run(self) -> dict[int, str]:
        """Train from the newest checkpoint that all points have, export, and leave finished run folders.

        Returns:
            Numbers of the points that were not finite at some step -> what that was, and the cure.

        Raises:
            UserError: No point is left that is finite, or what else a user can put right.
            SystemExit: A signal came; a checkpoint was saved between two steps.
        """
        self.launch.join()
        ranks = self.launch.ranks
        begin = self._begin()
        states = [checkpoints.load(run.checkpoints, begin) for run in self.runs] if begin else []
        module = SAEModule(
            [self._build(at, states[at] if states else None) for at in range(len(self.configs))],
            self.stream_of,
            [str(run.folder) for run in self.runs],
            ranks,
            total_steps=self.total_steps,
            steps_done=begin,
            log_every_steps=self.config.train.log_every_steps,
        )
        if not begin and ranks.rank == 0:  # not before everything that may be refused was looked at
            for config, run in zip(self.configs, self.runs, strict=True):
                entry.save_config(config, run.config_file)
        module.last_metrics = [state["last_metrics"] for state in states] or module.last_metrics
        self._announce(module.trained[0], begin)
        began = time.perf_counter()
        with self._logging(module, begin):
            device = fit(self.config, self.streams, module, self._callbacks(), self.launch)
        seconds = time.perf_counter() - began
        if ranks.rank == 0:
            self._finish(module, begin, seconds, device)
        return module.failures

    def _build(self, at: int, state: dict[str, Any] | None = None) -> Point:
        """Make an SAE and the point that trains it, with its first weights or in the state of a checkpoint."""
        config, stream = self.configs[at], self.streams[self.stream_of[at]]
        target = stream.target_hook
        sae = saes.architecture(config.sae.architecture)(config.sae, stream.d_in, stream.d_out if target else None)
        if config.train.compile and sae.sparse_step:
            raise UserError(
                f"train.compile=true does not go with sae={config.sae.architecture}, whose sparse step it would only "
                "slow down; leave it out"
            )
        if state is None:
            sae.initialise(
                torch.Generator().manual_seed(config.train.seed),
                mean=centre(config, self.store, stream),
                norm_scale=self.store.statistics(stream.hook).norm_scale,
                target_scale=self.store.statistics(target).norm_scale if target else None,
            )
            if config.train.init_from:
                sae.adopt(export.load(config.train.init_from))
        if config.trainer.precision == "64-true":
            sae.double()  # before a checkpoint is loaded, which would lose half of its bits
        train = config.train
        point = Point(
            sae,
            config.optim,
            total_steps=self.total_steps,
            lanes=stream.lanes,
            seed=train.seed,
            micro_batches=train.micro_batches,
            compile=train.compile,
        )
        if state is not None:
            if state["store_identity"] != self.store.plan.identity:
                raise UserError(
                    "store.dir holds another store than the one that this run began on; give that one, or another "
                    "run.dir"
                )
            point.restore(state)
        return point

    def _begin(self) -> int:
        """Return the step of the newest checkpoint that all points have, as the first rank sees it; 0 without one."""
        ranks, folders = self.launch.ranks, [run.checkpoints for run in self.runs]
        begin = checkpoints.newest_common(folders) or 0 if ranks.rank == 0 else 0
        return int(ranks.sum(torch.tensor(begin)))

    def _announce(self, point: Point, begin: int) -> None:
        config, ranks = self.config, self.launch.ranks
        log.info(
            "training %s, %s latents, on %s of %s: %s steps of %s tokens%s%s",
            f"{len(self.configs)} points of {config.sae.architecture}" if self.configs[1:] else config.sae.architecture,
            f"{point.sae.d_sae:,}",
            ", ".join(stream.hook for stream in self.streams),
            self.store.folder,
            f"{self.total_steps:,}",
            f"{config.stream.batch_tokens:,}",
            f", on {ranks.world_size} ranks" if ranks.world_size > 1 else "",
            f", going on from step {begin:,}" if begin else "",
        )

    @contextmanager
    def _logging(self, module: SAEModule, begin: int) -> Iterator[None]:
        """Open the loggers of every point while the block runs, on the first rank."""
        if self.launch.ranks.rank:
            yield
            return
        with ExitStack() as stack:
            module.point_loggers = [
                stack.enter_context(loggers.opened(config, start_step=begin)) for config in self.configs
            ]
            yield

    def _callbacks(self) -> list[pl.Callback]:
        """List what is due every so many steps; checkpoints last, so that they know of the rest."""
        train, ranks, steps = self.config.train, self.launch.ranks, self.total_steps
        found: list[pl.Callback] = []
        if train.evaluate_every_steps:
            found.append(Measurements(self._measure, train.evaluate_every_steps, ranks))
        if train.n_checkpoints:
            due = {steps * number // (train.n_checkpoints + 1) for number in range(1, train.n_checkpoints + 1)}
            found.append(Exports(self._export_step, due, ranks))
        return [*found, Checkpoints(self.runs, train.checkpoint_every_steps, ranks, self.store.plan.identity)]

    def _measure(self, at: int, point: Point) -> dict[str, float]:
        stream = self.streams[self.stream_of[at]]
        return measure(self.store, stream.hook, stream.target_hook or stream.hook, point.sae)

    def _export_step(self, at: int, point: Point, steps_done: int) -> None:
        self._export(at, point, self.runs[at].step_folder(steps_done))

    def _export(self, at: int, point: Point, folder: Path) -> None:
        """Write an SAE where every tool of the field finds it."""
        config = self.configs[at]
        metadata = {
            "model_name": config.model.name,
            "model_class_name": "HookedTransformer" if config.model.compatibility_mode else "AutoModelForCausalLM",
            "hook_name": self.streams[self.stream_of[at]].hook,
            "hook_head_index": None,
            **({"hook_name_out": config.stream.target_hook} if point.sae.is_transcoder else {}),
            "context_size": config.data.context_size,
            "prepend_bos": config.data.prepend_bos,
            "dataset_path": config.data.path,
            "exclude_special_tokens": config.data.exclude_special_tokens,
        }
        export.save(point.sae, folder, metadata=metadata, sparsity=point.density)

    def _finish(self, module: SAEModule, begin: int, seconds: float, device: str) -> None:
        """Export the points that are sound, and mark their runs as finished."""
        tokens = (module.steps_done - begin) * self.config.stream.batch_tokens
        for at, point in module.unbroken():
            run = self.runs[at]
            self._export(at, point, run.sae_folder)
            run.finish(
                {
                    **self._summary(at, module),
                    "device": device,
                    "ranks": self.launch.ranks.world_size,
                    "points": len(self.configs),
                    "resumed_from_step": begin,
                    "seconds": round(seconds, 2),
                    "tokens_per_s": round(tokens / seconds) if tokens else None,
                }
            )
            log.info("trained at %s tokens/s; the SAE is in %s", f"{tokens / seconds:,.0f}", run.sae_folder)

    def _summary(self, at: int, module: SAEModule) -> dict[str, Any]:
        """Say what was trained, on what, by what, and how it went."""
        config, run = self.configs[at], self.runs[at]
        return {
            "run_dir": str(run.folder),
            "sae": str(run.sae_folder),
            "command": shlex.join(["python", "-m", "saepipe.train", *config.overrides]),
            "git_commit": provenance.git_commit(),
            "versions": provenance.versions("torch", "lightning"),
            "store": {"dir": config.store.dir, "identity": self.store.plan.identity},
            "steps": module.steps_done,
            "tokens": module.steps_done * config.stream.batch_tokens,
            "metrics": module.last_metrics[at],
        }


def total_steps(config: RunConfig, world_size: int) -> int:
    """Count the steps of a run, and say what does not fit it.

    Raises:
        UserError: Not one step, or a share of the batch that has not so many parts.
    """
    steps, share = config.train.tokens // config.stream.batch_tokens, config.stream.batch_tokens // world_size
    if not steps:
        raise UserError(
            f"train.tokens={config.train.tokens} is less than one batch; give at least "
            f"stream.batch_tokens={config.stream.batch_tokens}"
        )
    if share % config.train.micro_batches:
        raise UserError(
            f"train.micro_batches={config.train.micro_batches} does not divide the {share} rows that each of "
            f"{world_size} ranks has of stream.batch_tokens={config.stream.batch_tokens}; choose one that does"
        )
    _warn_of_schedule(config, steps)
    return steps


def _warn_of_schedule(config: RunConfig, steps: int) -> None:
    """Warn where a run is shorter than its warm-ups and decay, as one is after train.tokens alone was lowered."""
    warm_up, decay = config.optim.lr_warm_up_steps, config.optim.lr_decay_steps
    if warm_up + decay > steps:
        log.warning(
            "optim.lr_warm_up_steps=%s and optim.lr_decay_steps=%s are longer than the run's %s steps: the rate never "
            "reaches optim.lr; try optim.lr_warm_up_steps=%s optim.lr_decay_steps=%s",
            *(warm_up, decay, steps, steps // 20, steps // 5),
        )
    l1_warm_up = getattr(config.sae, "l1_warm_up_steps", 0)
    if l1_warm_up > steps:
        log.warning(
            "sae.l1_warm_up_steps=%s is longer than the run's %s steps: the penalty never reaches sae.l1_coefficient; "
            "try sae.l1_warm_up_steps=%s",
            *(l1_warm_up, steps, steps // 20),
        )
