"""The tutorials run, and say what they are about."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.prove, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"


def printed(name: str, argument: Path) -> str:
    """Run a tutorial; what it prints."""
    done = subprocess.run(
        [sys.executable, TUTORIALS / name, argument],
        cwd=argument.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tutorial")
    return folder, printed("2_train.py", folder)


def test_training(trained: tuple[Path, str]) -> None:
    folder, said = trained
    for name in ("standard", "gated", "topk"):
        figures = ast.literal_eval(re.search(rf"^{name} (\{{.*\}})$", said, re.MULTILINE)[1])  # type: ignore[index]
        assert figures["explained_variance"] > 0.6, said
        assert (folder / name / "sae" / "cfg.json").is_file()
    assert re.search(r"^512 \{'l0': 16\.0, 'explained_variance': 0\.[6-9]", said, re.MULTILINE), said


def test_loading_and_analysing(trained: tuple[Path, str]) -> None:
    said = printed("1_load_and_analyse.py", trained[0] / "topk" / "sae")
    assert "topk, 512 latents, on blocks.2.hook_resid_post of demo" in said
    assert "gpt2-small/8-res-jb/1234" in said
    clean, spliced, exact = map(float, re.findall(r"(?:loss|SAE|back) (\d+\.\d+)", said))
    assert clean == exact < spliced < clean + 3


def test_steering_and_attributing(trained: tuple[Path, str]) -> None:
    said = printed("3_steer_and_attribute.py", trained[0] / "topk" / "sae")
    plain, steered = (re.search(rf"^{words}: (.*)$", said, re.MULTILINE)[1] for words in ("as it is", "steered"))  # type: ignore[index]
    assert plain != steered
    assert len(re.findall(r"^latent \d+: active at", said, re.MULTILINE)) == 5
