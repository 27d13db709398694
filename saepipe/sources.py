"""Where documents come from: files and folders, hub data sets through `datasets`, or the demo's corpus.

A document is a row of a data set, as text or as token ids; in a txt file, a paragraph between blank lines.
Local files are read here, row by row: `datasets` guesses types from the first rows, turns later ones into them without
a word (5 into "5"), and lets the names of files decide which of them it reads.
"""

import glob
import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import xxhash

from saepipe import hub
from saepipe.config import DataConfig
from saepipe.errors import UserError, unknown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

_OTHER_DATA = (".csv", ".tsv", ".gz", ".bz2", ".xz", ".zip", ".zst")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_DECIDING = ("path", "name", "split", "revision", "column", "context_size", "prepend_bos", "pack", "held_out")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

Document = str | list[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class Source:
    """Where documents come from. Opening it finds the data and the column, and reads the first document."""

    data: DataConfig
    seed: int
    """Decides each document's side, and is the seed of the demo's corpus."""
    values: Callable[[], Iterator[Any]]
    """Begins to read the column."""
    files: dict[str, int]
    """Local files -> bytes: other sizes are other data."""

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
        path = None if data.path == "demo" else hub.local(data.path)
        if path is None and data.path != "demo":
            source = cls(data, seed, partial(_column, _load_hub(data), data.column), {})
        else:
            for key in ("name", "revision"):
                if (value := getattr(data, key)) is not None:
                    raise UserError(
                        f"data.{key}={value} is for hub data sets, and data.path={data.path} is local; leave it out"
                    )
            source = cls._local(data, seed, path) if path else cls(data, seed, partial(_demo, data, seed), {})
        if next(source.documents(), None) is None:
            raise UserError(
                f"data.path={data.path} has no rows in data.split={data.split} that hold text; give other data"
            )
        return source

    @classmethod
    def _local(cls, data: DataConfig, seed: int, path: Path) -> "Source":
        """Open a file or folder in place, which leaves no copy in a cache."""
        with _reading(data):
            files = _data_files(data, path)
            root = path if path.is_dir() else path.parent  # two folders may each have a part-0.parquet
            sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
            if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                return cls(data, seed, partial(_column, _load_saved(data, path), data.column), sizes)
        return cls(data, seed, partial(_read, files, data), sizes)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the documents, under the names of the configuration."""
        values = {f"data.{key}": getattr(self.data, key) for key in _DECIDING}
        if self.files:
            values["data.path"] = str(hub.local(self.data.path))
        return {**values, "data.path (bytes of its files)": self.files, "store.seed": self.seed}

    def documents(self) -> Iterator[Document]:
        """Give every document that is not empty.

        Raises:
            UserError: The data cannot be read, or a row is neither text nor token ids, or not what those before are.
        """
        kind: type[Any] | None = None
        with _reading(self.data):
            for number, value in enumerate(self.values()):
                if value is None:
                    continue
                kind = kind or type(value)
                if not _is_document(value) or type(value) is not kind:
                    raise UserError(
                        f"data.column={self.data.column} holds {reprlib.repr(value)} ({type(value).__name__}) in row "
                        f"{number}, counted from 0; give a column with text in every row, or one with a list of token "
                        "ids (whole numbers) in every row"
                    )
                if value.strip() if isinstance(value, str) else value:
                    yield value

    def holds_out(self, document: Document) -> bool:
        """Tell a document's side; the same text is on the same side whatever the tokenizer."""
        content = document.encode() if isinstance(document, str) else np.asarray(document, "<i8").tobytes()
        return xxhash.xxh3_64_intdigest(content, self.seed % 2**64) < self.data.held_out * 2**64


def _is_document(value: object) -> TypeGuard[Document]:
    if isinstance(value, str):
        return value.isascii() or bool(value.encode())  # JSON can hold half a surrogate pair, which is no text
    return isinstance(value, list) and (
        not value or (set(map(type, value)) == {int} and np.asarray(value).dtype.kind == "i")  # no bool, none too large
    )


# ---- local files


def _data_files(data: DataConfig, path: Path) -> list[Path]:
    """List the data files at a path that are in the split; all files there are of one kind."""
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in _METADATA]
        files = [
            file for file in files if not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
        ]
    known = (*_READERS, *_OTHER_DATA)
    files = [file for file in files if file.suffix.lower() in known]
    kinds = sorted({file.suffix.lower() for file in files})
    if len({_READERS.get(kind) for kind in kinds}) > 1:
        raise UserError(f"data.path={data.path} holds files of several kinds ({', '.join(kinds)}); keep one kind in it")
    if not kinds or kinds[0] in _OTHER_DATA:
        raise UserError(f"data.path={data.path} holds no data that is known; give {', '.join(_READERS)} files")
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return files
    splits = {file: _split(file.relative_to(path)) for file in files}
    if data.split not in splits.values():
        raise unknown("data.split", data.split, sorted({*splits.values()}), "A file belongs to the split in its name.")
    chosen = [file for file, split in splits.items() if split == data.split]
    if len(chosen) < len(files):
        log.info("data.split=%s: %d of the %d files of data.path=%s", data.split, len(chosen), len(files), data.path)
    return chosen


def _split(name: Path) -> str:
    """Tell the split that a file in a folder is named after; any other, or one given by itself, is for training."""
    words = re.split("[^a-z]+", name.as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), "train")


def _read(files: list[Path], data: DataConfig) -> Iterator[Any]:
    """Give the column's value in every row of some files."""
    for file in files:
        with _reading(data, f" at {file.name}"):
            yield from _READERS[file.suffix.lower()](file, data.column)


def _paragraphs(file: Path, column: str) -> Iterator[str]:
    _check_column(column, ["text"])
    lines: list[str] = []
    with file.open(encoding="utf-8-sig") as content:
        for line in content:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).removesuffix("\n")
                lines = []
    if lines:
        yield "".join(lines).removesuffix("\n")


def _json(file: Path, column: str) -> Iterator[Any]:
    """Read one JSON value a line."""
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield _field(json.loads(line), column)


def _json_or_lines(file: Path, column: str) -> Iterator[Any]:
    """Read a JSON array of rows, or one row a line."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        yield from _json(file, column)
    else:
        yield from (_field(row, column) for row in (content if isinstance(content, list) else [content]))


def _field(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{reprlib.repr(row)} is no JSON object")
    _check_column(column, row)
    return row[column]


def _table(file: Path, column: str) -> Iterator[Any]:
    """Read a parquet or arrow file, by itself: together they would all be given the types of the first."""
    import datasets

    files = {"train": [glob.escape(str(file))]}
    yield from _column(
        datasets.load_dataset(file.suffix.lower()[1:], data_files=files, split="train", streaming=True), column
    )


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".parquet": _table,
    ".jsonl": _json,
    ".json": _json_or_lines,
    ".txt": _paragraphs,
    ".arrow": _table,
}


# ---- data sets


def _demo(data: DataConfig, seed: int) -> Iterator[str]:
    from saepipe.demo import corpus

    _check_column(data.column, ["text"])
    if data.split != "train":
        raise unknown("data.split", data.split, ["train"])
    yield from (document.text for document in corpus.documents(seed))


def _load_saved(data: DataConfig, path: Path) -> "Dataset":
    """Open what `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    splits = {"train": saved} if isinstance(saved, datasets.Dataset) else saved
    if data.split not in splits:
        raise unknown("data.split", data.split, splits)
    return splits[data.split]


def _load_hub(data: DataConfig) -> "Dataset | IterableDataset":
    """Load one split; the library's own message lists those that there are."""
    if Path(data.path).suffix in _READERS:
        raise UserError(f"data.path={data.path} does not exist; check the path")
    hub.check(data.path, "dataset", data.revision, key="data.path")
    import datasets

    options = {"name": data.name, "revision": data.revision, "streaming": data.streaming}
    with _reading(data, " with these data.name and data.revision"):
        try:
            return datasets.load_dataset(data.path, split=data.split, **options)
        except ValueError as error:
            if "split" not in str(error).lower():
                raise
            raise UserError(f"data.split={data.split} is not in data.path={data.path}: {hub.fault(error)}") from error


def _column(rows: "Dataset | IterableDataset", column: str) -> Iterator[Any]:
    """Give a column's values as plain Python ones, whatever format the data set was saved with."""
    names = rows.column_names or list(next(iter(rows), {}))  # a streamed one may know them from its rows only
    if not names:
        return
    _check_column(column, names)
    for batch in rows.with_format(None).select_columns([column]).iter(batch_size=64):
        yield from batch[column]


def _check_column(column: str, names: Iterable[str]) -> None:
    if column not in names:
        raise unknown("data.column", column, names)


@contextmanager
def _reading(data: DataConfig, where: str = "") -> Iterator[None]:
    """Put whatever a library raises on missing or damaged data into one sentence."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except ConnectionError as error:
        raise hub.out_of_reach(data.path, "dataset", hub.fault(error), key="data.path") from error
    except Exception as error:  # Arrow, JSON, Unicode, the hub and the disk each have kinds of their own
        raise UserError(f"data.path={data.path} cannot be read{where} ({hub.fault(error)}); give other data") from error
