"""Be one of the processes of `saepipe.contest`: make an SAE, and take training steps as lines on standard input say.

`python -m saepipe.contestant TASK`, with the task as JSON. Each line is a command, answered with a number on a line:
`{"steps": 3}` (seconds that they took), `{"l0": 1}` (active latents of a token, in one more step), `{"peak": 1}` (the
most memory of a step in bytes, with weights and optimizer, without libraries and batches).
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from saepipe import own_steps, peer_steps
from saepipe.contest import Task, answering
from saepipe.own_steps import Steps

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    """Serve until standard input ends."""
    task = Task(**json.loads(sys.argv[1]))
    answer = answering()
    torch.set_num_threads(task.threads)
    if task.world_size > 1:  # the parent has the store where they meet
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if task.world_size == 1:  # what a library loads with its first step is no memory of a step
        small = replace(task, architecture="topk", d_in=16, d_sae=64, k=4, l0=None, sae={}, compile=False)
        x = torch.randn(32, 16, device=task.device)
        _maker(small)([x]).take(x)
    served = _Served(task, _maker(task))
    commands = {"steps": served.seconds, "l0": served.l0, "peak": served.peak_bytes}
    answer(0.0)
    for line in sys.stdin:
        ((command, count),) = json.loads(line).items()
        answer(commands[command](count))
    os._exit(0)  # threads of torch.distributed may abort a process at its end


def _maker(task: Task) -> Callable[[list[Tensor]], Steps]:
    return own_steps.maker(task) if task.library in own_steps.LIBRARIES else peer_steps.maker(task)


class _Served:
    """The commands."""

    def __init__(self, task: Task, maker: Callable[[list[Tensor]], Steps]) -> None:
        self._device = torch.device(task.device)
        if task.device == "cuda":
            torch.cuda.set_device(task.rank)
        rows = load_file(task.batches)
        self._batches = [rows[name][: task.batch_tokens].clone().to(self._device) for name in sorted(rows)]
        del rows
        gc.collect()
        self._before = self._held("VmRSS")
        self._number = task.rank
        self._steps = maker(self._batches)

    def _next(self) -> Tensor:
        self._number += 1
        return self._batches[self._number % len(self._batches)]

    def seconds(self, count: int) -> float:
        """Take steps, and return how long they took."""
        self._settle()
        begin = time.perf_counter()
        for _ in range(count):
            self._steps.take(self._next())
        self._settle()
        return time.perf_counter() - begin

    def l0(self, _: int) -> float:
        """Take a step, and return how many latents were active on a token."""
        return float(self._steps.l0(self._steps.take(self._next())))

    def peak_bytes(self, count: int) -> float:
        """Take steps, and return the most memory that was held in them."""
        self._settle()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                FORGET.write_text("5")  # the peak that the kernel remembers
        for _ in range(count):
            self._steps.take(self._next())
        self._settle()
        return self._held("VmHWM") - self._before

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _held(self, which: str) -> float:
        """Return the memory in use (VmRSS) or its peak (VmHWM); nan where the system does not tell."""
        if self._device.type == "cuda":
            return float(torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated())
        if not STATUS.exists():
            return float("nan")
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
        return 1024.0 * int(line.split()[1])


if __name__ == "__main__":
    main()
