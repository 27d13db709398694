import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from saepipe import provenance


def test_versions_and_device() -> None:
    assert set(provenance.versions("torch")) == {"saepipe", "python", "torch"}
    assert provenance.device_name(torch.device("cpu")).startswith("cpu (")


def test_the_commit_is_the_checkouts_own(tmp_path: Path) -> None:
    """An installed package below another project's checkout has no commit; a tracked one has, and a + if changed."""
    package = tmp_path / "saepipe"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = 'ours'\n")
    shutil.copy(provenance.__file__, package)

    def commit() -> str:
        code = "from saepipe import provenance; print(provenance.git_commit())"
        printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return printed.stdout.strip()

    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git("add", ".gitignore")
    git("commit", "-m", "another project")
    assert commit() == "None"
    git("add", "saepipe")
    git("commit", "-m", "ours")
    assert re.fullmatch("[0-9a-f]{40}", commit())
    (package / "__init__.py").write_text("__version__ = 'changed'\n")
    assert re.fullmatch(r"[0-9a-f]{40}\+", commit())
