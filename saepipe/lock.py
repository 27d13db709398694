"""One process at a time in a folder."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saepipe.durable import disk_errors
from saepipe.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_logger = logging.getLogger(__name__)


@contextmanager
def hold(folder: str | Path, *, key: str, wait: bool = False) -> Iterator[None]:
    """Hold `folder` (made where it does not exist) for this process while the block runs.

    The kernel gives the lock back when the process ends, however it ends: after SIGKILL nothing has to be cleaned up.
    Where the platform or the file system has no locks, a warning says so and the block runs unprotected.

    Args:
        folder: The store or run folder.
        key: Configuration key that holds it, such as `store.dir`.
        wait: Wait until another process that holds the folder gives it back, instead of refusing.

    Raises:
        UserError: Another process holds the folder; says which.
    """
    folder = Path(folder)
    with disk_errors(key, folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The file stays when the lock is given back: a process that waits on a deleted one would lock nothing.
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder, key, wait=wait)
        command = " ".join(sys.argv)[:200]
        with suppress(OSError):  # a full disk, which what is done under the lock tells of in better words
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({command})".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        if fcntl is not None:
            with suppress(OSError):  # where it could not be locked either
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked child may have it open too
        os.close(descriptor)


def can_hold() -> bool:
    """Tell whether this platform has locks."""
    return fcntl is not None


def _lock(descriptor: int, folder: Path, key: str, *, wait: bool) -> None:
    """Take the lock, or say who has it."""
    if fcntl is None:
        _logger.warning("this platform has no file locks: make sure that one process only uses %s=%s", key, folder)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        if wait:
            _logger.info("%s=%s: waiting for %s", key, folder, holder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return
        raise UserError(f"{key}={folder} is in use by {holder}; wait until it ends, or choose another {key}") from None
    except OSError as error:  # network file systems without a lock daemon
        _logger.warning(
            "%s=%s cannot be locked (%s): make sure that one process only uses it", key, folder, error.strerror
        )
