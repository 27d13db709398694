"""Writes a token store; a writer that is killed at any moment is gone on with where it last saved.

The files grow in `partial/`. Saving makes them durable and then writes `partial/progress.json`: their sizes and hashes,
and what the caller needs to go on. The next writer cuts them to those sizes. `plan.json` is written last.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash
from jaxtyping import Bool, Int32, UInt8

from saepipe.durable import commit, disk_errors, fits, read_sealed, remove_stale, write_sealed
from saepipe.errors import UserError
from saepipe.token_store import ARRAYS, CHAT_ARRAYS, FORMAT, SIDES, TokenStore

log = logging.getLogger(__name__)

_PARTIAL = "partial"
_CHUNK_BYTES = 1 << 22


class TokenStoreWriter:
    """Writes a token store as contexts come; a context manager.

    Where it does not finish, what was saved stays for the next writer, and without a `save` no file stays.
    """

    state: Any = None
    """What `save` was last told by the writer before this one; None where this one begins anew."""

    def __init__(
        self,
        folder: str | Path,
        *,
        context_size: int,
        source: dict[str, Any],
        revision: str | None = None,
        with_roles: bool = False,
    ) -> None:
        """Go on with what an earlier writer saved for the same source, or begin.

        Args:
            folder: Folder of the token store; made where it does not exist. The caller holds the store's lock.
            context_size: Tokens per context.
            source: What makes the store (JSON values): data configuration, tokenizer identity, seed ...
            revision: What data that may change is at now; going on needs the same, opening a finished store does not.
            with_roles: Each token has a role.

        Raises:
            UserError: There is a token store already, or the disk is full or forbidden.
        """
        self._folder = Path(folder)
        self._partial = self._folder / _PARTIAL
        self._context_size = context_size
        self._source: dict[str, Any] = json.loads(json.dumps(source))
        self._revision = revision
        self._files: dict[str, BinaryIO] = {}
        self._kinds = CHAT_ARRAYS if with_roles else ARRAYS
        self._hashes = {name: xxhash.xxh3_64() for name in self._names}
        self._cleanup = ExitStack()
        self._keep = True
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @property
    def _names(self) -> list[str]:
        return [f"{side}.{array}" for side in SIDES for array in self._kinds]

    # ---- beginning and going on

    def _open(self) -> None:
        with disk_errors("store.dir", self._folder.parent):
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_stale(self._folder)  # what a killed run left may be all the space there was
            if (self._folder / "plan.json").exists():
                raise UserError(f"{self._folder} holds a token store already; open it, or choose another store.dir")
            try:
                if self._go_on():
                    return
            except _UnusableError as error:
                log.warning("store.dir=%s: %s, so tokenising starts over", self._folder.parent, error)
            self._begin()

    def _begin(self) -> None:
        """Throw away what is there, and open empty files."""
        self._keep = False
        self._cleanup.close()
        self._discard()
        self._partial.mkdir()
        self._hashes = {name: xxhash.xxh3_64() for name in self._names}
        for name in self._names:
            self._files[name] = self._cleanup.enter_context((self._partial / name).open("xb"))

    def _go_on(self) -> bool:
        """Open what an earlier writer saved, cut to what was saved; says whether there is something.

        Raises:
            _UnusableError: There is, but it is of another source or damaged.
        """
        record = self._record()
        if record is None:
            return False
        for name, saved in record["files"].items():
            path = self._partial / name
            if not path.exists() and (self._folder / name).exists():  # killed while it gave the final names
                (self._folder / name).replace(path)
            try:
                self._files[name] = self._cleanup.enter_context(path.open("r+b"))
            except FileNotFoundError:
                raise _UnusableError(f"{path} is missing") from None
            for chunk in _read(self._files[name], saved["bytes"]):
                self._hashes[name].update(chunk)
            if self._files[name].tell() != saved["bytes"] or self._hashes[name].hexdigest() != saved["xxh3"]:
                raise _UnusableError(f"{path} is damaged")
        for file in self._files.values():
            file.seek(file.tell())  # from reading to writing
            file.truncate()
        self.state = record["state"]
        return True

    def _record(self) -> dict[str, Any] | None:
        """Read progress.json, where there is one."""
        path = self._partial / "progress.json"
        try:
            record = read_sealed(path, cure="")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UserError as error:
            raise _UnusableError(str(error).partition(";")[0]) from None
        kinds: dict[str, Any] = {
            "format": int,
            "context_size": int,
            "source": dict[str, Any],
            "revision": Any,
            "state": Any,
        }
        kinds["files"] = {name: {"bytes": int, "xxh3": str} for name in self._names}
        if record.get("format") != FORMAT or not fits(record, kinds):
            raise _UnusableError(f"{path} is of another version of saepipe")
        if (record["context_size"], record["source"]) != (self._context_size, self._source):
            changed = [key for key, value in self._source.items() if record["source"].get(key) != value]
            raise _UnusableError(f"what an earlier run left is of another plan ({', '.join(changed)} differs)")
        if record["revision"] != self._revision:
            raise _UnusableError("the data has changed since an earlier run")
        return record

    # ---- writing

    def __enter__(self) -> "TokenStoreWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, and delete them where nothing was saved."""
        with disk_errors("store.dir", self._folder.parent):
            try:
                self._cleanup.close()
            finally:
                if not self._keep:
                    self._discard()

    def _discard(self) -> None:
        """Delete all files of a store that is not finished."""
        discard_partial(self._folder)
        if not (self._folder / "plan.json").exists():
            for name in (f"{side}.{array}" for side in SIDES for array in CHAT_ARRAYS):
                (self._folder / name).unlink(missing_ok=True)

    def contexts(self, side: str) -> int:
        """Return how many contexts a side (`train` or `heldout`) has so far."""
        return self._files[f"{side}.ids"].tell() // (self._context_size * np.dtype(ARRAYS["ids"]).itemsize)

    def append(
        self,
        side: str,
        ids: Int32[np.ndarray, "context seq"],
        documents: Int32[np.ndarray, "context seq"],
        special: Bool[np.ndarray, "context seq"],
        roles: UInt8[np.ndarray, "context seq"] | None = None,
    ) -> None:
        """Append contexts to a side (`train` or `heldout`)."""
        assert ids.shape[1] == self._context_size
        arrays = {"ids": ids, "documents": documents, "special": special}
        if roles is not None:
            arrays["roles"] = roles
        assert arrays.keys() == self._kinds.keys()
        with disk_errors("store.dir", self._folder.parent):
            for name, values in arrays.items():
                content = np.ascontiguousarray(values, self._kinds[name]).data
                self._files[f"{side}.{name}"].write(content)
                self._hashes[f"{side}.{name}"].update(content)

    def save(self, state: Any) -> None:
        """Make what was appended durable, so that the next writer can go on from here.

        Args:
            state: What the caller needs to go on (JSON values).
        """
        with disk_errors("store.dir", self._folder.parent):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            record = {
                "format": FORMAT,
                "context_size": self._context_size,
                "source": self._source,
                "revision": self._revision,
                "files": {
                    name: {"bytes": file.tell(), "xxh3": self._hashes[name].hexdigest()}
                    for name, file in self._files.items()
                },
                "state": state,
            }
            write_sealed(self._partial / "progress.json", record)
        self._keep = True

    def forget(self) -> None:
        """Leave nothing for the next writer, where going on could only end in the same error."""
        self._keep = False

    def finish(self, *, special_ids: list[int], roles: Sequence[str] = ()) -> TokenStore:
        """Give the files their final names, plan.json last, and open the store.

        Args:
            special_ids: Ids of the special tokens.
            roles: Names of the roles, where tokens have one.
        """
        with disk_errors("store.dir", self._folder.parent):
            contexts = {side: self.contexts(side) for side in SIDES}
            for name, file in self._files.items():
                commit(file, self._folder / name)
            files = {
                name: {"contexts": contexts[name.split(".")[0]], "xxh3": digest.hexdigest()}
                for name, digest in self._hashes.items()
            }
            document = {
                "format": FORMAT,
                "context_size": self._context_size,
                "special_ids": sorted(special_ids),
                "roles": list(roles),
                "files": files,
                "source": self._source,
            }
            write_sealed(self._folder / "plan.json", document)
            discard_partial(self._folder)
        return TokenStore.open(self._folder)


def discard_partial(folder: Path) -> None:
    """Delete what a writer leaves for the next one."""
    if (folder / _PARTIAL).exists():
        shutil.rmtree(folder / _PARTIAL)


class _UnusableError(Exception):
    """What an earlier writer left cannot be gone on with; says why."""


def _read(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Read a file up to a size, or to its end."""
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        size -= len(chunk)
        yield chunk
