"""A feature page: `index.html`, and beside it what it says of each latent, in blocks that it loads when needed.

It needs nothing but a browser, not even a web server. `page/template.html`, `style.css` and the scripts are its parts.
The summary and an index of all latents stand in the HTML; a block is a script that hands over its data, since a page
that is opened from disk may load scripts but no other files. All data is deflated JSON, which the script puts into the
page as text nodes, so that no token can become markup.

A page may be open while it is written anew: the blocks' folder is named by its content, and the one before is kept.
"""

import base64
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from saepipe import durable, latent_labels, lock
from saepipe.density_plot import density_plot

_ASSETS = Path(__file__).parent / "page"
_SCRIPTS = ("text.js", "blocks.js", "search.js", "address.js", "card.js", "list.js")
_FOLDER = re.compile(r'data-folder="([0-9a-f]{16})"')
LATENTS_PER_BLOCK = 32


@dataclass(frozen=True)
class Excerpt:
    """A stretch of text in which a latent is active."""

    pieces: list[tuple[str, float]]
    """Text of each token and the latent's activation on it."""

    @property
    def strongest(self) -> tuple[str, float]:
        """Text of the token with the strongest activation, and that activation."""
        return max(self.pieces, key=lambda piece: piece[1])


@dataclass(frozen=True)
class Band:
    """Contexts drawn at random from those whose strongest activation is in some range."""

    low: float
    """Where the range begins; it ends where that of the band before it begins, or at the maximum."""
    excerpts: list[Excerpt]
    """The contexts; none where the range has none."""


@dataclass(frozen=True)
class Latent:
    """What the page shows of one latent."""

    index: int
    """Number in the SAE."""
    density: float
    """Share of the tokens on which it is active."""
    maximum: float
    """Its strongest activation."""
    typical: float
    """Mean of its activations over the tokens on which it is active."""
    histogram: list[int]
    """Positive activations in equal bins from 0 to `histogram_top`."""
    histogram_top: float
    """Upper end of the histogram."""
    top: list[Excerpt]
    """Contexts that activate it most, the strongest first."""
    bands: list[Band] = field(default_factory=list)
    """Contexts drawn from ranges of its activations, the strongest range first."""
    sampled: list[Excerpt] = field(default_factory=list)
    """Contexts drawn at random from all in which it is active."""
    label: str = ""
    """A few words on it."""
    promoted: list[tuple[str, float]] = field(default_factory=list)
    """Tokens whose logits it raises most at its maximum, and by how much."""
    suppressed: list[tuple[str, float]] = field(default_factory=list)
    """Tokens whose logits it lowers most."""
    neighbours: list[tuple[int, float]] = field(default_factory=list)
    """Latents whose decoder rows are the most similar, and their cosines."""


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
    latents: Iterable[Latent]
    """The latents that are shown, by rising number; gone through once."""
    address: str | None = None
    """Address of a latent's page elsewhere, but for its number at the end; None: there are none."""

    def write(self, folder: Path) -> Path:
        """Write the page into a folder, in the place of one that is there: the blocks first, and `index.html` last.

        Beside it, the labels, as `analyze.labels` takes them: to be changed there, and for verbs that name latents.

        Args:
            folder: Of this page alone.

        Returns:
            Path of index.html.

        Raises:
            UserError: The folder cannot be written, or the disk is full.
        """
        blocks, index = self._data()
        digest = hashlib.sha256("".join(blocks).encode()).hexdigest()[:16]
        html = self._html(index, digest)
        path = folder / "index.html"
        with lock.hold(folder, key="run.dir", wait=True), durable.disk_errors("run.dir", folder):
            durable.remove_stale(folder)
            for number, block in enumerate(blocks):
                durable.write_text(folder / digest / f"{number}.js", block)
            found = _FOLDER.search(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
            if labels := dict(zip(index["i"], index["l"], strict=True)):
                durable.write_text(folder / latent_labels.FILE, json.dumps(labels, indent=1, ensure_ascii=False))
            durable.write_text(path, html)
            before = found[1] if found else digest
            for old in folder.iterdir() if before != digest else ():
                if re.fullmatch("[0-9a-f]{16}", old.name) and old.name not in (digest, before):
                    shutil.rmtree(old, ignore_errors=True)
        return path

    def _data(self) -> tuple[list[str], dict[str, Any]]:
        """Lay the latents out for the script: the blocks, and the index, with a column for each thing to sort by."""
        columns: dict[str, list[Any]] = {name: [] for name in ("i", "d", "m", "t", "e", "n", "l", "w", "s", "r")}
        blocks: list[str] = []
        block: list[dict[str, Any]] = []
        for latent in self.latents:
            for name, value in _row(latent).items():
                columns[name].append(value)
            block.append(_details(latent))
            if len(block) == LATENTS_PER_BLOCK:
                blocks.append(_script(len(blocks), block))
                block = []
        if block:
            blocks.append(_script(len(blocks), block))
        d_sae = len(self.densities)
        return blocks, {"d_sae": d_sae, "per_block": LATENTS_PER_BLOCK, "address": self.address, **columns}

    def _html(self, index: dict[str, Any], digest: str) -> str:
        facts = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in self.facts.items()
        )
        script = "\n" + "\n".join(map(_asset, _SCRIPTS)) + "\n"
        return Template(_asset("template.html")).substitute(
            title=escape(self.title),
            note=escape(self.note),
            facts=facts,
            plot=density_plot(self.densities, self.tokens),
            style=_asset("style.css"),
            script=script,
            # No script runs in the page but this very text, and files beside the page.
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            folder=digest,
            data=_packed(index),
        )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8").strip()


def _script(number: int, block: list[dict[str, Any]]) -> str:
    return f'saepipeBlock({number},"{_packed(block)}")\n'


def _packed(values: object) -> str:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(errors="replace"))).decode()


def _row(latent: Latent) -> dict[str, Any]:
    """What the index says of a latent."""
    contexts = [*latent.top, *(excerpt for band in latent.bands for excerpt in band.excerpts), *latent.sampled]
    strongest: dict[str, float] = {}
    for text, activation in sorted((one.strongest for one in contexts), key=lambda piece: piece[1], reverse=True):
        strongest.setdefault(text, activation)
    return {
        "i": latent.index,
        "d": _rounded(latent.density),
        "m": _rounded(latent.maximum),
        "t": _rounded(latent.typical),
        "e": _rounded(latent.promoted[0][1]) if latent.promoted else None,
        "n": _rounded(latent.neighbours[0][1]) if latent.neighbours else None,
        "l": latent.label,
        "w": "\n".join(strongest),
        "s": [round(100 * activation / latent.maximum) for activation in strongest.values()],
        "r": "\n".join(text for text, _ in latent.promoted),
    }


def _details(latent: Latent) -> dict[str, Any]:
    """What its block says of a latent, bins above its maximum left out."""
    width = latent.histogram_top / len(latent.histogram)
    used = max((index + 1 for index, count in enumerate(latent.histogram) if count), default=0)
    return {
        "w": width,
        "h": latent.histogram[:used],
        "t": [_runs(excerpt, latent.maximum) for excerpt in latent.top],
        "b": [
            [_rounded(band.low), *(_runs(excerpt, latent.maximum) for excerpt in band.excerpts)]
            for band in latent.bands
        ],
        "r": [_runs(excerpt, latent.maximum) for excerpt in latent.sampled],
        "p": [[text, _rounded(effect)] for text, effect in latent.promoted],
        "s": [[text, _rounded(effect)] for text, effect in latent.suppressed],
        "n": [[index, round(cosine, 3)] for index, cosine in latent.neighbours],
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
