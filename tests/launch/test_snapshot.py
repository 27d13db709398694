"""The frozen code and versions of a submission."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from launch import snapshot
from saepipe import provenance


def test_a_copy_runs_by_itself_and_knows_its_commit_and_versions(tmp_path: Path) -> None:
    snapshot.take(tmp_path / "code", tmp_path / "requirements.txt")
    assert not list((tmp_path / "code").rglob("*.pyc"))
    program = (
        "import saepipe, launch, saepipe.composition_errors as errors, saepipe.provenance as provenance\n"
        "print(saepipe.__file__, launch.__file__, errors.CONF, provenance.git_commit())"
    )
    environment = {"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *places, commit = done.stdout.split()
    assert all(place.startswith(str(tmp_path / "code")) for place in places)
    assert commit == str(provenance.git_commit())
    assert (tmp_path / "code" / "saepipe" / "demo").is_dir()
    assert f"torch=={version('torch')}" in (tmp_path / "requirements.txt").read_text().splitlines()
