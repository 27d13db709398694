"""A real cluster for the tests of this folder, and a desk to work from."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from login_desk import ROOT, Desk
from slurm_cluster import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if slurm_cluster.missing():
        if os.environ.get("SAEPIPE_CLUSTER_TESTS") == "skip":
            pytest.skip(f"not installed: {', '.join(slurm_cluster.missing())}")
        slurm_cluster.install()
    # Not below pytest's own folder: a socket's path may have 107 characters.
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("c")))
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the demo, cached without the cluster."""
    folder = tmp_path_factory.mktemp("store") / "acts"
    done = subprocess.run(
        [sys.executable, "-m", "saepipe.cache", "+experiment=demo", "store.tokens=60000", f"store.dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Iterator[Desk]:
    yield Desk(tmp_path, cluster.environment)
    cluster.run("scancel", "--user=root", "--full")
    cluster.run("scancel", "--user=root")
