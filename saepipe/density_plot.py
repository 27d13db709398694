"""The histogram of densities at the head of the feature page, as SVG."""

import math
from collections.abc import Sequence

_STEPS_PER_DECADE = 5
_PLOT_HEIGHT = 120
_BAR = 14
"""Width of a bar, in the SVG's units."""


def density_plot(densities: Sequence[float], tokens: int) -> str:
    """Draw how many latents have which density, on a logarithmic axis, the dead ones apart.

    Args:
        densities: Density of every latent, 0 for the dead.
        tokens: Tokens that were read, which is what a density can resolve.
    """
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
