"""A browser for the tests of this folder, and pages opened in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Open, chromium
from playwright.sync_api import Browser, Page, sync_playwright

from saepipe.feature_page import FeaturePage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.pages)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open an address in a window of its own; fails on errors in the page, dialogs, and requests to anywhere else."""
    contexts, wrong = [], []

    def visit(address: str, *, fragment: str = "", first_script: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}") or dialog.dismiss())
        here = address.rsplit("/", 1)[0]
        page.on("request", lambda request: request.url.startswith(here) or wrong.append(f"request: {request.url}"))
        page.add_init_script(first_script)
        page.goto(address + fragment)
        page.wait_for_selector("[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def opened(visit: Open, tmp_path: Path) -> Open:
    """Write a page and open it from disk."""

    def opened(page: FeaturePage, **options: Any) -> Page:
        return visit(page.write(tmp_path / "features").as_uri(), **options)

    return opened
