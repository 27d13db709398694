"""Work on many files at once, in threads: reading and hashing a file needs no other thread's time."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST = 8


def threads() -> int:
    """Return how many threads read at once: as many as this process may use cores, and at most eight."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST, here)


def concurrently(function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Apply a function to items in threads, a few ahead, and give the results in the items' order.

    What the function raises is raised here in its turn. Closing the generator waits for the few calls that have begun.
    """
    rest = iter(items)
    n = threads()
    with ThreadPoolExecutor(n, "files") as pool:
        ahead = deque(pool.submit(function, item) for item in islice(rest, 2 * n))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(function, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
