"""A Chromium, installed with apt, as root, where there is none."""

import os
import shutil
import subprocess
from collections.abc import Callable

from playwright.sync_api import Page

Open = Callable[..., Page]
PACKAGES = ("chromium", "fonts-dejavu-core")


def shown(page: Page) -> list[int]:
    """Return the numbers of the latents whose cards are there, in their order."""
    return page.locator("article").evaluate_all("all => all.map(one => Number(one.id.replace('latent-', '')))")


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = shutil.which("chromium")
    assert found
    return found
