"""The token store: what the language model reads, packed into contexts, on disk and memory-mapped.

- `plan.json`: what made it, and the number of contexts and the hash of every file
- `{train,heldout}.{ids,documents,special}`: raw arrays [contexts, context_size]; of chat data `roles`, too

It is immutable: the hash in plan.json is its identity. Text becomes ids in `saepipe.tokens`, and `saepipe.token_writer`
writes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from saepipe.durable import fits, read_sealed, seal, xxh3
from saepipe.errors import DamageError, UserError, unknown

FORMAT = 2
SIDES = ("train", "heldout")
ARRAYS = {"ids": "<i4", "documents": "<i4", "special": "|b1"}
"""Arrays of each side -> their type on disk."""
CHAT_ARRAYS = ARRAYS | {"roles": "|u1"}
"""The same of chat data."""
_DOCUMENT = {
    "format": int,
    "context_size": int,
    "special_ids": list[int],
    "roles": list[str],
    "files": dict[str, Any],
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
    roles: UInt8[np.ndarray, "context seq"] | None = None
    """Number of the role that each token belongs to, an index of `role_names`; None where the data is no chat data."""
    role_names: tuple[str, ...] = ()
    """The roles: `template` for what the chat template writes, then those of the messages."""

    def __len__(self) -> int:
        """Return the number of contexts."""
        return len(self.ids)

    def ordinary(self, rows: Int64[np.ndarray, " token"]) -> Bool[np.ndarray, " token"]:
        """Return the `ordinary` mask of rows, each given as context * context_size + position."""
        return ordinary(self.special.reshape(-1)[rows], rows % self.ids.shape[1])

    def in_roles(self, rows: Int64[np.ndarray, " token"], names: Sequence[str]) -> Bool[np.ndarray, " token"]:
        """Tell which rows, each given as context * context_size + position, belong to one of some roles.

        Raises:
            UserError: The data is no chat data, or has no such role.
        """
        wanted = f"stream.roles=[{','.join(names)}]"
        if self.roles is None:
            raise UserError(
                f"{wanted} needs roles, and the store was made of data without them; cache another store.dir with "
                "data.chat_template, or leave stream.roles out"
            )
        for name in names:
            if name not in self.role_names:
                raise unknown("stream.roles", name, self.role_names, "Those are the roles of the store's messages.")
        return np.isin(self.roles.reshape(-1)[rows], [self.role_names.index(name) for name in names])

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
        """What made the store, as `TokenStoreWriter` was told."""
        self.role_names: list[str] = document["roles"]
        """What the numbers in `Side.roles` stand for, `template` first; empty where the data is no chat data."""
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
        document = _document(folder)
        for name, file in document["files"].items():
            _check_size(folder / name, file["contexts"] * document["context_size"] * _itemsize(name))
        return cls(folder, document, seal(document))

    def _side(self, side: str) -> Side:
        arrays = {}
        for name, kind in (CHAT_ARRAYS if self.role_names else ARRAYS).items():
            path = self.folder / f"{side}.{name}"
            contexts = self._files[path.name]["contexts"]
            shape = (contexts, self.context_size)
            # numpy maps no empty file
            arrays[name] = np.memmap(path, kind, "r", shape=shape) if contexts else np.empty(shape, kind)
        return Side(**arrays, role_names=tuple(self.role_names))

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            UserError: Names the damaged file and the cure.
        """
        for name, file in self._files.items():
            _check_hash(self.folder / name, file["xxh3"])


def faults(folder: Path, digest: str | None) -> Iterator[UserError]:
    """Read every byte of a token store and tell everything that is wrong with it, not only the first.

    Args:
        folder: Its folder.
        digest: Identity that it must have; None where that is not known.
    """
    try:
        document = _document(folder)
    except UserError as error:
        yield error
        return
    if digest not in (None, seal(document)):
        yield _damaged(folder / "plan.json", "describes other tokens than the store's")
        return
    for name, file in document["files"].items():
        try:
            _check_size(folder / name, file["contexts"] * document["context_size"] * _itemsize(name))
            _check_hash(folder / name, file["xxh3"])
        except DamageError as error:
            yield error


def _document(folder: Path) -> dict[str, Any]:
    """Read plan.json."""
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
    arrays = CHAT_ARRAYS if document.get("roles") else ARRAYS
    files = {f"{side}.{name}": {"contexts": int, "xxh3": str} for side in SIDES for name in arrays}
    if not fits(document, _DOCUMENT | {"files": files}):
        raise _damaged(folder / "plan.json", "does not describe tokens")
    return document


def _itemsize(name: str) -> int:
    """Return the size of a number in a file such as `train.ids`."""
    return np.dtype(CHAT_ARRAYS[name.split(".")[1]]).itemsize


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        raise _damaged(path, "is missing" if size is None else f"has {size} bytes instead of {expected}")


def _check_hash(path: Path, expected: str) -> None:
    try:
        sound = xxh3(path) == expected
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    if not sound:
        raise _damaged(path, "does not match its hash")


def _damaged(path: Path, what: str) -> DamageError:
    """Build the error for a damaged file."""
    return DamageError(path, what, _CURE.replace("that folder", str(path.parent)))
