"""What every rank must know of every step: whether to stop, and whether a loss was not finite.

A signal handler only sets a flag. Each step reduces one small vector over the ranks, and the host reads it a step late,
when it is there already: so no step waits for the device, and all ranks stop after the same step.
"""

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.ranks import Ranks
from saepipe.stopping import STOPPING

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class News:
    """What came of a step, over all ranks."""

    step: int
    """Steps done before it."""
    signal: int
    """The signal that asked some rank to stop; 0 for none."""
    broken: list[tuple[int, str]]
    """Which values were not finite: number of the point, and name."""


class Watch:
    """The flag that signals set, and the exchange of it.

    Args:
        ranks: The ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._signal = 0
        self._waiting: tuple[int, list[tuple[int, str]], Tensor, torch.cuda.Event | None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests to stop while the block runs; a second Ctrl-C is Python's."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set a handler
            return
        # What is ignored stays so: saepipe's parent process passes Ctrl-C on to its ranks as SIGTERM.
        numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def tell(self, step: int, values: Mapping[tuple[int, str], Float[Tensor, ""]]) -> News | None:
        """Exchange the news of a step, and return those of the one before it; None at the first.

        Args:
            step: Steps done before it.
            values: Numbers that should be finite, by point and name.
        """
        stacked = torch.stack(list(values.values()))
        vector = torch.cat([stacked.new_tensor([float(self._signal)]), (~stacked.isfinite()).to(stacked.dtype)])
        vector = -self._ranks.least(-vector)
        previous, event = self.read(), None
        if vector.device.type == "cuda":
            vector = vector.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting = (step, list(values), vector, event)
        return previous

    def read(self) -> News | None:
        """Wait for the news that were not read yet, and return them."""
        if self._waiting is None:
            return None
        (step, names, vector, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()
        first, *broken = vector.tolist()
        return News(step, int(first), [name for name, value in zip(names, broken, strict=True) if value])
