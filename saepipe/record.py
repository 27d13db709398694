"""The record of a shard: what commits it, and what it is checked against ever after.

`<place>.json` is written after its shard, so a shard without a record that fits does not exist for a writer, and is an
error for a reader.
"""

import base64
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from saepipe.durable import fits, read_sealed, seal, write_sealed
from saepipe.errors import DamageError

_VECTORS = ("sum", "sum_squares")
_DOCUMENT = {
    "plan": str,
    "place": str,
    "rows": int,
    "bytes": int,
    "xxh3": str,
    "blocks": list[str],
    "tensors": dict[str, str],
    "counted": int,
    "sum_norm": float,
    "sum": str,
    "sum_squares": str,
}


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard."""

    plan: str
    """Identity of the plan."""
    place: str
    """Path of the shard in the store, without its ending: a shard in the place of another is noticed."""
    rows: int
    """Rows in the shard."""
    bytes: int
    """Size of the file."""
    xxh3: str
    """Hash of the file."""
    blocks: list[str]
    """Hash of each block of rows: of its `activations` and, as int8, of their `row_scale`."""
    tensors: dict[str, str]
    """Hash of each of the other tensors."""
    counted: int
    """Rows in the sums: the ordinary ones up to ten times the shard's median norm."""
    sum_norm: float
    """Sum of their norms."""
    sum: Float64[np.ndarray, " d_in"]
    """Sum of the counted rows."""
    sum_squares: Float64[np.ndarray, " d_in"]
    """Sum of their squares."""

    @classmethod
    def load(cls, root: Path, place: str, plan: str) -> "Record":
        """Read the record of a place.

        Raises:
            DamageError: It is missing, damaged, or belongs to another place or plan.
        """
        try:
            document = read_sealed(root / f"{place}.json", cure=_cure(root))
        except (FileNotFoundError, NotADirectoryError):
            raise damaged(root, place, "has no record") from None
        if not fits(document, _DOCUMENT):
            raise damaged(root, place, "has a record of another format")
        if document["plan"] != plan or document["place"] != place:
            raise damaged(root, place, "has a record that belongs to another shard or store")
        for key in _VECTORS:
            try:
                document[key] = np.frombuffer(base64.b64decode(document[key]), "<f8")
            except ValueError:
                raise damaged(root, place, "has a record of another format") from None
        if len(document["sum"]) != len(document["sum_squares"]):
            raise damaged(root, place, "has a record of another format")
        return cls(**document)

    def save(self, root: Path) -> None:
        """Write the record beside its shard."""
        write_sealed(root / f"{self.place}.json", self._document())

    @cached_property
    def digest(self) -> str:
        """The record's own hash."""
        return seal(self._document())

    def _document(self) -> dict[str, Any]:
        document = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # As decimals, two vectors of d numbers would be most of the record and of the time to read it
        for key in _VECTORS:
            document[key] = base64.b64encode(document[key].astype("<f8").tobytes()).decode()
        return document


def damaged(root: Path, place: str, what: str) -> DamageError:
    """Build the error for a shard that cannot be used."""
    return DamageError(root / f"{place}.safetensors", what, _cure(root))


def _cure(root: Path) -> str:
    return f"write it again with `python -m saepipe.shards repair {root}`"
