"""How far a long step is: tokens per second and time left, on a terminal or in a log."""

import multiprocessing
import sys
from typing import Any

from tqdm import tqdm

IN_A_LOG_S = 30
"""Seconds between two states of a bar that goes to a file or a scheduler's log."""


def bar(step: str, tokens: int, done: int = 0) -> "tqdm[Any]":
    """Open a progress bar over tokens.

    Args:
        step: What is going on, one word.
        tokens: How many there are in all.
        done: How many were done before this process began.
    """
    interval_s = 0.1 if sys.stderr.isatty() else IN_A_LOG_S
    helper = multiprocessing.parent_process() is not None  # what it does is in its parent's bar
    return tqdm(
        desc=step, total=tokens, initial=done, unit="tok", unit_scale=True, mininterval=interval_s, disable=helper
    )
