"""Where documents come from: files and folders, hub data sets through `datasets`, or the demo's corpus.

A document is a row of a data set, as text, as token ids or as a conversation; in a txt file, a paragraph between blank
lines.
"""

import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import xxhash

from saepipe import conversations, data_files, hub
from saepipe.config import DataConfig
from saepipe.conversations import Conversation
from saepipe.data_files import reading
from saepipe.errors import UserError, unknown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_DECIDING = (
    "path",
    "name",
    "split",
    "revision",
    "column",
    "chat_template",
    "context_size",
    "prepend_bos",
    "pack",
    "held_out",
)

Document = str | list[int] | Conversation
"""Text, token ids, or messages."""


@dataclass(frozen=True)
class Source:
    """Where documents come from. Opening it finds the data and the column, and reads the first document."""

    data: DataConfig
    seed: int
    """Decides each document's side, and is the seed of the demo's corpus."""
    values: Callable[[int], Iterator[Any]]
    """Begins to read the column, at a row."""
    files: dict[str, int]
    """Local files -> bytes: other sizes are other data."""
    commit: str | None = None
    """Commit that a hub data set was at when it was opened; None where the hub was not asked."""
    kind: type[Any] | None = None
    """What the first document is: all are of its kind."""

    @classmethod
    def open(cls, data: DataConfig, *, seed: int) -> "Source":
        """Find the data.

        Args:
            data: The data group of the configuration.
            seed: `store.seed`.

        Raises:
            UserError: Data, split or column is missing, out of reach or of another type.
        """
        if not data.path:
            raise UserError("data.path is empty; give a hub id, a local file or folder, or 'demo'")
        if data.chat_template not in (None, "default") and not Path(data.chat_template).expanduser().is_file():
            raise UserError(
                f"data.chat_template={data.chat_template} is no file; give 'default' for the tokenizer's own template, "
                "or the path of a jinja file"
            )
        path = None if data.path == "demo" else hub.local(data.path)
        if path is None and data.path != "demo":
            rows, commit = _load_hub(data)
            source = cls(data, seed, partial(data_files.values, rows, data.column), {}, commit)
        else:
            for key in ("name", "revision"):
                if (value := getattr(data, key)) is not None:
                    raise UserError(
                        f"data.{key}={value} is for hub data sets, and data.path={data.path} is local; leave it out"
                    )
            source = cls._local(data, seed, path) if path else cls(data, seed, partial(_demo, data, seed), {})
        _, first = next(source.documents(), (0, None))
        if first is None:
            raise UserError(
                f"data.path={data.path} has no rows in data.split={data.split} that hold text; give other data"
            )
        return replace(source, kind=type(first))

    @classmethod
    def _local(cls, data: DataConfig, seed: int, path: Path) -> "Source":
        """Open a file or folder in place, which leaves no copy in a cache."""
        with reading(data):
            files = data_files.find(data, path)
            root = path if path.is_dir() else path.parent  # two folders may each have a part-0.parquet
            sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
            if data_files.is_saved(path):
                return cls(data, seed, partial(data_files.values, _load_saved(data, path), data.column), sizes)
        return cls(data, seed, partial(data_files.read, files, data), sizes)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the documents, under the names of the configuration."""
        values = {f"data.{key}": getattr(self.data, key) for key in _DECIDING}
        if self.files:
            values["data.path"] = str(hub.local(self.data.path))
        if self.data.chat_template not in (None, "default"):
            values["data.chat_template"] = str(hub.local(self.data.chat_template))
        return {**values, "data.path (bytes of its files)": self.files, "store.seed": self.seed}

    def documents(self, first: int = 0) -> Iterator[tuple[int, Document]]:
        """Give every document that is not empty, with the number of its row.

        Args:
            first: Row to begin at, counted from 0.

        Raises:
            UserError: The data cannot be read, or a row is neither text nor token ids, or not what those before are.
        """
        kind = self.kind
        with reading(self.data):
            for row, value in enumerate(self.values(first), first):
                if value is None:
                    continue
                if self.data.chat_template is not None:
                    value = conversations.parse(value, f"data.column={self.data.column}, row {row} (counted from 0)")
                kind = kind or type(value)
                if not _is_document(value) or type(value) is not kind:
                    raise UserError(
                        f"data.column={self.data.column} holds {reprlib.repr(value)} ({type(value).__name__}) in row "
                        f"{row}, counted from 0; give a column with text in every row, or one with a list of token "
                        "ids (whole numbers) in every row"
                    )
                if value.strip() if isinstance(value, str) else value:
                    yield row, value

    def holds_out(self, document: Document) -> bool:
        """Tell a document's side; the same text is on the same side whatever the tokenizer."""
        content: bytes
        if isinstance(document, tuple):
            content = conversations.canonical(document)
        else:
            content = document.encode() if isinstance(document, str) else np.asarray(document, "<i8").tobytes()
        return xxhash.xxh3_64_intdigest(content, self.seed % 2**64) < self.data.held_out * 2**64


def _is_document(value: object) -> TypeGuard[Document]:
    if isinstance(value, tuple):  # a conversation; data has no tuples
        return True
    if isinstance(value, str):
        return value.isascii() or bool(value.encode())  # JSON can hold half a surrogate pair, which is no text
    return isinstance(value, list) and (
        not value or (set(map(type, value)) == {int} and np.asarray(value).dtype.kind == "i")  # no bool, none too large
    )


# ---- data sets


def _demo(data: DataConfig, seed: int, first: int = 0) -> Iterator[str]:
    from saepipe.demo import corpus

    data_files.check_column(data.column, ["text"])
    if data.split != "train":
        raise unknown("data.split", data.split, ["train"])
    yield from (document.text for document in corpus.documents(seed, first))


def _load_saved(data: DataConfig, path: Path) -> "Dataset":
    """Open what `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    splits = {"train": saved} if isinstance(saved, datasets.Dataset) else saved
    if data.split not in splits:
        raise unknown("data.split", data.split, splits)
    return splits[data.split]


def _load_hub(data: DataConfig) -> "tuple[Dataset | IterableDataset, str | None]":
    """Load one split, and tell its commit; the library's own message lists those that there are."""
    if Path(data.path).suffix in data_files.KINDS:
        raise UserError(f"data.path={data.path} does not exist; check the path")
    commit = hub.check(data.path, "dataset", data.revision, key="data.path")
    import datasets

    options = {"name": data.name, "revision": data.revision, "streaming": data.streaming}
    with reading(data, " with these data.name and data.revision"):
        try:
            return datasets.load_dataset(data.path, split=data.split, **options), commit
        except ValueError as error:
            if "split" not in str(error).lower():
                raise
            raise UserError(f"data.split={data.split} is not in data.path={data.path}: {hub.fault(error)}") from error
