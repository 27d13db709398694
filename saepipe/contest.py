"""A comparison of training steps that different processes take in turns, so that noise hits all alike.

Each contestant is a process of its own: so it may run in another environment, no library's patches reach another, and
the peak of its memory is its own. It takes steps when it is told to, over a pipe.

    with Contestant("SAELens", task.command(python)) as theirs, Contestant("saepipe", mine.command()) as ours:
        seconds = in_turns({"SAELens": theirs.ready(), "saepipe": ours.ready()}, turns=20)
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saepipe.errors import UserError

WARM_UP_STEPS = 3
"""Steps of each contestant that do not count: they set up what later ones use again."""
_LAST_LINES = 5
_LOOK_S = 0.2
"""How often one looks after others while one waits for a contestant."""


@dataclass(frozen=True)
class Task:
    """What a contestant is to do."""

    library: str
    """Whose step: saepipe, product (the encoder's alone), SAELens, dictionary_learning or sparsify."""
    architecture: str
    """Name of the architecture in saepipe."""
    batches: str
    """safetensors file of batches [token, d_in], the same for all."""
    d_in: int
    """Width of a row."""
    d_sae: int
    """Number of latents."""
    batch_tokens: int
    """Rows of a batch to take."""
    k: int = 32
    """Active latents of a token, where the architecture is told so."""
    l0: float | None = None
    """Active latents of a token that biases or thresholds are set for, where it is not; None: those of the start."""
    threads: int = 1
    """Threads of the CPU."""
    device: str = "cpu"
    """Torch device."""
    precision: str = "32-true"
    """32-true or bf16-mixed."""
    fused: bool = False
    """Have a peer's Adam fused, which its own trainer does not do."""
    compile: bool = False
    """Compile saepipe's loss."""
    sae: dict[str, Any] = field(default_factory=dict)
    """More keys of saepipe's architecture."""
    rank: int = 0
    """Number among the ranks that share a step."""
    world_size: int = 1
    """How many ranks there are."""
    port: int = 0
    """Port of this machine where ranks meet."""

    def command(self, python: str | Path = sys.executable) -> list[str]:
        """Return the command of a process that does it, in the environment of an interpreter."""
        return [str(python), "-m", "saepipe.contestant", json.dumps(asdict(self))]


class Contestant:
    """A process that takes steps.

    Args:
        name: What it is called in messages.
        command: What runs it, such as `Task.command`.
        cure: What to do where it does not run.
    """

    def __init__(self, name: str, command: Sequence[str], *, cure: str = "run the same command again") -> None:
        self.name, self._cure = name, cure
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed at the exit
        try:
            self._process = subprocess.Popen(
                [*command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                # Idle threads of those who wait would spin at first, in the time of whose turn it is.
                env={**os.environ, "OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1"},
            )
        except OSError as error:
            self._errors.close()
            raise UserError(f"{name} cannot be started with {command[0]} ({error.strerror}); {cure}") from None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Take the answers down, in a thread, so that one can wait for several contestants; "" is the end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ready(self) -> "Contestant":
        """Wait until it is ready to take steps."""
        self.hear()
        return self

    def tell(self, **command: int) -> None:
        """Send a command: `steps=3`, `l0=1` or `peak=1`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def hear(self, beside: Iterable["Contestant"] = ()) -> float:
        """Wait for the answer to a command.

        Args:
            beside: Others, without which this one would never answer.

        Raises:
            UserError: The process ended, or another one did; its last words are in the message.
        """
        while True:
            try:
                line = self._lines.get(timeout=_LOOK_S)
            except queue.Empty:
                for other in beside:
                    if other._process.poll() is not None:
                        raise other._ended() from None
                continue
            if not line:
                raise self._ended()
            return float(line)

    def ask(self, **command: int) -> float:
        """Send a command and wait for the answer."""
        self.tell(**command)
        return self.hear()

    def _ended(self) -> UserError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        refused = [line for line in lines if line.startswith("saepipe: ")]  # one sentence, with its cure
        if refused:
            return UserError(f"{self.name} ended: {refused[-1].removeprefix('saepipe: ')}")
        last = " | ".join(lines[-_LAST_LINES:])
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        memory = ", perhaps for want of memory" if code == -9 else ""
        return UserError(f"{self.name} ended with {how}{memory}: {last or 'without a word'}; {self._cure}")

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and wait for that: its memory is wanted by the next."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not read of the last command
                pipe.close()
        self._errors.close()


def in_turns(contestants: Mapping[str, Contestant], turns: int, *, steps: int = 1) -> dict[str, list[float]]:
    """Have contestants take steps one after the other, each turn in another order.

    Args:
        contestants: Who.
        turns: How often each takes its turn.
        steps: Steps of a turn.

    Returns:
        Seconds a step, in each turn.
    """
    for contestant in contestants.values():
        contestant.ask(steps=WARM_UP_STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = [*contestants]
    for turn in range(turns):
        first = turn % len(names)  # whoever comes first warms the caches
        for name in names[first:] + names[:first]:
            seconds[name].append(contestants[name].ask(steps=steps) / steps)
    return seconds


def together(contestants: Iterable[Contestant], *, steps: int) -> list[float]:
    """Have contestants take steps at the same time, and return the seconds that each took."""
    contestants = [*contestants]
    for contestant in contestants:
        contestant.tell(steps=steps)
    return [contestant.hear(contestants) for contestant in contestants]


def answering() -> Callable[[float], None]:
    """Keep a contestant's standard output for its answers: what libraries print goes to standard error instead.

    Returns:
        What answers with a number, and ends the process where nobody listens any more.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(number: float) -> None:
        try:
            answers.write(f"{number}\n")
            answers.flush()
        except BrokenPipeError:
            os._exit(0)

    return answer
