"""Threads whose work can be stopped at any moment and from anywhere, the garbage collector included.

An executor of the standard library cannot: its `shutdown` takes locks, which the very thread in which a collection
begins may hold, and waits for threads, which may need them to end. Here a stop sets a flag and puts a mark into a
queue, which is safe in a finaliser; waiting is something else.
"""

import atexit
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, NoReturn, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class StoppedError(Exception):
    """The work was not done, since its threads were stopped."""


class Background:
    """Threads that do work in the order in which it comes.

    Args:
        threads: How many, started with the first work; 0 does each piece of work when it is waited for, in the thread
            that waits.
        name: What they are called.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._count, self._name = threads, name
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        _running.add(self)

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        """Have work done, and return what waits for it and gives what it returns, or raises what it raises.

        What waits raises `StoppedError` where the work was not begun before the stop.
        """
        task = _Task(work, self.check)
        if not self._count:
            return task.do_and_wait
        self._work.put(task.do)
        while len(self._threads) < self._count and not self._stopped:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._threads.append(thread)
        if self._stopped:  # and the mark may be before the task
            task.done.put(self._refuse)
        return task.wait

    def check(self) -> None:
        """Leave long work in between.

        Raises:
            StoppedError: The threads were stopped.
        """
        if self._stopped:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoppedError

    def stop(self) -> None:
        """Have the threads end after the work that they are at; safe anywhere."""
        self._stopped = True
        self._work.put(None)

    def join(self) -> None:
        """Wait until the threads have ended, after `stop`; not in one of them, nor in a finaliser."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            task()
            del task  # and with it what the work refers to
        self._work.put(None)  # for the next thread


class _Task(Generic[T]):
    """Some work, and what came of it; no nested functions, each of which a checker of types would look at anew."""

    def __init__(self, work: Callable[[], T], check: Callable[[], None]) -> None:
        self.done: SimpleQueue[Callable[[], T]] = SimpleQueue()
        self._work, self._check = work, check

    def do(self) -> None:
        try:
            self._check()
            result = self._work()
            self.done.put(lambda: result)
        except BaseException as error:
            raised = error  # the name `error` ends with this block
            self.done.put(lambda: _raise(raised))

    def wait(self) -> T:
        return self.done.get()()

    def do_and_wait(self) -> T:
        self.do()
        return self.wait()


def _raise(error: BaseException) -> NoReturn:
    raise error


_running: "WeakSet[Background]" = WeakSet()


@atexit.register
def _stop_all() -> None:
    """End the threads before the interpreter takes down the modules that they use."""
    running = list(_running)
    for background in running:
        background.stop()
    for background in running:
        background.join()
