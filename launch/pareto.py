"""The page of a sweep: what each point pays in active latents, and what it gets for them."""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

_PANELS = {"ce_loss_score": "CE score", "explained_variance": "explained variance"}
_COLUMNS = {
    "point": "point",
    "state": "state",
    "l0": "L0",
    "explained_variance": "explained variance",
    "ce_loss_score": "CE score",
    "kl_div_score": "KL score",
    "dead_fraction": "dead latents",
    "dense_fraction": "dense latents",
    "cure": "to meet the usual targets",
    "tokens_per_s": "tokens/s",
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 460, 320, 62, 44, 30, 16
_STYLE = """
:root { color-scheme: light dark; --line: #8888; --ink: CanvasText; --mark: #2b7bba; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td:nth-child(9) { text-align: left; font-size: .85em; }
.missed { color: #b3261e; }
@media (prefers-color-scheme: dark) { .missed { color: #ff8a80; } }
svg { max-width: 100%; height: auto; }
"""
_SVG_STYLE = (
    "text { fill: currentColor } .axis { stroke: currentColor; opacity: .5 } "
    ".grid { stroke: currentColor; opacity: .12 } .mark { fill: #2b7bba }"
)


def shown(name: str, value: float | None) -> str:
    """Write a figure as a reader wants it; what was not measured is a dash."""
    if value is None:
        return "-"
    if name == "tokens_per_s":
        return f"{value:,.0f}"
    return f"{value:.2%}" if name.endswith("fraction") else f"{value:.4g}"


def page(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Write a page that stands alone: the picture, and a table whose points link to their features.

    Args:
        title: Name of the sweep.
        rows: What `launch.collect` found.
    """
    head = "".join(f"<th>{html.escape(words)}</th>" for words in _COLUMNS.values())
    body = "".join(f"<tr>{''.join(f'<td>{_cell(name, row)}</td>' for name in _COLUMNS)}</tr>\n" for row in rows)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body>\n<h1>{name}</h1>\n<p>Each point, measured on documents that it was not trained on. "
        "Further up and further left is better.</p>\n"
        f"{picture(rows)}\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</body>\n</html>\n"
    )


def _cell(name: str, row: dict[str, Any]) -> str:
    if name == "point" and row.get("features"):
        return f'<a href="{quote(row["features"])}">{html.escape(row["point"])}</a>'
    value = row.get(name)
    if name in ("point", "state", "cure"):
        return html.escape(str(value or ""))
    missed = name in row.get("targets_missed", "").split("; ")
    return (
        f'<span class="missed" title="misses the target">{shown(name, value)}</span>' if missed else shown(name, value)
    )


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Draw L0 against the CE score and against explained variance, as an SVG."""
    panels = [_panel(rows, name, words, at) for at, (name, words) in enumerate(_PANELS.items())]
    width = _WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="L0 against the CE score and '
        f'explained variance of each point">\n<style>{_SVG_STYLE}</style>\n' + "\n".join(panels) + "\n</svg>"
    )


def _panel(rows: Sequence[dict[str, Any]], name: str, words: str, at: int) -> str:
    points = [(row["l0"], row[name], row) for row in rows if row.get("l0") is not None and row.get(name) is not None]
    left, right = at * _WIDTH + _LEFT, (at + 1) * _WIDTH - _RIGHT
    top, bottom = _TOP, _HEIGHT - _BOTTOM
    parts = [f'<text x="{(left + right) / 2}" y="18" text-anchor="middle">{words} against L0</text>']
    parts.append(f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>')
    if not points:
        return "\n".join([*parts, f'<text x="{left + 12}" y="{top + 24}">nothing is evaluated yet</text>'])
    x_of, x_ticks = _scale([x for x, _, _ in points], left, right)
    y_of, y_ticks = _scale([y for _, y, _ in points], bottom, top)
    for tick in x_ticks:
        parts.append(f'<path class="grid" d="M{x_of(tick):.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{x_of(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{left} {y_of(tick):.1f}H{right}"/>')
        parts.append(f'<text x="{left - 7}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">L0</text>')
    for x, y, row in points:
        told = html.escape(f"{row['point']}: L0 {x:.4g}, {words} {y:.4g}")
        mark = f'<circle class="mark" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="5"><title>{told}</title></circle>'
        parts.append(f'<a href="{quote(row["features"])}">{mark}</a>' if row.get("features") else mark)
    return "\n".join(parts)


def _scale(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """Map values to a stretch of the picture, and choose round ticks within it."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    low, high = low - 0.1 * spread, high + 0.1 * spread
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step)
    ticks = [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]
    return (lambda value: start + (value - low) / (high - low) * (end - start)), ticks
