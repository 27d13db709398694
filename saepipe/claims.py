"""Who works on what, among processes on any number of machines that share a folder.

A claim is a file that its owner touches every few seconds. One that has not been touched for a while belongs to nobody
any more, and one whose process is gone from this machine at once. No lock daemon is needed, but there is no certainty
either: after a long pause two processes may both believe that they own the same thing. So claims only divide work whose
result does not depend on who does it, or how often.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from saepipe import processes

log = logging.getLogger(__name__)

CLAIMS = ".claims"
"""Folder of a store in which workers say what they are about; gone once the store is complete."""
TOUCH_S = 5.0
"""Seconds between two touches of a claim."""
STALE_S = 60.0
"""Seconds without a touch after which a claim is free."""


def owners(folder: Path) -> list[dict[str, Any]]:
    """Say who has claims in a folder, without writing there: each with host, process, what, and touched_s (ago)."""
    found = []
    for path in sorted(folder.glob("[!.]*")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(path.read_text())
            if not processes.ended(owner["id"], owner["process"]):
                touched_s = max(0, round(time.time() - path.stat().st_mtime))
                who = {"process": owner["process"], "host": owner["host"]}
                found.append({**who, "what": path.name, "touched_s": touched_s})
    return found


class Claims:
    """This process' claims in a folder; a context manager that gives all of them back.

    Args:
        folder: Folder of the claim files, made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mine: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._toucher = threading.Thread(target=self._touch, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        """Begin to touch what will be claimed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._toucher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give everything back."""
        self._done.set()
        self._toucher.join()
        for name in list(self._mine):
            self.release(name)
        with suppress(OSError):  # others may have claims in it
            self._folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim a thing; False where somebody else has it."""
        path = self._folder / name
        if path.exists() and self._stale(path):
            with suppress(OSError):  # another process may be faster
                path.unlink()
        if not self._create(path):
            return False
        with self._lock:
            self._mine[name] = path
        return True

    def _create(self, path: Path) -> bool:
        """Make a claim's file, which is never seen without its owner in it; False where there is one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = json.dumps({"host": socket.gethostname(), "id": processes.host(), "process": os.getpid()})
        hidden = self._hidden()
        hidden.write_text(owner)
        try:
            os.link(hidden, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with path.open("x") as file:
                    file.write(owner)
            except FileExistsError:
                return False
        finally:
            hidden.unlink(missing_ok=True)
        return True

    def _hidden(self) -> Path:
        return self._folder / f".{secrets.token_hex(8)}"

    def release(self, name: str) -> None:
        """Give a thing back."""
        with self._lock:
            path = self._mine.pop(name)
        with suppress(OSError):  # taken from this process while it was paused
            path.unlink()

    def holders(self, names: Iterable[str]) -> list[str]:
        """Say who has claims on things, as `process 12 on node3`."""
        found = set()
        for name in names:
            with suppress(OSError, ValueError, KeyError):
                owner = json.loads((self._folder / name).read_text())
                found.add(f"process {owner['process']} on {owner['host']}")
        return sorted(found)

    def _stale(self, path: Path) -> bool:
        try:
            owner = json.loads(path.read_text())
            if processes.ended(owner["id"], owner["process"]):
                return True
        except OSError:
            return False
        except (ValueError, KeyError, TypeError):
            log.debug("%s names no owner: its age tells", path)
        return self._age_s(path) > STALE_S

    def _age_s(self, path: Path) -> float:
        """Tell how long ago a claim was touched, by the file system's own clock: machines may disagree on the time."""
        probe = self._hidden()
        try:
            probe.touch()
            return probe.stat().st_mtime - path.stat().st_mtime
        except OSError:
            return 0.0
        finally:
            with suppress(OSError):
                probe.unlink()

    def _touch(self) -> None:
        while not self._done.wait(TOUCH_S):
            with self._lock:
                paths = list(self._mine.values())
            for path in paths:
                with suppress(OSError):
                    os.utime(path)
