import base64
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import pytest

from saepipe.feature_page import Excerpt, FeaturePage, Latent

HOSTILE = ["</script><script>alert(1)</script>", "<!--", "]]>", "<img src=x onerror=alert(2)>", '"&amp;$note${data}\\']


def page(text: str = "hello", **changes: Any) -> FeaturePage:
    latent = Latent(
        index=7,
        density=0.0123456,
        maximum=3.0,
        histogram=[5, 0, 2, 1, 0, 0, 0, 0],
        histogram_top=8.0,
        excerpts=[Excerpt([("a ", 0.0), ("b ", 0.0), (text, 3.0), ("c", 0.0005), ("d", 0.0)])],
    )
    fields = {
        "title": "runs/x",
        "facts": {"model": "demo"},
        "note": "Read 10 tokens.",
        "densities": [0.0, 0.0123456, 1.0, 0.001],
        "tokens": 1000,
        "latents": [latent],
    }
    return FeaturePage(**{**fields, **changes})


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def unpacked(html: str) -> Any:
    """Read the data as the script does."""
    found = re.search(r'<script id="data" type="text/plain">([A-Za-z0-9+/=]*)</script>', html)
    assert found
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


def test_data_holds_what_was_given() -> None:
    (latent,) = unpacked(page().html())
    assert latent == {
        "i": 7,
        "d": 0.01235,
        "m": 3.0,
        "w": 1.0,
        "h": [5, 0, 2, 1],
        "x": [["a b ", "hello", 1000, "c", 1, "d"]],  # silent text is joined; the weakest activation is not lost
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text: str) -> None:
    plain, hostile = page().html(), page(text, title=text, facts={text: text}, note=text).html()
    tags = [tag for tag, _ in Elements(hostile).found]
    assert tags == [tag for tag, _ in Elements(plain).found]
    assert not any(name.startswith("on") for _, attributes in Elements(hostile).found for name in attributes)
    assert unpacked(hostile)[0]["x"][0][1] == text
    assert "innerHTML" not in hostile
    assert "insertAdjacentHTML" not in hostile


def test_page_is_self_contained() -> None:
    html = page().html()
    for tag, attributes in Elements(html).found:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed")
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "fetch(" not in html
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html)  # the name of a format, which nothing loads
    assert "default-src 'none'" in html


def test_density_plot_counts_every_latent() -> None:
    densities = [0.0] * 5 + [1e-6, 0.001, 0.0011, 0.5, 1.0]  # 1e-6 is below what 1000 tokens can tell
    html = page(densities=densities).html()
    told = re.findall(r"<title>([\d,]+) latents (are dead|with a density)", html)
    assert ("5", "are dead") in told
    assert sum(int(count) for count, kind in told if kind == "with a density") == 5


def test_a_page_without_latents() -> None:
    html = page(latents=[], densities=[0.0, 0.0]).html()
    assert unpacked(html) == []
    assert "2 latents are dead" in html
