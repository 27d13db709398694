"""Files that are whole or absent, and JSON documents that carry their own hash.

Everything that must survive SIGKILL, a full disk or a power cut is written here: to a temporary name in the same
folder (so that the rename cannot cross file systems), fsynced, renamed, and the folder fsynced.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin

import xxhash

from saepipe import processes
from saepipe.errors import DamageError, UserError

_TEMPORARY = re.compile(r"^\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp$")
_STALE_S = 3600
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_REFUSED = tuple(
    getattr(errno, name) for name in "EACCES EPERM EROFS ENOTDIR EEXIST EISDIR ENAMETOOLONG ELOOP EINVAL".split()
)


def temporary(path: Path) -> Path:
    """Return a name beside `path` that no other process uses and that tells `remove_stale` whose it is."""
    owner = f"{processes.host()}-{os.getpid()}"
    return path.with_name(f".{path.name}.{owner}-{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Tell whether a path has a name that `temporary` gave."""
    return _TEMPORARY.match(path.name) is not None


def remove_stale(folder: Path) -> int:
    """Delete the temporary files that killed processes left anywhere below `folder`.

    Other processes may be at work there: a file goes when its owner has ended, or where nobody can tell (it was on
    another machine), when it has been left alone for an hour.

    Returns:
        How many there were.
    """
    stale = [path for path in files_below(folder) if is_temporary(path) and _left_behind(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def files_below(folder: Path) -> Iterator[Path]:
    """Go through the files below a folder; others may remove some meanwhile, which `rglob` does not bear."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def _left_behind(path: Path) -> bool:
    owner = _TEMPORARY.match(path.name)
    assert owner is not None
    try:
        untouched_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its owner is done with it
        return False
    return processes.ended(owner[1], int(owner[2])) or untouched_s > _STALE_S


def commit(file: BinaryIO, path: Path) -> None:
    """Make the open temporary `file` durable, close it, and give it its final name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(path)
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder; there the rename alone has to do
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: Final name; its folder is made where it does not exist.
    """
    hidden = temporary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hidden.open("xb") as file:
            yield file
            commit(file, path)
    finally:
        hidden.unlink(missing_ok=True)


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a file through `save`, which is given the open file."""
    with replacing(path) as file:
        save(file)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    write(path, lambda file: file.write(text.encode()))


def copy_folder(source: Path, target: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Copy a folder's files; the first that cannot be copied ends it, where shutil would list all of them.

    Args:
        source: What to copy.
        target: Where to; files that are there are written anew.
        leave_out: Patterns of names, of files and folders, that stay behind.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if any(path.match(pattern) for pattern in leave_out):
            continue
        if path.is_dir():
            copy_folder(path, target / path.name, leave_out=leave_out)
        else:
            shutil.copy2(path, target / path.name)


@contextmanager
def disk_errors(key: str, folder: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into a `UserError` that names `key`, `folder` and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
            free_mb = shutil.disk_usage(existing).free / 1e6
            raise UserError(
                f"{key}={folder} has no space left on its disk ({free_mb:.1f} MB free); free some, then run the same "
                f"command again to go on, or choose another {key}"
            ) from error
        # The kernel's own file systems, such as /proc, say of a new folder that it is not there
        if error.errno in _REFUSED or (error.errno == errno.ENOENT and not folder.exists()):
            raise UserError(
                f"{key}={folder} cannot be written ({error.strerror}: {error.filename}); choose a folder of your own"
            ) from error
        raise


def xxh3(path: Path) -> str:
    """Return the xxh3 (64 bit, hexadecimal) of a file's bytes."""
    state = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def seal(document: dict[str, Any]) -> str:
    """Return the sha256 of a JSON document in its canonical form: sorted keys, no spaces, ASCII."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_sealed(path: Path, document: dict[str, Any]) -> str:
    """Write a JSON document with its own hash under `sha256`.

    Returns:
        The hash.
    """
    digest = seal(document)
    write(path, lambda file: file.write(_rendered(document, digest)))
    return digest


def _rendered(document: dict[str, Any], digest: str) -> bytes:
    text = json.dumps({**document, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False)
    return f"{text}\n".encode()


def read_sealed(path: Path, *, cure: str) -> dict[str, Any]:
    """Read a document that `write_sealed` wrote, without its `sha256`.

    Raises:
        FileNotFoundError: There is no such file.
        DamageError: The file cannot be read, or its content does not match its hash; the sentence ends in `cure`.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise DamageError(
            path, f"cannot be read ({error.strerror})", "check the disk and the file's permissions"
        ) from None
    try:
        document: dict[str, Any] = json.loads(content)
        digest = document.pop("sha256")
        damaged = digest != seal(document) or content != _rendered(document, digest)  # not even a space may differ
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        damaged = True
    if damaged:
        raise DamageError(path, "is damaged (its content does not match its own hash)", cure)
    return document


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a JSON value has the expected structure.

    Args:
        value: What the file gave.
        kind: A type such as `int`, `list[str]`, `dict[str, int]` or `Any`, or a dict of exactly the keys that the value
            has to have, each with the kind of its item.
    """
    if isinstance(kind, dict):
        same = isinstance(value, dict) and value.keys() == kind.keys()
        return same and all(fits(value[key], kind[key]) for key in kind)
    container = get_origin(kind)
    if container is None:
        return kind is Any or type(value) is kind  # a bool is no int
    items = value.values() if isinstance(value, dict) else value
    return type(value) is container and all(fits(item, get_args(kind)[-1]) for item in items)
