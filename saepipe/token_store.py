"""The token store: what the language model reads, packed into contexts, on disk and memory-mapped.

- `plan.json`: what made it, and the number of contexts and the hash of every file
- `{train,heldout}.{ids,documents,special}`: raw arrays [contexts, context_size]

It is immutable: the hash in plan.json is its identity. Text becomes ids in `saepipe.tokens`.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, Int32, Int64

from saepipe.durable import commit, disk_errors, fits, read_sealed, remove_stale, seal, temporary, write_sealed, xxh3
from saepipe.errors import UserError

FORMAT = 1
SIDES = ("train", "heldout")
_ARRAYS = {"ids": "<i4", "documents": "<i4", "special": "|b1"}
_DOCUMENT = {
    "format": int,
    "context_size": int,
    "special_ids": list[int],
    "files": {f"{side}.{name}": {"contexts": int, "xxh3": str} for side in SIDES for name in _ARRAYS},
    "source": dict[str, Any],
}
_CURE = "delete that folder and run the same `python -m saepipe.cache` command again"


def ordinary(special: Bool[np.ndarray, "*rows"], position: Int64[np.ndarray, "*#rows"]) -> Bool[np.ndarray, "*rows"]:
    """Tell the tokens that metrics, sums and filters count: no special token, and not at position 0.

    Position 0 is left out whatever token stands there, since it is the attention sink: its activation is some hundred
    times as long as any other's.
    """
    return ~special & (position != 0)


@dataclass(frozen=True)
class Side:
    """The training or the held-out contexts of a token store, memory-mapped."""

    ids: Int32[np.ndarray, "context seq"]
    """Token ids."""
    documents: Int32[np.ndarray, "context seq"]
    """Number of the document that each token comes from."""
    special: Bool[np.ndarray, "context seq"]
    """Which tokens are special ones (beginning, end, padding ...)."""

    def __len__(self) -> int:
        """Return the number of contexts."""
        return len(self.ids)

    def ordinary(self, rows: Int64[np.ndarray, " token"]) -> Bool[np.ndarray, " token"]:
        """Return the `ordinary` mask of rows, each given as context * context_size + position."""
        return ordinary(self.special.reshape(-1)[rows], rows % self.ids.shape[1])

    def ordinary_contexts(self, start: int, stop: int) -> Bool[np.ndarray, "context seq"]:
        """Return the `ordinary` mask of the contexts from `start` to before `stop`."""
        return ordinary(np.asarray(self.special[start:stop]), np.arange(self.ids.shape[1]))


class TokenStore:
    """A token store, open for reading."""

    def __init__(self, folder: Path, document: dict[str, Any], digest: str) -> None:
        """Map the files that `document` (plan.json) lists; use `open`."""
        self.folder = folder
        self.hash = digest
        """Identity of the store: the sha256 of its plan.json."""
        self.context_size: int = document["context_size"]
        self.special_ids: list[int] = document["special_ids"]
        self.source: dict[str, Any] = document["source"]
        """What made the store, as `TokenStoreWriter.finish` was told."""
        self._files: dict[str, dict[str, Any]] = document["files"]
        self.train = self._side("train")
        self.heldout = self._side("heldout")

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Open a token store; checks the size of its files (`verify` checks their content).

        Raises:
            UserError: There is none, it is of another format, or a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            document = read_sealed(folder / "plan.json", cure=_CURE)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"there are no tokens in {folder}; make them with `python -m saepipe.cache store.dir={folder.parent}`"
            ) from None
        if document.get("format") != FORMAT:
            raise UserError(
                f"{folder} was written by another version of saepipe (format {document.get('format')}, and this one "
                f"reads {FORMAT}); use that version, or another store.dir"
            )
        if not fits(document, _DOCUMENT):
            raise _damaged(folder / "plan.json", "does not describe tokens")
        return cls(folder, document, seal(document))

    def _side(self, side: str) -> Side:
        arrays = {}
        for name, kind in _ARRAYS.items():
            path = self.folder / f"{side}.{name}"
            contexts = self._files[path.name]["contexts"]
            expected = contexts * self.context_size * np.dtype(kind).itemsize
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                raise _damaged(path, "is missing" if size is None else f"has {size} bytes instead of {expected}")
            shape = (contexts, self.context_size)
            # numpy maps no empty file
            arrays[name] = np.memmap(path, kind, "r", shape=shape) if contexts else np.empty(shape, kind)
        return Side(**arrays)

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            UserError: Names the damaged file and the cure.
        """
        for name, file in self._files.items():
            path = self.folder / name
            try:
                sound = xxh3(path) == file["xxh3"]
            except OSError as error:
                raise _damaged(path, f"cannot be read ({error.strerror})") from None
            if not sound:
                raise _damaged(path, "does not match its hash")


class TokenStoreWriter:
    """Writes a token store as contexts come; a context manager that leaves no files where it does not finish."""

    def __init__(self, folder: str | Path, *, context_size: int) -> None:
        """Open the temporary files.

        Args:
            folder: Folder of the token store; made where it does not exist. The caller holds the store's lock.
            context_size: Tokens per context.
        """
        self._folder = Path(folder)
        self._context_size = context_size
        self._contexts = dict.fromkeys(SIDES, 0)
        self._files: dict[str, BinaryIO] = {}
        self._cleanup = ExitStack()
        with disk_errors("store.dir", self._folder.parent):
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_stale(self._folder)  # what a killed run left may be all the space there was
            if (self._folder / "plan.json").exists():
                raise UserError(f"{self._folder} holds a token store already; open it, or choose another store.dir")
            for name in (f"{side}.{array}" for side in SIDES for array in _ARRAYS):
                path = temporary(self._folder / name)
                self._cleanup.callback(path.unlink, missing_ok=True)
                self._files[name] = self._cleanup.enter_context(path.open("xb"))

    def __enter__(self) -> "TokenStoreWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, and delete those that did not get their final name."""
        with disk_errors("store.dir", self._folder.parent):
            self._cleanup.close()

    def contexts(self, side: str) -> int:
        """Return how many contexts a side (`train` or `heldout`) has so far."""
        return self._contexts[side]

    def append(
        self,
        side: str,
        ids: Int32[np.ndarray, "context seq"],
        documents: Int32[np.ndarray, "context seq"],
        special: Bool[np.ndarray, "context seq"],
    ) -> None:
        """Append contexts to a side (`train` or `heldout`)."""
        assert ids.shape[1] == self._context_size
        arrays = {"ids": ids, "documents": documents, "special": special}
        with disk_errors("store.dir", self._folder.parent):
            for name, kind in _ARRAYS.items():
                self._files[f"{side}.{name}"].write(np.ascontiguousarray(arrays[name], kind).data)
        self._contexts[side] += len(ids)

    def finish(self, *, source: dict[str, Any], special_ids: list[int]) -> TokenStore:
        """Give the files their final names, plan.json last, and open the store.

        Args:
            source: What made the store (JSON values): data configuration, tokenizer identity, seed ...
            special_ids: Ids of the special tokens.
        """
        files = {}
        with disk_errors("store.dir", self._folder.parent):
            for name, file in self._files.items():
                commit(file, self._folder / name)
                contexts = self._contexts[name.split(".")[0]]
                files[name] = {"contexts": contexts, "xxh3": xxh3(self._folder / name)}
            document = {
                "format": FORMAT,
                "context_size": self._context_size,
                "special_ids": sorted(special_ids),
                "files": files,
                "source": source,
            }
            write_sealed(self._folder / "plan.json", document)
        return TokenStore.open(self._folder)


def _damaged(path: Path, what: str) -> UserError:
    """Build the error for a damaged file."""
    return UserError(f"{path} {what}; {_CURE.replace('that folder', str(path.parent))}")
