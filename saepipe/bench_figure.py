"""A measured ratio or rate and what is promised of it, and the table that shows several."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_LARGE = ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1e3, " thousand"))


@dataclass(frozen=True)
class Figure:
    """One ratio: the median of rounds, in each of which both sides were measured after one another; or one rate."""

    name: str
    """What is compared with what."""
    rounds: list[float]
    """The ratio in each round."""
    measured: dict[str, float]
    """What the ratio was made of, medians too, with units in the names."""
    at_least: float | None = None
    """The promise, where more is better."""
    at_most: float | None = None
    """The promise, where less is better; a figure without either is for information."""
    unit: str = ""
    """Of a rate or a time; a ratio has none."""
    told: str = ""
    """What else the table says."""

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool | None:
        """Whether the promise is kept; None where there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    @property
    def bar(self) -> str:
        """The promise in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"

    def for_information(self) -> "Figure":
        """Return it without the promise."""
        return replace(self, at_least=None, at_most=None)

    def document(self) -> dict[str, Any]:
        """Return the figure as JSON values."""
        return {
            "figure": self.name,
            "value": self.value,
            "unit": self.unit,
            "bar": self.bar,
            "met": self.met,
            "rounds": self.rounds,
            **self.measured,
        }


def speed(tokens_per_s: float) -> str:
    """Say a rate in words, also by the day."""
    per_day = 86400 * tokens_per_s
    size, word = next(((size, word) for size, word in _LARGE if per_day >= size), (1, ""))
    return f"{tokens_per_s:,.0f} tokens/s, {per_day / size:,.3g}{word} a day"


def table(figures: list[Figure], there: Mapping[str, float] | None = None) -> str:
    """Lay figures out as text, one a line.

    Args:
        figures: The figures.
        there: Name of a figure -> its value on another machine, for a column of its own.
    """
    words = {True: "met", False: "missed", None: ""}
    rows = [("figure", "value", "rounds", *(["there"] if there is not None else []), "wanted", "", "")]
    for figure in figures:
        beside = [] if there is None else [_told(there.get(figure.name), figure.unit)]
        spread = f"{min(figure.rounds):,.3g} to {max(figure.rounds):,.3g}" if figure.rounds[1:] else ""
        value = _told(figure.value, figure.unit)
        rows.append((figure.name, value, spread, *beside, figure.bar, words[figure.met], figure.told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _told(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.3f} {unit}".rstrip()
