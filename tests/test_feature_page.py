import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import small_pages
from small_pages import generation, latents_of, page

from saepipe import durable
from saepipe.errors import UserError
from saepipe.feature_page import LATENTS_PER_BLOCK

HOSTILE = ["</script><script>alert(1)</script>", "<!--", "]]>", "<img src=x onerror=alert(2)>", '"&amp;$note${data}\\']


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_data_holds_what_was_given(tmp_path: Path) -> None:
    (latent,) = latents_of(page().write(tmp_path))
    assert latent == {
        "index": 7,
        "density": 0.01235,
        "maximum": 3.0,
        "effect": 4.0,
        "nearest": 0.75,
        "label": "hello",
        "typical": 1.25,
        "strongest on": "hello",
        "shares": [100],
        "raises": "hello\nmore",
        "w": 1.0,
        "h": [5, 0, 2, 1],
        "t": [["a b ", "hello", 1000, "c", 1, "d"]],  # silent text is joined; the weakest activation is not lost
        "b": [
            [2.0, ["so it was ", "hello", 833, " and so on"]],
            [1.5],
            [0.0, ["so it was ", "hello", 333, " and so on"], ["so it was ", "hello", 167, " and so on"]],
        ],
        "r": [["by chance ", "hello", 83, " and so on"]],
        "p": [["hello", 4.0], ["more", 3.0]],
        "s": [["less", -2.0]],
        "n": [[8, 0.75]],
    }


def test_every_latent_is_in_its_block(tmp_path: Path) -> None:
    n = 2 * LATENTS_PER_BLOCK + 1
    path = page(*small_pages.many(n)).write(tmp_path)
    assert sorted(file.name for file in generation(path).iterdir()) == ["0.js", "1.js", "2.js"]
    found = latents_of(path)
    assert [latent["index"] for latent in found] == list(range(n))
    assert all(latent["t"][0][1] == f" word{latent['index']}" for latent in found)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text: str, tmp_path: Path) -> None:
    plain = page().write(tmp_path / "plain").read_text(encoding="utf-8")
    hostile = page(small_pages.latent(7, text), title=text, facts={text: text}, note=text).write(tmp_path / "hostile")
    html = hostile.read_text(encoding="utf-8")
    assert [tag for tag, _ in Elements(html).found] == [tag for tag, _ in Elements(plain).found]
    assert not any(name.startswith("on") for _, attributes in Elements(html).found for name in attributes)
    assert latents_of(hostile)[0]["t"][0][1] == text
    assert "innerHTML" not in html
    assert "insertAdjacentHTML" not in html


def test_page_is_self_contained_and_runs_no_script_but_its_own(tmp_path: Path) -> None:
    html = page().write(tmp_path).read_text(encoding="utf-8")
    for tag, attributes in Elements(html).found:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed")
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "fetch(" not in html
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html)  # the name of a format, which nothing loads
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}' 'self' file:;" in html


def test_a_page_without_latents(tmp_path: Path) -> None:
    path = page(latents=[], densities=[0.0, 0.0]).write(tmp_path)
    assert latents_of(path) == []
    assert "2 latents are dead" in path.read_text(encoding="utf-8")


def test_the_blocks_of_the_page_before_stay_and_older_ones_go(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    generations = []
    for text in ("one", "two", "two", "three"):
        path = page(small_pages.latent(7, text)).write(tmp_path)
        generations.append(generation(path))
    one, two, again, three = generations
    assert two == again
    assert not one.exists()
    assert (two / "0.js").exists()
    assert (three / "0.js").exists()
    assert (tmp_path / "mine").exists()


def test_a_page_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = page().write(tmp_path)
    before, write_text = latents_of(path), durable.write_text

    def full(file: Path, text: str) -> None:
        if file.name == "1.js":
            raise OSError(28, "No space left on device", str(file))
        write_text(file, text)

    monkeypatch.setattr(durable, "write_text", full)
    with pytest.raises(UserError, match=r"run.dir=.* has no space left on its disk"):
        page(*small_pages.many(40)).write(tmp_path)
    assert latents_of(path) == before
    monkeypatch.undo()
    page(*small_pages.many(40)).write(tmp_path)
    assert len(latents_of(path)) == 40


def test_a_file_that_is_no_text_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_bytes(b"\xff\xfe")
    assert latents_of(page().write(tmp_path))
