"""Text that is markup, control characters, no text, and pages that are written anew while they are read."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_pages
from browsing import Open
from playwright.sync_api import Page, expect
from small_pages import excerpt, latent, many
from transformers import AutoTokenizer

from saepipe.demo import MODEL_DIR
from saepipe.feature_page import Excerpt
from saepipe.token_text import TokenText

RUNS = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 2</script>",
    "<img src=x onerror=window.ran=3>",
    "<svg onload=window.ran=4>",
    "<details open ontoggle=window.ran=5>",
    "<iframe srcdoc='<script>parent.ran=6</script>'>",
    "\"'><style>body{display:none}</style><b onmouseover=window.ran=7>",
    "javascript:window.ran=8",
    "${window.ran=9}",
    "&lt;script&gt;&#x3c;img&#x3e;",
    "--></textarea><!--",
]


def visit_everything(page: Page) -> None:
    for number in range(page.locator("article").count()):
        card = page.locator("article").nth(number)
        for name in ("By strength", "Random", "Top"):
            card.get_by_role("tab", name=name).click()
        card.locator("mark").first.hover()
        card.locator(".chip").first.hover()


# Once with the page's policy that no script but its own may run, and once without: either has to do by itself.
@pytest.mark.parametrize("bypass_csp", [False, True])
def test_text_that_is_markup_is_shown_and_does_not_run(opened: Open, bypass_csp: bool) -> None:
    latents = [
        latent(number, text, promoted=[(text, 1.0)], suppressed=[(text, -1.0)]) for number, text in enumerate(RUNS)
    ]
    everything = " ".join(RUNS)
    hostile = small_pages.page(*latents, title=everything, facts={everything: everything}, note=everything)
    page = opened(hostile, bypass_csp=bypass_csp)
    visit_everything(page)
    for number, text in enumerate(RUNS):
        card = page.locator(f"#latent-{number}")
        assert card.locator("mark").first.text_content() == text
        assert card.locator(".label").text_content() == text
        assert card.locator(".chip").first.text_content() == text
        page.fill("#search", text)
        assert card.is_visible()
        page.fill("#search", "")
    assert page.locator("h1").text_content() == everything
    assert page.locator("dd").first.text_content() == everything
    assert page.evaluate("window.ran") is None
    for tag in ("img", "iframe", "details", "b", "textarea", "svg:not(.plot):not(.histogram)"):
        assert page.locator(f"body {tag}").count() == 0, tag


def test_a_script_that_gets_into_the_page_is_not_run(opened: Open) -> None:
    page = opened(small_pages.page())
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.ran=1>')")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 2'}))"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None


def test_control_characters_and_right_to_left_and_emoji(opened: Open) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    said = "\x00\x1b\u202e\u2066 שלום 👩‍🚀🇮🇱 ́"
    pieces = TokenText(tokenizer).pieces(tokenizer(said, add_special_tokens=False)["input_ids"])
    strong = Excerpt([(piece.text, 1.0 + number / 9) for number, piece in enumerate(pieces)])
    page = opened(small_pages.page(latent(7, top=[strong], label="\u202eשלום"), latent(8, " עולם ")))
    card = page.locator("#latent-7")
    assert "".join(card.locator("mark").all_text_contents()) == "␀␛\\u{202e}\\u{2066} שלום 👩‍🚀🇮🇱 ́"
    # What stands beside a right-to-left text stays where it is.
    value, text = card.locator(".value").bounding_box(), card.locator("li > bdi").bounding_box()
    assert value
    assert text
    assert value["x"] + value["width"] <= text["x"]
    near = page.locator("#latent-7 .chip").last
    boxes = near.evaluate(
        """chip => [...chip.childNodes].map((node) => {
             const range = document.createRange();
             range.selectNodeContents(node);
             return range.getBoundingClientRect().x })"""
    )
    assert near.text_content() == "#8  עולם  0.75"
    assert boxes == sorted(boxes)


def test_rows_of_both_directions_begin_at_one_edge_and_read_as_they_are_written(opened: Open) -> None:
    tokens = [("ש", 2.0), ("ל", 3.0), ("ום", 1.0)]
    rows = [
        Excerpt([("\\xd7", 0.0), *tokens, (" עולם", 0.0)]),
        Excerpt([("hello ", 0.0), *tokens]),
        Excerpt([("אב", 0.0), ("ש\\xd7", 3.0)]),
        Excerpt([("<|bos|>", 0.0), *tokens]),
    ]
    page = opened(small_pages.page(latent(7, top=rows)))
    texts = page.locator("#latent-7 li > bdi")
    assert texts.evaluate_all("all => all.map(one => getComputedStyle(one).direction)") == ["rtl", "ltr", "rtl", "rtl"]
    left = texts.evaluate_all(
        """all => all.map((one) => {
             const range = document.createRange();
             range.selectNodeContents(one);
             return range.getBoundingClientRect().x - one.getBoundingClientRect().x })"""
    )
    assert left == pytest.approx([0.0] * 4, abs=1.0)
    for row in (0, 1, 3):  # a word cut into tokens stays in one piece, from right to left
        x = texts.nth(row).locator("mark").evaluate_all("all => all.map(mark => mark.getBoundingClientRect().x)")
        assert x == sorted(x, reverse=True)
    for row, said in ((2, "\\xd7"), (3, "<|bos|>")):
        inner = texts.nth(row).locator("bdi")
        assert inner.text_content() == said
        assert inner.evaluate("one => getComputedStyle(one).direction") == "ltr"


def test_blanks_alone_are_shown(opened: Open) -> None:
    page = opened(small_pages.page(latent(7, "  ", promoted=[(" ", 1.0), (" a", 0.5)])))
    expect(page.locator(".label")).to_have_text("␣␣")
    expect(page.locator(".chip").first).to_have_text("␣")
    expect(page.locator(".chip").nth(1)).to_have_text(" a")
    page.locator("mark").first.hover()
    expect(page.locator("#bubble")).to_contain_text("␣␣ 3.00")


def test_empty_texts(opened: Open) -> None:
    empty = latent(7, "", top=[Excerpt([("", 3.0)]), excerpt("", 1.0, "", "")], label="")
    page = opened(small_pages.page(empty))
    visit_everything(page)
    expect(page.locator("mark").first).to_have_text("∅")
    expect(page.locator(".chip .token").first).to_have_text("∅")


def test_a_page_is_read_while_it_is_written_anew(visit: Open, tmp_path: Path) -> None:
    def write(word: str) -> str:
        latents = [latent(one.index, f"{word}{one.index}") for one in many(200)]
        return small_pages.page(*latents).write(tmp_path).as_uri()

    def turn_to(page: Page, number: int) -> None:
        page.fill("#page", str(number))
        page.locator("#page").press("Enter")

    old = visit(write("old"))
    expect(old.locator("#latent-0 mark").first).to_have_text("old0")
    new = visit(write("new"))
    expect(new.locator("#latent-0 mark").first).to_have_text("new0")
    turn_to(old, 3)  # blocks that it has not read yet
    expect(old.locator("#latent-48 mark").first).to_have_text("old48")
    turn_to(new, 3)
    expect(new.locator("#latent-48 mark").first).to_have_text("new48")
    write("newest")
    turn_to(old, 8)
    expect(old.locator("#latent-190")).to_contain_text("the page was written anew after it was opened")
    old.click("#deep")
    expect(old.locator("#deep")).to_have_text("Not all contexts can be read: reload the page")
    turn_to(new, 8)
    expect(new.locator("#latent-190 mark").first).to_have_text("new190")
    old.locator("#latent-190").get_by_role("button", name="Reload").click()
    expect(old.locator("#latent-190 mark").first).to_have_text("newest190")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()
        thread.join()


def test_a_page_from_a_web_server(visit: Open, server: str, tmp_path: Path) -> None:
    small_pages.page(*many(50)).write(tmp_path)
    page = visit(server)
    page.click("#after")
    expect(page.locator("#latent-40 mark").first).to_have_text(" word40")
