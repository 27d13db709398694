"""A measured ratio or rate and what is promised of it, and the table that shows several."""

import statistics
from dataclasses import dataclass
from typing import Any


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
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool | None:
        """Whether the promise is kept; None where there is none."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return None if self.at_most is None else self.ratio <= self.at_most

    @property
    def bar(self) -> str:
        """The promise in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"

    def document(self) -> dict[str, Any]:
        """Return the figure as JSON values."""
        return {
            "figure": self.name,
            "ratio": self.ratio,
            "unit": self.unit,
            "bar": self.bar,
            "met": self.met,
            "rounds": self.rounds,
            **self.measured,
        }


def speed(tokens_per_s: float) -> str:
    """Say a rate in words, also by the day."""
    return f"{tokens_per_s:,.0f} tokens/s, {86400 * tokens_per_s / 1e9:.3g}e9 a day"


def table(figures: list[Figure]) -> str:
    """Lay figures out as text, one a line."""
    words = {True: "met", False: "missed", None: ""}
    rows = [("figure", "ratio", "bar", "", "")]
    for figure in figures:
        value = f"{figure.ratio:,.3f} {figure.unit}".rstrip()
        rows.append((figure.name, value, figure.bar, words[figure.met], figure.told))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
