"""Who works on what, among processes on any number of machines that share a folder.

A claim is a file that its owner touches every few seconds. One that has not been touched for a while belongs to nobody
any more, and one whose process is gone from this machine at once. No lock daemon is needed, but there is no certainty
either: after a long pause two processes may both believe that they own the same thing. So claims only divide work whose
result does not depend on who does it, or how often.
"""

import hashlib
import json
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
        self._mine: dict[str, bytes] = {}
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
        with suppress(OSError):  # nobody has it
            found = path.read_bytes()
            if self._stale(path, found):
                self._remove(path, found)
        mine = self._signed()
        if not self._create(path, mine):
            return False
        with self._lock:
            self._mine[name] = mine
        return True

    def release(self, name: str) -> None:
        """Give a thing back, unless it was taken from this process while it was paused."""
        with self._lock:
            mine = self._mine.pop(name)
        self._remove(self._folder / name, mine)

    def _signed(self) -> bytes:
        """Write down this process as an owner, in words that no other claim has."""
        owner = {"host": socket.gethostname(), "id": processes.host(), "process": os.getpid()}
        return json.dumps(owner | {"claim": secrets.token_hex(8)}).encode()

    def _create(self, path: Path, content: bytes) -> bool:
        """Make a claim's file, which is never seen without its owner in it; False where there is one."""
        hidden = self._hidden()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            hidden.write_bytes(content)
            try:
                os.link(hidden, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                with path.open("xb") as file:
                    file.write(content)
        except (FileExistsError, FileNotFoundError):  # another process has it, or just removed the folder
            return False
        finally:
            hidden.unlink(missing_ok=True)
        return True

    def _remove(self, path: Path, content: bytes) -> None:
        """Remove a claim, unless it is another one by now.

        Of all that want to remove the same claim, one may: while a second one moved what it no longer knows out of the
        way, a third could claim the thing besides its new owner.
        """
        removing = self._folder / f".{path.name}-{hashlib.sha256(content).hexdigest()[:16]}"
        with suppress(OSError):  # nobody removes it
            if self._stale(removing, removing.read_bytes()):
                removing.unlink()
        if not self._create(removing, self._signed()):
            return
        hidden = self._hidden()
        with suppress(OSError):
            if path.read_bytes() == content:
                path.rename(hidden)
                if hidden.read_bytes() != content:  # made in this moment: put it back
                    os.link(hidden, path)
        for mine in (hidden, removing):
            with suppress(OSError):
                mine.unlink()

    def _hidden(self) -> Path:
        return self._folder / f".{secrets.token_hex(8)}"

    def holders(self, names: Iterable[str]) -> list[str]:
        """Say who has claims on things, as `process 12 on node3`."""
        found = set()
        for name in names:
            with suppress(OSError, ValueError, KeyError, TypeError):
                owner = json.loads((self._folder / name).read_bytes())
                found.add(f"process {owner['process']} on {owner['host']}")
        return sorted(found)

    def _stale(self, path: Path, content: bytes) -> bool:
        with suppress(ValueError, KeyError, TypeError):  # one that names no owner: its age tells
            owner = json.loads(content)
            if processes.ended(owner["id"], owner["process"]):
                return True
        return abs(self._age_s(path)) > STALE_S  # one from the future is of a clock that was put back

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
                mine = list(self._mine.items())
            for name, content in mine:
                path = self._folder / name
                with suppress(OSError):
                    if path.read_bytes() == content:
                        os.utime(path)
