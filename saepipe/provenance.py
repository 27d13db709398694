"""What made a result: the code's commit, versions and the device, for whoever has to make it again."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import saepipe

if TYPE_CHECKING:
    import torch


COMMIT_FILE = "COMMIT"
"""Beside a copy of the packages (`launch.snapshot`): the commit that it was copied from."""


def git_commit() -> str | None:
    """Commit of the checkout that runs, with a + where files differ from it; None for an installed package."""
    here = Path(__file__)
    copied = here.parents[1] / COMMIT_FILE
    if copied.is_file():
        return copied.read_text() or None
    commands = (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"], ["status", "--porcelain", "."])
    try:
        _, commit, changed = (
            subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()
            for words in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, saepipe and some packages."""
    found = {"saepipe": saepipe.__version__, "python": platform.python_version()}
    return found | {package: version(package) for package in packages}


def device_name(device: "torch.device") -> str:
    """Name a device as its vendor does."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
