"""Small training runs for tests, of every architecture and every way to revive latents, here or in other processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from saepipe import checkpoints, entry, saes
from saepipe.config import RunConfig
from saepipe.launched import Launch
from saepipe.point import Point
from saepipe.train import adopt_plan, open_store, resolved, run_job

ROOT = Path(__file__).parents[1]
HOOK = "blocks.0.hook_resid_post"
BATCH = 24


def keys(architecture: str, steps: int, *more: str) -> list[str]:
    """Overrides of a run of some steps, whose latents soon count as dead; `more` come last."""
    has = vars(saes.architecture(architecture).config_class())
    found = [f"stream.hook={HOOK}", f"stream.batch_tokens={BATCH}", "stream.window_tokens=96"]
    found += [f"sae={architecture}", "sae.d_sae=12", "sae.dead_after_tokens=48", f"train.tokens={BATCH * steps}"]
    found += ["sae.k=3"] if "k" in has else []
    found += ["sae.pre_act_loss_coefficient=0.01"] if "pre_act_loss_coefficient" in has else []
    return [*found, *more]


def cases() -> dict[str, tuple[str, list[str]]]:
    """Name every architecture with each of its ways to revive latents -> architecture and overrides."""
    found = {}
    for name in saes.registered():
        choices = {item.name: item.metadata.get("choices") for item in fields(saes.architecture(name).config_class)}
        for method in choices.get("dead_method") or ():
            more = ["sae.resample_every_steps=20"] if method == "resample" else []
            found[f"{name}-{method}"] = (name, [f"sae.dead_method={method}", *more])
    return found


def last_cases() -> list[str]:
    """Name one case of each architecture: its richest way to revive latents."""
    return list({name: case for case, (name, _) in cases().items()}.values())


def configured(overrides: Sequence[str], store: Path, run: Path) -> RunConfig:
    """Compose a run as the train verb has it once it knows the store."""
    config = entry.load_config("train", [*overrides, f"store.dir={store}", f"run.dir={run}"])
    opened = open_store(config)
    adopt_plan(config, opened)
    config.stream, config.sae = resolved(config, opened)
    return config


def train_each(configs: list[RunConfig], launch: Launch) -> None:
    """Train runs one after the other, in the ranks that were started for all of them."""
    for config in configs:
        run_job([config], open_store(config), launch)


def train_with_nan(config: RunConfig, launch: Launch) -> None:
    """Train a run in which one row of the last rank is not a number at step 14."""
    take_step = Point.take_step

    def poisoned(self: Point, x: torch.Tensor, y: torch.Tensor, number: int, **how: Any) -> Any:
        if number == 13 and launch.ranks.rank == launch.ranks.world_size - 1:
            x = y = x.clone()
            x[-1] = torch.nan
        return take_step(self, x, y, number, **how)

    Point.take_step = poisoned  # type: ignore[method-assign]
    run_job([config], open_store(config), launch)


@contextmanager
def interrupted(after_steps: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Have a signal come to this process in the step after some; a run in the block is to stop at it."""
    from saepipe.module import SAEModule

    step = SAEModule.training_step

    def signalled(module: SAEModule, *arguments: Any) -> None:
        if module.steps_done == after_steps:
            os.kill(os.getpid(), number)
        step(module, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAEModule, "training_step", signalled)
        with pytest.raises(SystemExit) as ended:
            yield
    assert ended.value.code == 128 + number


def launch(overrides: Sequence[str], *, new_session: bool = False, **environment: str) -> "subprocess.Popen[str]":
    """Start the train verb in a process of its own; shapes are not checked there, which would take most of the time."""
    return subprocess.Popen(
        [sys.executable, "-m", "saepipe.train", *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        text=True,
        start_new_session=new_session,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(overrides: Sequence[str]) -> str:
    """Run the train verb in a process of its own to its end, and return what it printed."""
    process = launch(overrides)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def state(run: Path) -> dict[str, Any]:
    """Read a run's newest checkpoint."""
    path = checkpoints.newest(run / "checkpoints")
    assert path is not None, f"{run} has no checkpoint"
    return checkpoints.load(path.parent, checkpoints.step_of(path))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Read the weights and counters of a run's newest checkpoint."""
    found: dict[str, torch.Tensor] = state(run)["state_dict"]
    return found
