"""Searching a feature page, and the address of what is found."""

import re

import pytest
import small_pages
from browsing import Open, shown
from playwright.sync_api import Page, expect
from small_pages import excerpt, latent, many

N, PER_PAGE = 100, 24
PLAIN = {"bands": [], "sampled": [], "suppressed": [], "promoted": [("other", 1.0)]}
"""A latent that is about its own word only."""


def hit(page: Page, index: int) -> str:
    return page.locator(f"#latent-{index} .hit").text_content() or ""


def test_the_best_match_comes_first_and_says_what_it_is(opened: Open) -> None:
    own = [excerpt("so", 3.0)]
    page = opened(
        small_pages.page(
            latent(1, "9", **{**PLAIN, "promoted": [("x", 2.0), (" Dear", 1.0)]}),
            latent(2, "8", **{**PLAIN, "sampled": [excerpt(" Dear", 0.3)]}),
            latent(3, "7", **{**PLAIN, "sampled": [excerpt("Dear", 1.5)]}),
            latent(4, label="Dear · Sir", **PLAIN),
            latent(5, label="Dear", **PLAIN),
            latent(6, label="none", top=[excerpt("so", 3.0, before="my dear old friend, it is so ")], **PLAIN),
            latent(7, "6", **{**PLAIN, "top": own}),
        )
    )
    page.fill("#search", "dear")
    assert shown(page) == [5, 4, 3, 2, 1]
    assert page.locator(".hit").count() == 3
    assert hit(page, 3) == "fires on Dear at 50 % of its maximum "
    assert hit(page, 2) == "fires on  Dear at 10 % of its maximum "
    assert hit(page, 1) == "raises  Dear "
    page.fill("#search", " Dear")  # a label has no blanks around its tokens
    assert shown(page) == [5, 4, 2, 1]
    page.select_option("#sort", "i:1")
    page.fill("#search", "dear")
    page.click("#deep")
    expect(page.locator("#deep")).to_have_text("All contexts are searched")
    assert shown(page) == [5, 4, 3, 2, 1, 6]
    assert hit(page, 6) == "in a context my dear old friend,"


def test_numbers_find_latents_before_tokens(opened: Open) -> None:
    words = {3: "12", 12: "x", 40: "y", 50: "12,40"}
    page = opened(small_pages.page(*(latent(n, word, **PLAIN) for n, word in words.items()), densities=[0.1] * 60))
    for typed, expected in {"12": [12, 3, 50], "#12": [12], "40 12": [40, 12], "#40, #12": [40, 12]}.items():
        page.fill("#search", typed)
        assert shown(page) == expected, typed
    page.fill("#search", "12,40")
    assert shown(page) == [12, 40, 50]
    page.fill("#search", "12,13")
    assert shown(page) == [12]
    expect(page.locator("#latents > p")).to_contain_text("Latent 13 is not here")


def test_labels_that_begin_with_a_blank_or_a_sign_are_sorted_behind(opened: Open) -> None:
    labels = ["␣␣ · 3", "↵", "b", "(", "א", "9", "A"]
    page = opened(small_pages.page(*(latent(n, label=label, **PLAIN) for n, label in enumerate(labels))))
    page.select_option("#sort", "l:1")
    assert shown(page)[:4] == [5, 6, 2, 4]


def test_similar_latents_set_the_cosine_apart_and_say_which_are_not_there(opened: Open) -> None:
    near = [(8, 0.29), (9, 0.28)]
    page = opened(small_pages.page(latent(7, neighbours=near), latent(8, label="the · 1", neighbours=[(9, 0.5)])))
    chips = page.locator("#latent-7 .effects").last.locator(".chips")
    expect(chips).to_have_text("#8 the · 1 0.29#9 0.28dashed: not on this page")
    colours = [
        chips.locator(part).first.evaluate("one => getComputedStyle(one).color") for part in (".token", ".cosine")
    ]
    assert colours[0] != colours[1]
    expect(page.locator("#latent-8 .chips").last).to_have_text("#9 0.50not on this page")


def ring(page: Page, index: int) -> str:
    return page.locator(f"#latent-{index}").evaluate("one => getComputedStyle(one).outlineStyle")


@pytest.mark.parametrize("fragment", ["#latent-77", "#77"])
def test_an_address_and_a_click_put_a_ring_around_the_latent(opened: Open, fragment: str) -> None:
    page = opened(small_pages.page(*many(N)), fragment=fragment)
    expect(page.locator("#latent-77")).to_be_focused()
    assert shown(page)[0] == 72
    assert ring(page, 77) == "solid"
    page.locator("#latent-77 a.chip").first.click()
    expect(page.locator("#latent-78")).to_be_focused()
    assert ring(page, 78) == "solid"
    page.locator("#latent-80 h2 a").click()
    expect(page.locator("#latent-80")).to_be_focused()
    assert ring(page, 80) == "solid"


def test_back_and_forward_follow(opened: Open) -> None:
    page = opened(small_pages.page(*many(N)))
    page.select_option("#sort", "i:1")
    page.locator("#latent-23 a.chip").nth(3).click()
    expect(page.locator("#latent-27")).to_be_focused()
    page.go_back()  # to the latent that was left
    expect(page.locator("#latent-23")).to_be_focused()
    assert shown(page)[0] == 0
    page.go_forward()
    expect(page.locator("#latent-27")).to_be_focused()
    page.click("#after")
    assert shown(page)[0] == 2 * PER_PAGE
    page.go_back()
    expect(page.locator("#page")).to_have_value("2")
    page.locator("#search").press_sequentially("word9")
    page.go_back()  # all that was typed is one step
    expect(page.locator("#search")).to_have_value("")
    expect(page.locator("#latent-27")).to_be_focused()


def test_a_view_can_be_shared(opened: Open) -> None:
    page = opened(small_pages.page(*many(N)))
    page.select_option("#sort", "d:-1")
    page.fill("#search", "word & é%")
    assert shown(page) == []
    again = opened(small_pages.page(*many(N)), fragment=re.sub("^[^#]*", "", page.url))
    expect(again.locator("#search")).to_have_value("word & é%")
    page.fill("#search", "word")
    page.click("#after")
    assert page.url.endswith("#search=word&sort=d%3A-1&page=2")
    again = opened(small_pages.page(*many(N)), fragment=re.sub("^[^#]*", "", page.url))
    assert shown(again) == shown(page)
    expect(again.locator("#sort")).to_have_value("d:-1")
    expect(again.locator("#page")).to_have_value("2")
    page.locator("h2 a").nth(3).click()  # a latent, in what was found
    third = opened(small_pages.page(*many(N)), fragment=re.sub("^[^#]*", "", page.url))
    assert shown(third) == shown(page)
    expect(third.locator("article").nth(3)).to_be_focused()


@pytest.mark.parametrize("fragment", ["#sort=x&page=y", "#page=-3", "#page=1e9", "#%E0%A4%A", "#sort=d:1&latent-x"])
def test_an_address_of_nothing_shows_the_latents(opened: Open, fragment: str) -> None:
    assert shown(opened(small_pages.page(*many(N)), fragment=fragment))


def test_figures_say_what_they_are(opened: Open) -> None:
    page = opened(small_pages.page())
    figures = page.locator("#latent-7 .figures > div")
    assert figures.all_text_contents()[:3] == ["density1.23 %", "max activation3.00", "typical1.25"]
    assert all(figures.evaluate_all("all => all.map(one => one.title)"))
    assert "steer.strength" in str(figures.nth(2).get_attribute("title"))
    expect(page.locator("#latent-7 .scale")).to_have_text("0last bar ends at 4.00")
    assert "may begin inside a word" in str(page.get_by_role("tab", name="Top").get_attribute("title"))
