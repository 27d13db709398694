"""A training job, as each rank of it runs: the points that are left, from their checkpoints to their exports."""

import hashlib
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
from torch import Tensor

from saepipe import checkpoints, entry, formats, loggers, provenance
from saepipe.callbacks import Checkpoints, Exports, Measurements
from saepipe.centre import centre
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained
from saepipe.fitting import fit
from saepipe.formats import saelens
from saepipe.heldout import measure
from saepipe.launched import Launch
from saepipe.module import SAEModule
from saepipe.point import Point
from saepipe.run_length import in_vain, total_steps
from saepipe.runs import Run
from saepipe.store import Store
from saepipe.stream import Stream
from saepipe.untrained import untrained

log = logging.getLogger(__name__)

# How SAELens is to load a model for an SAE of HookedTransformer's numerics.
_PROCESSING = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), True)


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
        for warning in {text: None for config in self.configs for text in in_vain(config, self.total_steps)}:
            log.warning(warning)
        self._centres: dict[tuple[int, str], Tensor | None] = {}

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
        built = [self._build(at, begin) for at in range(len(self.configs))]
        module = SAEModule(
            [point for point, _ in built],
            self.stream_of,
            [str(run.folder) for run in self.runs],
            ranks,
            total_steps=self.total_steps,
            steps_done=begin,
            log_every_steps=self.config.train.log_every_steps,
        )
        module.last_metrics = [metrics for _, metrics in built]
        for config, run in zip(self.configs, self.runs, strict=True) if ranks.rank == 0 else ():
            checkpoints.drop_later(run.checkpoints, begin)
            if not begin:  # not before everything that may be refused was looked at
                entry.save_config(config, run.config_file)
        self._announce(module, begin)
        began = time.perf_counter()
        with self._logging(module, begin):
            device = fit(self.config, self.streams, module, self._callbacks(), self.launch)
        seconds = time.perf_counter() - began
        if ranks.rank == 0:
            self._finish(module, begin, seconds, device)
        return module.failures

    def _build(self, at: int, begin: int) -> tuple[Point, dict[str, float]]:
        """Make an SAE and the point that trains it, with its first weights or in the state of a checkpoint.

        Returns:
            The point, and its last metrics.
        """
        config, stream = self.configs[at], self.streams[self.stream_of[at]]
        target = stream.target_hook
        sae = untrained(config, self.store)
        if not begin:
            sae.initialise(
                torch.Generator().manual_seed(config.train.seed),
                mean=self._centre(at),
                norm_scale=self.store.statistics(stream.hook).norm_scale,
                target_scale=self.store.statistics(target).norm_scale if target else None,
            )
            if config.train.init_from:
                with explained("train.init_from"):
                    sae.adopt(formats.load(config.train.init_from))
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
        if not begin:
            return point, {}
        state = checkpoints.load(self.runs[at].checkpoints, begin)
        if state["steps_done"] != begin:
            raise UserError(
                f"{self.runs[at].checkpoints} holds a checkpoint of step {state['steps_done']} under the name of step "
                f"{begin}; delete it"
            )
        if state["store_identity"] != self.store.plan.identity:
            raise UserError(
                "store.dir holds another store than the one that this run began on; give that one, or another run.dir"
            )
        point.restore(state)
        return point, state["last_metrics"]

    def _centre(self, at: int) -> Tensor | None:
        """Find where b_dec starts, once for all points that start there: a geometric median takes a while."""
        key = (self.stream_of[at], self.configs[at].sae.b_dec_init_method)
        if key not in self._centres:
            self._centres[key] = centre(self.configs[at], self.store, self.streams[self.stream_of[at]])
        return self._centres[key]

    def _begin(self) -> int:
        """Return the step of the newest checkpoint that all points have, as the first rank sees it; 0 without one.

        Raises:
            UserError: The ranks are not about to train the same points.
        """
        ranks, folders = self.launch.ranks, [run.checkpoints for run in self.runs]
        begin = checkpoints.newest_common(folders) or 0 if ranks.rank == 0 else 0
        digest = int.from_bytes(hashlib.sha256(repr(self.configs).encode()).digest()[:7])
        least, most, told = ranks.least(torch.tensor([digest, -digest, -begin])).tolist()
        if least != -most:
            raise UserError(
                f"run.dir={self.runs[0].folder}: the ranks were started with different keys, or see different disks; "
                "start all of them with one command, and put run.dir on a disk that all machines share"
            )
        return -int(told)

    def _announce(self, module: SAEModule, begin: int) -> None:
        config, ranks = self.config, self.launch.ranks
        widths = sorted({point.sae.d_sae for point in module.trained})
        log.info(
            "training %s, %s latents, on %s%s of %s: %s steps of %s tokens%s%s",
            f"{len(self.configs)} points of {config.sae.architecture}" if self.configs[1:] else config.sae.architecture,
            " or ".join(f"{width:,}" for width in widths),
            ", ".join(stream.hook for stream in self.streams),
            f" to predict {config.stream.target_hook}" if module.trained[0].sae.is_transcoder else "",
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
            wanted = min(train.n_checkpoints, steps)
            due = {steps * number // (wanted + 1) for number in range(1, wanted + 1)}
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
        metadata: dict[str, Any] = {
            "model_name": config.model.name,
            "model_class_name": "HookedTransformer" if config.model.compatibility_mode else "AutoModelForCausalLM",
            "hook_name": self.streams[self.stream_of[at]].hook,
            "hook_head_index": None,
            "compatibility_mode": config.model.compatibility_mode,
            **({"model_from_pretrained_kwargs": _PROCESSING} if config.model.compatibility_mode else {}),
            **({"hook_name_out": config.stream.target_hook} if point.sae.is_transcoder else {}),
            "context_size": config.data.context_size,
            "prepend_bos": config.data.prepend_bos,
            "dataset_path": config.data.path,
            "exclude_special_tokens": config.data.exclude_special_tokens,
        }
        if config.stream.positions is not None:
            first, last = config.stream.positions
            metadata["seqpos_slice"] = [first, last + 1]
        saelens.save(point.sae, folder, metadata=metadata, sparsity=point.density)

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
        typed = [text for text in config.overrides if not text.startswith(("run.dir=", "run.name="))]
        return {
            "run_dir": str(run.folder),
            "sae": str(run.sae_folder),
            "command": shlex.join(["python", "-m", "saepipe.train", *typed, f"run.dir={run.folder}"]),
            "git_commit": provenance.git_commit(),
            "versions": provenance.versions("torch", "lightning"),
            "store": {"dir": config.store.dir, "identity": self.store.plan.identity},
            "steps": module.steps_done,
            "tokens": module.steps_done * config.stream.batch_tokens,
            "metrics": module.last_metrics[at],
        }
