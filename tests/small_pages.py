"""Feature pages for tests: small ones, large made-up ones, and what a written one says."""

import base64
import json
import random
import re
import string
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saepipe.feature_page import Band, Excerpt, FeaturePage, Latent

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have".split()


def unpack(packed: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def index_of(html: str) -> Any:
    found = re.search(
        r'<script id="data" type="text/plain" data-folder="[0-9a-f]{16}">([A-Za-z0-9+/=]*)</script>', html
    )
    assert found
    return unpack(found[1])


def generation(path: Path) -> Path:
    """Return the folder of the blocks of a page."""
    found = re.search(r'data-folder="([0-9a-f]{16})"', path.read_text(encoding="utf-8"))
    assert found
    return path.parent / found[1]


def latents_of(path: Path) -> list[dict[str, Any]]:
    """Read a page as its script does: what the index and what the blocks say of each latent."""
    index = index_of(path.read_text(encoding="utf-8"))
    blocks: list[Any] = []
    for number in range(-(-len(index["i"]) // index["per_block"])):
        found = re.fullmatch(
            rf'saepipeBlock\({number},"([A-Za-z0-9+/=]*)"\)\n', (generation(path) / f"{number}.js").read_text()
        )
        assert found
        blocks += unpack(found[1])
    names = {"i": "index", "d": "density", "m": "maximum", "t": "typical", "e": "effect", "n": "nearest"}
    names |= {"l": "label", "w": "strongest on", "s": "shares", "r": "raises"}
    rows = [{name: index[key][at] for key, name in names.items()} for at in range(len(index["i"]))]
    return [row | block for row, block in zip(rows, blocks, strict=True)]


def excerpt(text: str, value: float, before: str = "so it was ", after: str = " and so on") -> Excerpt:
    return Excerpt([(before, 0.0), (text, value), (after, 0.0)])


def latent(index: int, text: str = "hello", **changes: Any) -> Latent:
    fields: dict[str, Any] = {
        "index": index,
        "density": 0.0123456,
        "maximum": 3.0,
        "typical": 1.25,
        "histogram": [5, 0, 2, 1, 0, 0, 0, 0],
        "histogram_top": 8.0,
        "top": [Excerpt([("a ", 0.0), ("b ", 0.0), (text, 3.0), ("c", 0.0005), ("d", 0.0)])],
        "bands": [Band(2.0, [excerpt(text, 2.5)]), Band(1.5, []), Band(0.0, [excerpt(text, 1.0), excerpt(text, 0.5)])],
        "sampled": [excerpt(text, 0.25, before="by chance ")],
        "label": text,
        "promoted": [(text, 4.0), ("more", 3.0)],
        "suppressed": [("less", -2.0)],
        "neighbours": [(8, 0.75)],
    }
    return Latent(**{**fields, **changes})


def page(*latents: Latent, **changes: Any) -> FeaturePage:
    fields: dict[str, Any] = {
        "title": "runs/x",
        "facts": {"model": "demo"},
        "note": "Read 10 tokens.",
        "densities": [0.0, 0.0123456, 1.0, 0.001],
        "tokens": 1000,
        "latents": latents or (latent(7),),
    }
    return FeaturePage(**{**fields, **changes})


def many(n: int) -> Iterator[Latent]:
    """Make up latents as large as real ones, each with a word of its own."""
    for index in range(n):
        own = f" word{index}"
        draw = random.Random(index)
        texts = ["".join(draw.choices(string.ascii_lowercase + "   ", k=70)) for _ in range(16)]
        contexts = [excerpt(own, 3.0 - at / 9, texts[at], f" {WORDS[at]} {index * at}") for at in range(16)]
        yield latent(
            index,
            own,
            density=(index * 7919 % n + 1) / n / 10,
            maximum=3.0,
            histogram=[1 + index * bin % 17 for bin in range(32)],
            top=contexts[:8],
            bands=[Band(3.0 - at, contexts[8 + 2 * at : 10 + 2 * at]) for at in range(4)],
            sampled=[excerpt(f" rare{index}", 1.0, "so it was "), *contexts[2:10:3]],
            label=f"word{index}",
            promoted=[(f" {word}", 4.0 + index % 100 / 100) for word in WORDS[:8]],
            suppressed=[(f" {word}", -4.0) for word in WORDS[8:16]],
            neighbours=[((index + at) % n, 0.9 - at / 10 + index % 10 / 100) for at in range(1, 7)],
        )
