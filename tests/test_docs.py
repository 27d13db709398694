"""The API reference is built from the docstrings."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.prove
def test_the_api_reference_has_a_page_for_every_module(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "docs/api.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/index.html" in done.stdout
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "saepipe").rglob("*.py")]
    expected = {path for path in modules if path.name not in ("__init__", "__main__", "sparse_triton")}
    assert {path for path in expected if not (tmp_path / f"{path}.html").is_file()} == set()
    assert "from_pretrained" in (tmp_path / "search.js").read_text()
