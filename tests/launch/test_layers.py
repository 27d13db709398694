"""launch stands on saepipe, and imports few libraries of others."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "launch"
ALLOWED = {"submitit", "hydra", "omegaconf", "torch"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_third_party_imports_are_few(path: Path) -> None:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert found - set(sys.stdlib_module_names) <= ALLOWED | {"saepipe", "launch"}
    assert len(path.read_text().splitlines()) <= 300
