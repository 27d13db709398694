"""Where documents come from: files, folders and hub data sets through `datasets`, or the demo's corpus.

A document is a row of a data set, as text or as token ids; in a txt file, a paragraph between blank lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from saepipe import hub
from saepipe.config import DataConfig
from saepipe.errors import UserError, unknown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".arrow": "arrow"}
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_DECIDING = ("path", "name", "split", "revision", "column", "context_size", "prepend_bos", "pack", "held_out")

Document = str | list[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class Source:
    """Where documents come from. Opening it finds the data and the column, and reads hardly more than that."""

    data: DataConfig
    seed: int
    """Decides each document's side, and is the seed of the demo's corpus."""
    rows: "Dataset | IterableDataset | None"
    """The data set; None is the demo's corpus."""
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
        if data.path == "demo":
            return cls(data, seed, None, {})
        path = hub.local(data.path)
        if path is None:
            if Path(data.path).suffix in _BUILDERS:
                raise UserError(f"data.path={data.path} does not exist; check the path")
            hub.check(data.path, "dataset", data.revision, key="data.path")
            return cls(data, seed, _checked(_load_hub(data), data), {})
        files = _data_files(data, path)
        root = path if path.is_dir() else path.parent  # two folders may each have a part-0.parquet
        sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
        return cls(data, seed, _checked(_load_local(data, path), data), sizes)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the documents, under the names of the configuration."""
        values = {f"data.{key}": getattr(self.data, key) for key in _DECIDING}
        if self.files:
            values["data.path"] = str(hub.local(self.data.path))
        return {**values, "data.path (bytes of its files)": self.files, "store.seed": self.seed}

    def documents(self) -> Iterator[Document]:
        """Give every document that is not empty."""
        if self.rows is None:
            from saepipe.demo import corpus

            yield from (document.text for document in corpus.documents(self.seed))
            return
        column = self.data.column
        try:
            for batch in self.rows.select_columns([column]).iter(batch_size=64):
                yield from (row for row in batch[column] if row and (not isinstance(row, str) or row.strip()))
        except _reading_errors() as error:
            raise _unreadable(self.data, error) from error

    def holds_out(self, document: Document) -> bool:
        """Tell a document's side; the same text is on the same side whatever the tokenizer."""
        content = document.encode() if isinstance(document, str) else np.asarray(document, "<i8").tobytes()
        return xxhash.xxh3_64_intdigest(content, self.seed % 2**64) < self.data.held_out * 2**64


def _data_files(data: DataConfig, path: Path) -> list[Path]:
    """List the data files at a path; all are of one kind."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.name not in _METADATA)
    files = [file for file in files if file.suffix in _BUILDERS and file.is_file()]
    kinds = sorted({file.suffix for file in files})
    if not kinds:
        raise UserError(f"data.path={data.path} holds no data that is known; give {', '.join(_BUILDERS)} files")
    if len({_BUILDERS[kind] for kind in kinds}) > 1:
        raise UserError(f"data.path={data.path} holds files of several kinds ({', '.join(kinds)}); keep one kind in it")
    return files


def _load_local(data: DataConfig, path: Path) -> "Dataset | IterableDataset":
    """Open a file or folder in place: reading as a stream starts at once and leaves no copy in a cache."""
    import datasets

    if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved
        if data.split not in saved:
            raise unknown("data.split", data.split, saved)
        return saved[data.split]
    options: dict[str, Any] = {"streaming": True}
    if path.is_file():
        name, options["data_files"] = _BUILDERS[path.suffix], str(path)
    else:
        name, options["name"] = str(path), data.name
    if path.suffix == ".txt" or (path.is_dir() and any(path.rglob("*.txt"))):
        options["sample_by"] = "paragraph"
    return _of_split(data, name, options)


def _load_hub(data: DataConfig) -> "Dataset | IterableDataset":
    return _of_split(data, data.path, {"name": data.name, "revision": data.revision, "streaming": data.streaming})


def _of_split(data: DataConfig, name: str, options: dict[str, Any]) -> "Dataset | IterableDataset":
    """Load one split; the library's own message lists those that there are."""
    import datasets

    try:
        return datasets.load_dataset(name, split=data.split, **options)
    except ConnectionError as error:
        raise hub.out_of_reach(data.path, "dataset", hub.fault(error), key="data.path") from error
    except _reading_errors() as error:
        if "split" in str(error).lower():
            raise UserError(f"data.split={data.split} is not in data.path={data.path}: {hub.fault(error)}") from error
        raise _unreadable(data, error) from error


def _checked(rows: "Dataset | IterableDataset", data: DataConfig) -> "Dataset | IterableDataset":
    """Refuse a column that is not there, or holds neither text nor token ids."""
    try:
        peek = list(islice(rows, 100))
    except _reading_errors() as error:
        raise _unreadable(data, error) from error
    if not peek:
        raise UserError(f"data.path={data.path} has no rows in data.split={data.split}; give other data")
    if data.column not in peek[0]:
        raise unknown("data.column", data.column, peek[0])
    value = next((row[data.column] for row in peek if row[data.column]), "")
    if not (isinstance(value, str) or (isinstance(value, list) and isinstance(value[0], int))):
        raise UserError(
            f"data.column={data.column} holds values of type {type(value).__name__}, neither text nor lists of token "
            f"ids; the columns are {', '.join(peek[0])}"
        )
    return rows


def _reading_errors() -> tuple[type[Exception], ...]:
    """What reading data can raise; Arrow's, JSON's and Unicode's errors are `ValueError`s, the hub's `OSError`s."""
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, KeyError, DatasetsError)


def _unreadable(data: DataConfig, error: Exception) -> UserError:
    return UserError(
        f"data.path={data.path} cannot be read ({hub.fault(error)}); check the data, data.name and data.revision"
    )
