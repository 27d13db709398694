"""Every command of the README runs, in the README's order, in one folder; those that cannot at least compose.

An HTML comment above a fence says how: `test: skip, REASON`, `test: run`, `test: file PATH` (what a user writes into a
checkout), or `test: small KEY=VALUE ...`, whose overrides take the place of those keys in each cache and train command.
A fence without a mark is an error.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_models

from saepipe import entry
from saepipe.demo import corpus

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"(?:<!-- test: (?P<mark>[^\n]*) -->\n)?```(?P<kind>bash|python|yaml)\n(?P<body>.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A fence of commands."""

    mark: str
    kind: str
    body: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell fence, continued ones joined."""
        return self.body.replace("\\\n", " ").strip().splitlines() if self.kind == "bash" else []


BLOCKS = [Block(found["mark"] or "", found["kind"], found["body"]) for found in FENCE.finditer(README)]
RUN = [number for number, block in enumerate(BLOCKS) if not block.mark.startswith("skip")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, a parquet file, and the environment that `make setup` made."""
    folder = tmp_path_factory.mktemp("user")
    small_models.make(folder / "my-model", "llama", max_position_embeddings=256)
    texts = [corpus.document(index, seed=4).text for index in range(300)]
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    for name in ("saepipe", "conf"):  # a checkout, to which a user may add
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_every_block_says_how_it_is_tested() -> None:
    assert len(RUN) >= 3
    for block in BLOCKS:
        assert re.match(r"skip, .+|run$|small .+|file .+", block.mark), f"no mark above:\n{block.body}"


@pytest.mark.prove
@pytest.mark.parametrize("number", RUN)
def test_block_runs(folder: Path, number: int) -> None:
    block = BLOCKS[number]
    if block.mark.startswith("file"):
        (folder / "checkout" / block.mark.removeprefix("file").strip()).write_text(block.body)
        return
    checkout = str(folder / "checkout")
    environment = {**os.environ, "PYTHONPATH": checkout, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if block.kind == "python":
        command = [sys.executable, "-c", block.body]
    else:
        small = f" {block.mark.removeprefix('small').strip()}" if block.mark.startswith("small") else ""
        keys = {override.split("=")[0] for override in small.split()}
        lines = [shortened(line, keys) + small if needs_budget(line) else line for line in block.commands]
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def needs_budget(line: str) -> bool:
    return re.match(r"python -m saepipe\.(cache|train) ", line) is not None


def shortened(line: str, keys: set[str]) -> str:
    return shlex.join(word for word in shlex.split(line) if word.split("=")[0] not in keys)


def test_every_command_composes_or_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    checked, added = 0, {f"sae={Path(block.mark).stem}" for block in BLOCKS if block.mark.startswith("file")}
    for line in (line for block in BLOCKS for line in block.commands):
        words = shlex.split(line)
        if added & {*words}:  # which only a checkout with those files knows, where it is run
            continue
        if words[:3] == ["python", "-m", "saepipe.shards"]:
            assert words[3] in ("verify", "info", "repair")
            checked += 1
        elif words[:3] == ["python", "-m", "saepipe.export"]:
            assert words[5:6] in ([], ["--to"])
            checked += 1
        elif words[:2] == ["python", "-m"]:
            overrides = [word for word in words[3:] if word != "-m"]
            entry.load_config(
                words[2].removeprefix("saepipe.").removesuffix(".submit"),
                [word if "/" in word or "[" in word else word.split(",")[0] for word in overrides],
            )
            checked += 1
        elif words[0] == "make":
            assert set(words[1:]) <= targets
            checked += 1
    assert checked >= 8


def test_what_the_text_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in links:
        assert link in anchors or (ROOT / link).exists(), link
