"""Processes by host and number, as they sign what they leave on a disk that several machines share."""

import hashlib
import os
import socket
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def host() -> str:
    """Return a short name, good in a file's name, of where process numbers mean what they mean here.

    That is this machine and, of containers that share its name, this one.
    """
    numbers = ""
    with suppress(OSError):  # only Linux has containers
        numbers = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


def ended(host_name: str, process: int) -> bool:
    """Tell whether a process is known to have ended; False where it ran on another machine, or nobody can tell."""
    if host_name != host() or sys.platform == "win32":  # os.kill would end a process there
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Tell whether a process has ended and its parent has not asked yet; False where nobody can tell (no Linux)."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("Z", "X")
