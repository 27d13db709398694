"""Local files with documents: which of them a path means, and the value of a column in every row.

Files are read here, row by row: `datasets` guesses types from the first rows, turns later ones into them without a word
(5 into "5"), and lets the names of files decide which of them it reads.
"""

import glob
import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saepipe import hub
from saepipe.config import DataConfig
from saepipe.errors import UserError, unknown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

_OTHER_DATA = (".csv", ".tsv", ".gz", ".bz2", ".xz", ".zip", ".zst")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def find(data: DataConfig, path: Path) -> list[Path]:
    """List the data files at a path that are in the split; all files there are of one kind.

    Raises:
        UserError: There are none, none of the split, or some of several kinds.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in _METADATA]
        files = [
            file for file in files if not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
        ]
    known = (*KINDS, *_OTHER_DATA)
    files = [file for file in files if file.suffix.lower() in known]
    kinds = sorted({file.suffix.lower() for file in files})
    if len({KINDS.get(kind) for kind in kinds}) > 1:
        raise UserError(f"data.path={data.path} holds files of several kinds ({', '.join(kinds)}); keep one kind in it")
    if not kinds or kinds[0] in _OTHER_DATA:
        raise UserError(f"data.path={data.path} holds no data that is known; give {', '.join(KINDS)} files")
    if is_saved(path):
        return files
    splits = {file: _split(file.relative_to(path)) for file in files}
    if data.split not in splits.values():
        raise unknown("data.split", data.split, sorted({*splits.values()}), "A file belongs to the split in its name.")
    chosen = [file for file, split in splits.items() if split == data.split]
    if len(chosen) < len(files):
        log.info("data.split=%s: %d of the %d files of data.path=%s", data.split, len(chosen), len(files), data.path)
    return chosen


def is_saved(path: Path) -> bool:
    """Tell whether a folder is one that `save_to_disk` of `datasets` wrote."""
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _split(name: Path) -> str:
    """Tell the split that a file in a folder is named after; any other, or one given by itself, is for training."""
    words = re.split("[^a-z]+", name.as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), "train")


def read(files: list[Path], data: DataConfig, first: int = 0) -> Iterator[Any]:
    """Give the column's value in every row of some files.

    Args:
        files: What `find` gave.
        data: Names the column.
        first: Rows to skip, over all files; they are counted, not decoded.
    """
    number = 0
    for file in files:
        kind = KINDS[file.suffix.lower()]
        with reading(data, f" at {file.name}"):
            for row in kind.rows(file, data.column):
                if number >= first:
                    yield kind.value(row, data.column)
                number += 1


def _paragraphs(file: Path, column: str) -> Iterator[str]:
    check_column(column, ["text"])
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


def _lines(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from (line for line in lines if line.strip())


def _json_or_lines(file: Path, column: str) -> Iterator[Any]:
    """Read a JSON array of rows, or one row a line."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        yield from map(json.loads, _lines(file, column))
    else:
        yield from content if isinstance(content, list) else [content]


def _table(file: Path, column: str) -> Iterator[Any]:
    """Read a parquet or arrow file, by itself: together they would all be given the types of the first."""
    import datasets

    files = {"train": [glob.escape(str(file))]}
    yield from values(
        datasets.load_dataset(file.suffix.lower()[1:], data_files=files, split="train", streaming=True), column
    )


def _parsed(line: str, column: str) -> Any:
    return field(json.loads(line), column)


def field(row: Any, column: str) -> Any:
    """Give a column of a row that came as a JSON object.

    Raises:
        UserError: It has no such column.
        ValueError: It is no object.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{reprlib.repr(row)} is no JSON object")
    check_column(column, row)
    return row[column]


def _itself(row: Any, column: str) -> Any:
    return row


class _Kind(NamedTuple):
    """How a kind of file is read, in two steps so that rows can be skipped at the cost of the first."""

    rows: Callable[[Path, str], Iterator[Any]]
    value: Callable[[Any, str], Any]


KINDS = {
    ".parquet": _Kind(_table, _itself),
    ".jsonl": _Kind(_lines, _parsed),
    ".json": _Kind(_json_or_lines, field),
    ".txt": _Kind(_paragraphs, _itself),
    ".arrow": _Kind(_table, _itself),
}
"""Ending of a file that can be read -> how."""


# ---- what every kind of data needs


def values(rows: "Dataset | IterableDataset", column: str, first: int = 0) -> Iterator[Any]:
    """Give a column's values as plain Python ones, whatever format the data set was saved with.

    Args:
        rows: The data set.
        column: Its column.
        first: Rows to skip.
    """
    names = rows.column_names or list(next(iter(rows), {}))  # a streamed one may know them from its rows only
    if not names:
        return
    check_column(column, names)
    rows = rows.with_format(None).select_columns([column])
    if hasattr(rows, "num_rows") and first >= rows.num_rows:  # a streamed one knows no number, and skips to its end
        return
    for batch in (rows.skip(first) if first else rows).iter(batch_size=64):
        yield from batch[column]


def check_column(column: str, names: Iterable[str]) -> None:
    """Refuse a column that is not there."""
    if column not in names:
        raise unknown("data.column", column, names)


@contextmanager
def reading(data: DataConfig, where: str = "") -> Iterator[None]:
    """Put whatever a library raises on missing or damaged data into one sentence."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except ConnectionError as error:
        raise hub.out_of_reach(data.path, "dataset", hub.fault(error), key="data.path") from error
    except Exception as error:  # Arrow, JSON, Unicode, the hub and the disk each have kinds of their own
        raise UserError(f"data.path={data.path} cannot be read{where} ({hub.fault(error)}); give other data") from error
