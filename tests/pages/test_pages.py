"""What a reader does on a feature page, done in a browser."""

import math
import re
from pathlib import Path

import pytest
import small_pages
from browsing import Open, shown
from playwright.sync_api import Page, expect
from small_pages import latent, many

from saepipe.feature_page import Latent

N, PER_PAGE = 100, 24


@pytest.fixture
def page(opened: Open) -> Page:
    return opened(small_pages.page(*many(N), densities=[0.1] * (N + 5)))


SORTS = {
    "i:1": lambda one: (one.index,),
    "d:-1": lambda one: (-one.density, one.index),
    "d:1": lambda one: (one.density, one.index),
    "m:-1": lambda one: (-one.maximum, one.index),
    "m:1": lambda one: (one.maximum, one.index),
    "l:1": lambda one: (one.label, one.index),
    "e:-1": lambda one: (-one.promoted[0][1], one.index),
    "n:-1": lambda one: (-one.neighbours[0][1], one.index),
}


def test_every_way_to_sort(opened: Open) -> None:
    latents = [
        Latent(
            **{**vars(one), "maximum": 1 + one.index * 31 % 97, "label": "zyxw"[one.index % 4] + "é" * (one.index % 2)}
        )
        for one in many(N)
    ]
    page = opened(small_pages.page(*latents))
    offered = page.locator("#sort option").evaluate_all("all => all.map(one => one.value)")
    assert offered == list(SORTS)
    for value, key in SORTS.items():
        page.select_option("#sort", value)
        assert shown(page) == [one.index for one in sorted(latents, key=key)][:PER_PAGE], value
    page.select_option("#sort", "d:1")
    page.click("#after")
    assert shown(page) == [one.index for one in sorted(latents, key=SORTS["d:1"])][PER_PAGE : 2 * PER_PAGE]


def test_search(page: Page) -> None:
    count = page.locator("#count")
    expect(count).to_have_text("100 latents")
    for typed, expected in {"#42": [42], "word77": [77], " RARE31": [31], "word9": [9, *range(90, 100)]}.items():
        page.fill("#search", typed)
        assert shown(page) == expected
        expect(count).to_have_text(f"{len(expected)} of 100 latents")
    page.fill("#search", "7")  # the number, and all that have it in a word
    assert shown(page)[0] == 7
    page.fill("#search", "to 171")  # stands in the fourth context of latent 57 only
    expect(page.locator(".empty")).to_have_text("No latent matches.")
    page.fill("#search", "102")
    expect(page.locator(".empty")).to_contain_text("Latent 102 is not here: it did not fire")
    page.fill("#search", "to 171")
    page.click("#deep")
    expect(page.locator("#deep")).to_have_text("All contexts are searched")
    assert shown(page) == [57]


def test_contexts_of_every_kind_with_their_tokens(page: Page) -> None:
    card = page.locator("#latent-3")
    expect(card.locator("li")).to_have_count(8)
    expect(card.locator("li").first).to_have_text(re.compile(r"^3.00.* word3 the 0$"))
    assert card.locator("mark").first.evaluate("mark => mark.style.getPropertyValue('--v')") == "1"
    colours = card.locator("mark").evaluate_all("all => all.map(mark => getComputedStyle(mark).backgroundColor)")
    strengths = [float(re.findall(r"[\d.]+", colour)[3]) for colour in colours]
    assert strengths == sorted(strengths, reverse=True)
    assert len(set(strengths)) == 8
    card.get_by_role("tab", name="By strength").click()
    assert card.locator(".about").all_text_contents()[:2] == ["From 3.00 to 3.00", "From 2.00 to 3.00"]
    expect(card.locator("li")).to_have_count(8)
    card.get_by_role("tab", name="Random").click()
    expect(card.locator("li").first).to_contain_text("rare3")
    expect(page.locator("#latent-4").locator("li").first).to_contain_text("word4")


def test_pointing_tells_the_activation_the_effect_and_the_count(page: Page) -> None:
    card, bubble = page.locator("#latent-0"), page.locator("#bubble")
    card.locator("mark").nth(1).hover()
    expect(bubble).to_have_text(" word0 2.89, 96 % of the maximum")
    card.locator(".chip").first.hover()
    expect(bubble).to_have_text(" the +4.00")
    card.locator(".histogram rect").nth(2).hover()
    expect(bubble).to_have_text("1 token from 0.500 to 0.750")
    page.locator("h1").hover()
    expect(bubble).to_be_hidden()


def test_neighbours_lead_to_other_pages_and_back(page: Page) -> None:
    card = page.locator("#latent-95")
    page.evaluate("location.hash = 'latent-95'")
    expect(card).to_be_focused()
    expect(card.locator("a.chip").first).to_have_text("#96 word96 0.85")
    card.get_by_text("#1 ").click()
    expect(page.locator("#latent-1")).to_be_focused()
    expect(page.locator("#page")).to_have_value("1")
    page.go_back()
    expect(card).to_be_focused()
    page.fill("#search", "word1")
    page.evaluate("location.hash = 'latent-50'")
    expect(page.locator("#latent-50")).to_be_focused()
    expect(page.locator("#search")).to_have_value("")


def test_an_address_names_a_latent(opened: Open) -> None:
    page = opened(small_pages.page(*many(N)), fragment="#latent-77")
    expect(page.locator("#latent-77")).to_be_focused()
    assert shown(page)[0] == 72
    page.evaluate("location.hash = 'latent-500'")
    expect(page.locator(".empty")).to_contain_text("Latent 500 is not here")


def test_neuronpedia_is_linked_where_the_sae_has_pages_there(opened: Open, page: Page) -> None:
    expect(page.locator(".away")).to_have_count(0)
    linked = opened(small_pages.page(*many(3), address="https://www.neuronpedia.org/gpt2-small/8-res-jb/"))
    assert (
        linked.locator("#latent-2 .away").get_attribute("href") == "https://www.neuronpedia.org/gpt2-small/8-res-jb/2"
    )


def test_everything_with_the_keyboard(page: Page) -> None:
    press = page.keyboard.press
    press("/")
    page.keyboard.type("word5")
    assert shown(page)[0] == 5
    press("Escape")
    expect(page.locator("#search")).to_have_value("")
    press("j")
    expect(page.locator("#latent-0")).to_be_focused()
    press("j")
    press("k")
    expect(page.locator("#latent-0")).to_be_focused()
    for _ in range(PER_PAGE):
        press("j")
    expect(page.locator(f"#latent-{PER_PAGE}")).to_be_focused()
    press("k")
    expect(page.locator(f"#latent-{PER_PAGE - 1}")).to_be_focused()
    press("n")
    assert shown(page)[0] == PER_PAGE
    press("p")
    assert shown(page)[0] == 0
    press("j")
    expect(page.locator("#latent-0 mark").first).to_be_visible()
    press("ArrowRight")
    press("ArrowRight")
    expect(page.locator("#bubble")).to_have_text(" word0 2.89, 96 % of the maximum")
    press("ArrowLeft")
    expect(page.locator("#bubble")).to_have_text(" word0 3.00, 100 % of the maximum")
    press("c")
    expect(page.locator("#latent-0 [aria-selected=true]")).to_have_text("By strength")
    press("Tab")
    expect(page.locator("#latent-0 [aria-selected=true]")).to_be_focused()
    press("ArrowRight")
    expect(page.locator("#latent-0 [aria-selected=true]")).to_have_text("Random")
    press("Tab")
    press("Enter")  # a neighbour
    expect(page.locator("#latent-1")).to_be_focused()
    page.locator("#page").fill("3")
    press("Enter")
    assert shown(page)[0] == 2 * PER_PAGE


def contrast(page: Page, selector: str, ground: str) -> float:
    """Contrast of a text with what is behind it, as WCAG 2 defines it."""

    def luminance(element: str, name: str) -> float:
        colour = page.locator(element).first.evaluate(f"element => getComputedStyle(element).{name}")
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    two = sorted((luminance(selector, "color"), luminance(ground, "backgroundColor")))
    return (two[1] + 0.05) / (two[0] + 0.05)


def test_light_and_dark_can_be_read(opened: Open) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = opened(small_pages.page(*many(3)), color_scheme=scheme)
        expect(page.locator("mark").first).to_be_visible()
        for text, ground in {
            "li bdi": "article",
            "dt": "body",
            ".note": "body",
            ".value": "article",
            ".name": "article",
        }.items():
            assert contrast(page, text, ground) >= 4.5, (scheme, text)
        grounds.append(page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))
    assert grounds[0] != grounds[1]


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(opened: Open, width: int) -> None:
    page = opened(
        small_pages.page(latent(7, "x" * 300), *many(40), title="runs/" + "y" * 200),
        viewport={"width": width, "height": 800},
    )
    expect(page.locator("mark").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_page_on_which_nothing_fires(opened: Open) -> None:
    page = opened(small_pages.page(latents=[], densities=[0.0] * 8))
    expect(page.locator(".empty")).to_have_text("No latent fired on these tokens.")
    page.fill("#search", "3")
    expect(page.locator(".empty")).to_contain_text("Latent 3 is not here: it did not fire")


def test_what_cannot_be_told_is_left_out(opened: Open) -> None:
    alone = latent(7, promoted=[], suppressed=[], neighbours=[], bands=[], sampled=[], label="")
    page = opened(small_pages.page(alone))
    expect(page.locator("mark").first).to_be_visible()
    assert page.locator("#sort option").evaluate_all("all => all.map(one => one.value)") == list(SORTS)[:6]
    expect(page.locator(".effects")).to_have_count(0)
    assert "NaN" not in page.locator("body").inner_text()


WHEN_SHOWN = """new MutationObserver((_, observer) => {
    if (document.querySelector("mark")) { window.shown = performance.now(); observer.disconnect() }
}).observe(document, { childList: true, subtree: true })"""


@pytest.mark.parametrize("n", [4096, 16_384])
def test_interactive_within_a_second(visit: Open, tmp_path: Path, n: int) -> None:
    path = small_pages.page(*many(n), densities=[0.1] * n).write(tmp_path)
    ready, answered, sorted_s = [], [], []
    for _ in range(3):
        page = visit(path.as_uri(), first_script=WHEN_SHOWN)
        page.locator("mark").first.wait_for()
        ready.append(page.evaluate("window.shown") / 1000)
        answered.append(_seconds(page, f"search.value = 'word{n - 1}'; search.dispatchEvent(new Event('input'))"))
        assert shown(page) == [n - 1]
        page.fill("#search", "")
        sorted_s.append(_seconds(page, "sort.value = 'l:1'; sort.dispatchEvent(new Event('change'))"))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*")) / 1e6
    print(
        f"\n  {n:,} latents, {size:.1f} MB of which {path.stat().st_size / 1e6:.2f} at once: contexts are shown after "
        f"{min(ready):.2f} s, a search takes {min(answered):.3f} s, sorting by label {min(sorted_s):.3f} s"
    )
    assert min(ready) < 1
    assert min(answered) < 0.1
    assert min(sorted_s) < 0.5


def _seconds(page: Page, done: str) -> float:
    found = (
        page.evaluate(f"() => {{ const began = performance.now(); {done}; return performance.now() - began }}") / 1000
    )
    assert math.isfinite(found)
    return found
