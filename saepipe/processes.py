"""Processes by host and number, as they sign what they leave on a disk that several machines share."""

import hashlib
import os
import socket
import sys


def host() -> str:
    """Return a short name of this machine that is good in a file's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def ended(host_name: str, process: int) -> bool:
    """Tell whether a process is known to have ended; False where it ran on another machine, or nobody can tell."""
    if host_name != host() or sys.platform == "win32":  # os.kill would end a process there
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
