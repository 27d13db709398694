"""What the field asks of an SAE, whether one meets it, and which key to change where it does not.

The usual targets: L0 from 50 to 200, a CE score of 0.8 and more (0.80 to 0.95 is usual), explained variance above 0.9,
and fewer than 5 % of the latents dead. Latents that are active on more than a tenth of all tokens are hard to read;
that they are to be fewer than 1 % is this library's own mark.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saepipe.saes.config import SAEConfig

ENOUGH_TOKENS = 100_000
"""Fewer tokens than these leave latents silent that are only rare: of one SAE, 7.6 % on 4,000 and 0.15 % on 184,000."""
_SPARSITY = {"k": -1, "l1_coefficient": 1, "l0_coefficient": 1}
"""Key that decides an architecture's sparsity -> 1 where a larger value means fewer active latents, else -1."""


@dataclass(frozen=True)
class Target:
    """A range that a figure is to be in."""

    name: str
    """The figure, as `saepipe.evaluate` names it."""
    words: str
    least: float
    most: float
    cures: Callable[["SAEConfig", float], Iterator[str]]
    """Says what to change, from the configuration and the figure."""

    def met(self, value: float | None) -> bool:
        """Tell whether a value is in the range; one that is not defined is not."""
        return value is not None and not math.isnan(value) and self.least <= value <= self.most

    @property
    def range(self) -> str:
        """The range, as a reader wants it."""
        if self.most == math.inf:
            return f"at least {self.least:g}"
        if self.least == -math.inf:
            return f"at most {self.most:.0%}"
        return f"{self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Verdict:
    """How a run stands to one target."""

    target: Target
    value: float | None
    met: bool
    cure: str
    """Which keys to change, and in which direction; empty where the target is met."""


def judged(figures: Mapping[str, Any], cfg: "SAEConfig") -> list[Verdict]:
    """Compare figures with every target.

    Args:
        figures: What `saepipe.evaluate` found.
        cfg: The SAE's configuration.
    """
    found = []
    for target in TARGETS:
        value = figures[target.name]
        met = target.met(value)
        cures = [] if met or value is None or math.isnan(value) else list(target.cures(cfg, value))
        if cures and target is DEAD and figures["tokens"] < ENOUGH_TOKENS:
            cures.insert(0, f"read more first: evaluate.tokens, since {figures['tokens']:,} miss what is rare")
        found.append(Verdict(target, value, met, "; or ".join(cures)))
    return found


def _sparser(cfg: "SAEConfig", by: int) -> str:
    """Say how to have fewer (1) or more (-1) active latents."""
    key = next((name for name in _SPARSITY if hasattr(cfg, name)), None)
    if key is None:  # an architecture of the user's own
        return f"{'raise' if by > 0 else 'lower'} what makes sae={cfg.architecture} sparse"
    return f"{'raise' if by == _SPARSITY[key] else 'lower'} sae.{key} ({getattr(cfg, key):g})"


def _l0(cfg: "SAEConfig", value: float) -> Iterator[str]:
    yield _sparser(cfg, -1 if value < L0.least else 1)


def _fit(cfg: "SAEConfig", value: float) -> Iterator[str]:
    yield f"less sparsity: {_sparser(cfg, -1)}"
    yield f"more latents: raise {_width(cfg)}"
    yield "more training: raise train.tokens"


def _dead(cfg: "SAEConfig", value: float) -> Iterator[str]:
    methods = next(item.metadata["choices"] for item in fields(cfg) if item.name == "dead_method")
    best = "auxk" if "auxk" in methods else "resample"
    if cfg.dead_method == "none":
        yield f"revive them: sae.dead_method={best}"
    elif hasattr(cfg, "aux_loss_coefficient"):
        yield f"raise sae.aux_loss_coefficient ({cfg.aux_loss_coefficient:g})"
    for name in ("l1_warm_up_steps", "l0_warm_up_steps"):
        if hasattr(cfg, name):
            yield f"raise sae.{name} ({getattr(cfg, name)})"
    yield "raise optim.lr_warm_up_steps"
    yield f"fewer latents: lower {_width(cfg)}"


def _dense(cfg: "SAEConfig", value: float) -> Iterator[str]:
    yield f"more sparsity: {_sparser(cfg, 1)}"
    if not hasattr(cfg, "k"):
        yield "an architecture that holds L0: sae=topk"


def _width(cfg: "SAEConfig") -> str:
    return f"sae.expansion ({cfg.expansion})" if cfg.d_sae is None else f"sae.d_sae ({cfg.d_sae})"


L0 = Target("l0", "L0", 50, 200, _l0)
DEAD = Target("dead_fraction", "dead latents", -math.inf, 0.05, _dead)
TARGETS = (
    L0,
    Target("explained_variance", "explained variance", 0.9, math.inf, _fit),
    Target("ce_loss_score", "CE score", 0.8, math.inf, _fit),
    DEAD,
    Target("dense_fraction", "dense latents", -math.inf, 0.01, _dense),
)
