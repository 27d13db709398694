"""How far a long step is: tokens per second and time left, on a terminal or in a log."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

IN_A_LOG_S = 30
"""Seconds between two states of a bar that goes to a file or a scheduler's log."""

_hidden = False
tqdm.set_lock(threading.RLock())  # its own is shared with other processes, and left behind by one that is killed


def hide() -> None:
    """Show no bar in this process: what it does is in another one's."""
    global _hidden
    _hidden = True


@contextmanager
def hidden() -> Iterator[None]:
    """Show no bar while the block runs."""
    global _hidden
    before, _hidden = _hidden, True
    try:
        yield
    finally:
        _hidden = before


def bar(step: str, tokens: int, done: int = 0) -> "tqdm[Any]":
    """Open a progress bar over tokens.

    Args:
        step: What is going on, one word.
        tokens: How many there are in all.
        done: How many were done before this process began.
    """
    interval_s = 0.1 if sys.stderr.isatty() else IN_A_LOG_S
    return tqdm(
        desc=step, total=tokens, initial=done, unit="tok", unit_scale=True, mininterval=interval_s, disable=_hidden
    )
