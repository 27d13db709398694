"""Ranks that share a step: against as many processes that know nothing of each other, and against one alone.

Each has one thread. Weak scaling: every rank has a whole batch, as every independent process has. Strong scaling: the
ranks share one batch.
"""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from saepipe.bench_figure import Figure
from saepipe.bench_step import first_task
from saepipe.config import RunConfig
from saepipe.contest import WARM_UP_STEPS, Contestant, Task, together
from saepipe.errors import UserError

WORLD_SIZES = (2, 4)
TURN_STEPS = 5


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Measure TopK's steps with 2 and 4 ranks.

    Raises:
        UserError: Fewer GPUs than ranks, or a batch that they cannot share.
    """
    task = replace(first_task(config, folder), library="saepipe", threads=1)
    if task.device == "cuda" and torch.cuda.device_count() < max(WORLD_SIZES):
        raise UserError(
            f"bench.parts=ranks needs {max(WORLD_SIZES)} GPUs and there are {torch.cuda.device_count()}; leave ranks "
            "out, or measure on the CPU with trainer.accelerator=cpu"
        )
    if task.batch_tokens % max(WORLD_SIZES):
        raise UserError(
            f"bench.batch_tokens={task.batch_tokens} cannot be shared by {max(WORLD_SIZES)} ranks; give a multiple"
        )
    return [figure for world_size in WORLD_SIZES for figure in _figures(config, task, world_size)]


def _figures(config: RunConfig, task: Task, world_size: int) -> Iterator[Figure]:
    tokens = world_size * task.batch_tokens * TURN_STEPS
    with ExitStack() as stack:
        apart = _started(stack, [task] * world_size)
        weak = _started(stack, _sharing(stack, task, world_size))
        part = replace(task, batch_tokens=task.batch_tokens // world_size)
        strong = _started(stack, _sharing(stack, part, world_size))
        for group in (apart, weak, strong):
            together(group, steps=WARM_UP_STEPS)
        rounds = []
        for _ in range(config.bench.rounds):
            alone = together(apart[:1], steps=TURN_STEPS)[0]
            independent = sum(task.batch_tokens * TURN_STEPS / seconds for seconds in together(apart, steps=TURN_STEPS))
            shared = tokens / max(together(weak, steps=TURN_STEPS))
            one_batch = max(together(strong, steps=TURN_STEPS))
            rounds.append((independent, shared, alone, one_batch))
    medians = [statistics.median(each) for each in zip(*rounds, strict=True)]
    yield Figure(
        f"ranks, {world_size} with a batch each, tokens/s over as many independent processes",
        [shared / independent for independent, shared, _, _ in rounds],
        {"ranks_tokens_per_s": medians[1], "independent_tokens_per_s": medians[0]},
        at_least=0.85 if world_size == 2 else None,
    )
    yield Figure(
        f"ranks, {world_size} that share a batch, tokens/s over one alone",
        [alone / one_batch for _, _, alone, one_batch in rounds],
        {"alone_s": medians[2] / TURN_STEPS, "ranks_s": medians[3] / TURN_STEPS},
    )


def _sharing(stack: ExitStack, task: Task, world_size: int) -> list[Task]:
    """Make ranks of a task, and the store where they meet."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stack.callback(lambda: store)  # lives as long as they do
    return [replace(task, rank=rank, world_size=world_size, port=store.port) for rank in range(world_size)]


def _started(stack: ExitStack, tasks: list[Task]) -> list[Contestant]:
    """Start processes, and wait for all."""
    started = [stack.enter_context(Contestant(f"rank {task.rank}", task.command())) for task in tasks]
    for contestant in started:
        contestant.hear(started)  # a rank without the others would wait for long
    return started
