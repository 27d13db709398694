"""The wheel works away from the checkout, and the checkout holds what a newcomer needs and nothing heavy."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MB = 1 << 20


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run(command, cwd=cwd, env=environment or None, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), cwd=ROOT)
    return next(folder.glob("saepipe-*.whl"))


def test_wheel_carries_every_file_of_the_package_and_the_configuration(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"saepipe/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    files = [path for name in ("saepipe", "launch") for path in (ROOT / name).rglob("*")]
    ours = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    wanted |= {path.relative_to(ROOT).as_posix() for path in ours}
    assert "saepipe/conf/train.yaml" in wanted
    assert "saepipe/demo/model/model.safetensors" in wanted
    assert not wanted - packed
    assert not [name for name in packed if name.startswith(("tests", "conf")) or "__pycache__" in name]


def test_wheel_answers_help_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target))
    run(*pip, str(wheel), cwd=elsewhere)
    python = {"PYTHONPATH": str(target), "PATH": "/nowhere"}
    where = run(sys.executable, "-c", "import saepipe; print(saepipe.__file__)", cwd=elsewhere, **python)
    assert Path(where.strip()).is_relative_to(target)
    shown = run(sys.executable, "-m", "saepipe.train", "--help", cwd=elsewhere, **python)
    assert "batch_tokens" in shown


def test_every_direct_dependency_is_pinned_and_every_pin_is_exact() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    for pin in pins.values():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), pin  # no range, and no local build such as +cpu
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    for wanted in map(Requirement, project["dependencies"] + extras):
        if canonicalize_name(wanted.name) != "saepipe":
            pin = pins[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} is outside {wanted}"


def test_no_heavy_file_but_the_demo_model() -> None:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in listed if name and (ROOT / name).is_file()}
    assert "pyproject.toml" in sizes
    heavy = {name: size for name, size in sizes.items() if size > MB and not name.startswith("saepipe/demo/model/")}
    assert not heavy, f"over 1 MB, so they belong elsewhere: {heavy}"
    assert sum(size for name, size in sizes.items() if name.startswith("saepipe/demo/model/")) <= 4 * MB
