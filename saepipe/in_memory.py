"""Data that a user has at hand, in memory or by its name, as the source that tokens are made from."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from os import PathLike
from typing import Any

from saepipe import data_files
from saepipe.config import DataConfig
from saepipe.errors import UserError
from saepipe.sources import Source

ANY_COLUMN = "text|tokens|input_ids"
"""What `data.column` is here where none is named: the first of these that is there."""


def open_source(data: DataConfig, *, seed: int) -> Source:
    """Open data as `Source.open` does, at the first of several columns that it has.

    Args:
        data: The data group of a configuration; its `column` may be several, such as ANY_COLUMN.
        seed: Decides which documents are held out.

    Raises:
        UserError: There is no such data, or it has no such column.
    """
    error: UserError | None = None
    for column in data.column.split("|"):
        try:
            return Source.open(replace(data, column=column), seed=seed)
        except UserError as refused:
            if "data.column" not in str(refused):
                raise
            error = error or refused
    assert error is not None
    raise error


def source_of(dataset: Any, data: DataConfig, *, seed: int, tokens_apart: bool) -> Source:
    """Make a source of whatever a user has.

    Args:
        dataset: Path or hub id, a `datasets.Dataset`, a list or other iterable of texts or of token ids; None is what
            the data group names.
        data: How it is read; its `column` may be several, as for `open_source`.
        seed: Decides which documents are held out.
        tokens_apart: Do not join lists of token ids that were given here.

    Raises:
        UserError: There is no such data, no such column, or nothing in it.
    """
    if dataset is None or isinstance(dataset, str | PathLike):
        source = open_source(data if dataset is None else replace(data, path=str(dataset)), seed=seed)
    else:
        source = _in_memory(dataset, data, seed)
    if tokens_apart and source.kind is list and dataset is not None:
        source = replace(source, data=replace(source.data, pack=False))
    return source


def _in_memory(dataset: Any, data: DataConfig, seed: int) -> Source:
    label = f"a {type(dataset).__name__} in memory"
    if isinstance(dataset, Mapping) or hasattr(dataset, "columns"):  # a data frame
        # Going through it would give the names of its columns (or splits), which are texts, too
        raise UserError(
            f"dataset={label} has several parts; give one of them, such as dataset[{next(iter(dataset), 'text')!r}]"
        )
    rows = dataset if hasattr(dataset, "__getitem__") or hasattr(dataset, "column_names") else list(dataset)
    if hasattr(rows, "column_names"):
        names = rows.column_names or list(next(iter(rows), {}))
    else:
        first = next(iter(rows), None)
        names = list(first) if isinstance(first, dict) else []
    columns = data.column.split("|")
    column = next((name for name in columns if name in names), columns[0])
    data = replace(data, path=label, column=column)
    values = (
        partial(data_files.values, rows, column) if hasattr(rows, "column_names") else partial(_values, rows, column)
    )
    source = Source(data, seed, values, {})
    _, document = next(source.documents(), (0, None))
    if document is None:
        raise UserError(f"dataset={label} holds no text and no token ids; give some")
    return replace(source, kind=type(document))


def _values(rows: Iterable[Any], column: str, first: int = 0) -> Iterator[Any]:
    """Give texts, and token ids as lists, whatever array they are in."""
    for row in islice(iter(rows), first, None):
        value = data_files.field(row, column) if isinstance(row, dict) else row
        yield value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
