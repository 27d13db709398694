"""A feature page: one HTML file that needs nothing but a browser, not even a network.

`page/template.html`, `style.css` and `script.js` are its parts. The summary is plain HTML; the latents are JSON,
deflated (a third of the size) and put into the page as text nodes by the script, so that no token can become markup.
"""

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

_ASSETS = Path(__file__).parent / "page"
_STEPS_PER_DECADE = 5
_PLOT_HEIGHT = 120
_BAR = 14
"""Width of a bar of the density histogram, in the SVG's units."""


@dataclass(frozen=True)
class Excerpt:
    """A stretch of text in which a latent is active."""

    pieces: list[tuple[str, float]]
    """Text of each token and the latent's activation on it."""


@dataclass(frozen=True)
class Latent:
    """What the page shows of one latent."""

    index: int
    """Number in the SAE."""
    density: float
    """Share of the tokens on which it is active."""
    maximum: float
    """Its strongest activation."""
    histogram: list[int]
    """Positive activations in equal bins from 0 to `histogram_top`."""
    histogram_top: float
    """Upper end of the histogram."""
    excerpts: list[Excerpt]
    """Contexts that activate it most, the strongest first."""


@dataclass(frozen=True)
class FeaturePage:
    """Everything on the page."""

    title: str
    """Heading: the run."""
    facts: dict[str, str]
    """Name -> value, for the summary."""
    note: str
    """One sentence below the heading that says what was read."""
    densities: Sequence[float]
    """Density of every latent of the SAE, 0 for the dead."""
    tokens: int
    """Tokens that were read, which is what a density can resolve."""
    latents: list[Latent]
    """The latents that are shown."""

    def html(self) -> str:
        """Write the page."""
        facts = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in self.facts.items()
        )
        return Template(_asset("template.html")).substitute(
            title=escape(self.title),
            note=escape(self.note),
            facts=facts,
            plot=_density_plot(self.densities, self.tokens),
            style=_asset("style.css"),
            script=_asset("script.js"),
            data=_packed([_values(latent) for latent in self.latents]),
        )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8").strip()


def _packed(values: object) -> str:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _values(latent: Latent) -> dict[str, Any]:
    """Lay a latent out for the script, bins above its maximum left out."""
    width = latent.histogram_top / len(latent.histogram)
    used = max((index + 1 for index, count in enumerate(latent.histogram) if count), default=0)
    return {
        "i": latent.index,
        "d": _rounded(latent.density),
        "m": _rounded(latent.maximum),
        "w": width,
        "h": latent.histogram[:used],
        "x": [_runs(excerpt, latent.maximum) for excerpt in latent.excerpts],
    }


def _runs(excerpt: Excerpt, maximum: float) -> list[str | int]:
    """Flatten an excerpt: texts, each active one followed by its activation in thousandths of the latent's maximum."""
    flat: list[str | int] = []
    silent = False
    for text, activation in excerpt.pieces:
        if activation > 0:
            flat += [text, max(1, round(1000 * activation / maximum))]
        elif silent:
            flat[-1] = f"{flat[-1]}{text}"
        else:
            flat.append(text)
        silent = activation <= 0
    return flat


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _density_plot(densities: Sequence[float], tokens: int) -> str:
    """Draw how many latents have which density, on a logarithmic axis, the dead ones apart."""
    decades = max(1, math.ceil(math.log10(max(tokens, 2))))
    bins = [0] * (decades * _STEPS_PER_DECADE)
    for density in densities:
        if density > 0:
            place = math.floor((math.log10(density) + decades) * _STEPS_PER_DECADE)
            bins[min(max(place, 0), len(bins) - 1)] += 1
    dead = sum(density <= 0 for density in densities)
    tallest = max(*bins, dead, 1)
    first = 3 * _BAR  # a gap behind the bar of the dead
    parts = [_bar(0, dead, tallest, "dead", f"{dead:,} latents are dead")]
    for place, count in enumerate(bins):
        low, high = (10 ** (edge / _STEPS_PER_DECADE - decades) for edge in (place, place + 1))
        told = f"{count:,} latents with a density from {low:.2g} to {high:.2g}"
        parts.append(_bar(first + place * _BAR, count, tallest, "live", told))
    width = first + len(bins) * _BAR
    parts.append(f'<path class="axis" d="M0 {_PLOT_HEIGHT}.5H{_BAR - 1}M{first} {_PLOT_HEIGHT}.5H{width}"/>')
    parts.append(f'<text x="{_BAR / 2}" y="{_PLOT_HEIGHT + 16}">dead</text>')
    for decade in range(decades + 1):
        power = -(decades - decade)
        shown = "1" if power == 0 else f'10<tspan dy="-4" font-size="75%">\u2212{-power}</tspan>'
        parts.append(f'<text x="{first + decade * _STEPS_PER_DECADE * _BAR}" y="{_PLOT_HEIGHT + 16}">{shown}</text>')
    label = f"Histogram of the density of {len(densities):,} latents, logarithmic; {dead:,} are dead"
    box = f"-12 -14 {width + 24} {_PLOT_HEIGHT + 36}"
    return (
        f'<svg class="plot" role="img" aria-label="{label}" width="{width + 24}" viewBox="{box}">{"".join(parts)}</svg>'
    )


def _bar(x: int, count: int, tallest: int, kind: str, told: str) -> str:
    """Draw one bar, with its sentence for whoever points at it."""
    if not count:
        return ""
    height = max(1.5, _PLOT_HEIGHT * count / tallest)
    return (
        f'<rect class="{kind}" x="{x}" y="{_PLOT_HEIGHT - height:.1f}" width="{_BAR - 1}" height="{height:.1f}">'
        f"<title>{told}</title></rect>"
    )
