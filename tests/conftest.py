"""What every test runs under: no network, no scheduler, few threads, and tensor shapes checked.

The environment is set before anything is imported, so that it also holds in the processes that tests start.
"""

import atexit
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from saepipe.store import Store

OUTSIDE = ("SLURM", "SUBMITIT_", "WANDB_", "HF_", "HUGGING", "TRANSFORMERS_", "HYDRA_", "PL_")
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

for name in [name for name in os.environ if name.startswith(OUTSIDE) or name in RANKS]:
    del os.environ[name]

_hub_cache = tempfile.mkdtemp(prefix="saepipe-tests-")
atexit.register(shutil.rmtree, _hub_cache, ignore_errors=True)
os.environ |= {
    "HF_HOME": _hub_cache,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns whenever a test starts a process after using one
    "OMP_NUM_THREADS": "1",  # tensors are small here; on a busy machine waiting threads made an encode 100 times slower
}

# Checks the shapes and types of every call into saepipe: about 0.06 ms a call. An int is welcome where a float is due.
install_import_hook("saepipe", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest, for which others would have to wait where files run side by side."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@pytest.fixture(scope="module")
def short_timing() -> Iterator[None]:
    """Have the projection time a model for a moment only."""
    from saepipe import projection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_TIMING_S", 0.01)
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> "Store":
    """The store that `small_store.build` makes; not to be changed."""
    from small_store import build

    return build(tmp_path_factory.mktemp("reference") / "store")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model` and a `text.jsonl` to cache activations of."""
    import small_models

    folder = tmp_path_factory.mktemp("inputs")
    small_models.make(folder / "model", "llama")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in small_models.TEXTS))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 kB, for `mount -o remount,size=` to change."""
    mount = shutil.which("mount")
    if mount is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root and mount, to make a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine does not let a test mount a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # the last store may still be mapped
