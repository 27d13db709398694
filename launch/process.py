"""A process that a submission left behind on this machine, told apart from a later one that was given its number."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from saepipe.errors import UserError


def name(pid: int) -> str:
    """Return what tells a process from every other: its machine, that machine's boot, when it began, its number.

    Args:
        pid: Number of a process of this machine that runs.
    """
    return " ".join([socket.gethostname(), _boot(), _begun(pid), str(pid)])


def is_alive(named: str) -> bool:
    """Tell whether a process runs; one of another machine, which cannot be seen from here, is taken to."""
    host, boot, begun, pid = named.split(" ")
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except OSError:
        return False
    return (boot, begun) == (_boot(), _begun(int(pid)))


def end(named: str, number: int) -> None:
    """Send a process a signal, if it still runs.

    Raises:
        UserError: It runs on another machine.
    """
    host, *_, pid = named.split(" ")
    if host != socket.gethostname():
        raise UserError(f"this was submitted on {host}, where its processes run; give the same command there")
    if is_alive(named):
        with suppress(ProcessLookupError):
            os.kill(int(pid), number)


def _boot() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else "-"


def _begun(pid: int) -> str:
    """When a process began, in the kernel's ticks; a dash without /proc, and another word for one that has ended."""
    if not Path("/proc/self").exists():
        return "-"
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return "ended"
    return "ended" if state == "Z" else fields[18]
