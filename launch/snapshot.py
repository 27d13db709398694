"""The code and the versions as they are when a sweep is submitted: what is edited later changes no job of it."""

from importlib.metadata import distributions
from pathlib import Path

import launch
import saepipe
from saepipe import durable, provenance
from saepipe.composition_errors import CONF

_LEFT_OUT = ("__pycache__", "*.pyc", ".*")


def take(folder: Path, lock: Path) -> None:
    """Copy saepipe, launch and their configuration, and write down every package's version.

    Args:
        folder: Where to; it comes first in the jobs' PYTHONPATH.
        lock: File for the versions, which pip can read.
    """
    for package in (saepipe, launch):
        source = Path(str(package.__file__)).parent
        durable.copy_folder(source, folder / source.name, leave_out=_LEFT_OUT)
    if not (folder / "saepipe" / "conf").is_dir():  # of a checkout, where it is beside the package
        durable.copy_folder(CONF, folder / "conf", leave_out=_LEFT_OUT)
    durable.write_text(folder / provenance.COMMIT_FILE, provenance.git_commit() or "")
    versions = {found.metadata["Name"]: found.version for found in distributions()}
    own = {"saepipe"}
    lines = [f"{name}=={version}" for name, version in sorted(versions.items()) if name and name.lower() not in own]
    durable.write_text(lock, "\n".join([*lines, ""]))
