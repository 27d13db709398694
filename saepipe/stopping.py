"""Signals that ask a process to stop, and what it does at them where there is nothing to save."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
"""From a user, and from schedulers before they preempt."""
GOES_ON = "the same command goes on from what is on disk"
"""What a process says that was stopped."""


def end_at_once(names: Sequence[str] = STOPPING, *, told: bool = True) -> None:
    """Have signals end this process: in training `Watch.listening` takes them over, before and after nothing is lost.

    Not by way of an exception: libraries that are just being imported swallow one here and there.

    Args:
        names: Which signals; those that the process ignores stay ignored.
        told: Say so on standard error.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set a handler

    def end(number: int, _: object) -> None:
        if told:
            word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"saepipe: {word}; {GOES_ON}\n".encode())
        os._exit(128 + number)

    for name in names:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from a process that is started in the block until it is ready, since it would print where it was."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
