"""Which of many processes this is, and the ones that it starts."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from saepipe import workers
from saepipe.config import CacheConfig, RunConfig
from saepipe.errors import UserError
from saepipe.workers import Worker, started

ROOT = Path(__file__).parents[1]
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Worker(0, 1, 0)),
        (SRUN, Worker(5, 8, 1)),
        (ARRAY | {"SLURM_PROCID": "0"}, Worker(3, 4, 0)),  # the script of a task, without srun
        (ARRAY | SRUN, Worker(3 * 8 + 5, 4 * 8, 1)),
        (TORCHRUN, Worker(3, 4, 1)),
        (TORCHRUN | SRUN, Worker(3, 4, 1)),  # torchrun, started by srun
        (TORCHRUN | ARRAY, Worker(3 * 4 + 3, 4 * 4, 1)),
        ({"SLURM_ARRAY_TASK_ID": "2"}, Worker(2, 1, 0)),
    ],
)
def test_what_the_scheduler_says(environment: dict[str, str], expected: Worker) -> None:
    assert Worker.here(environment | {"HOME": "/home/me"}) == expected


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "²", "0", "0x1"])
@pytest.mark.parametrize("names", [SRUN, ARRAY, TORCHRUN, {**SRUN, **ARRAY, **TORCHRUN}])
def test_nonsense_is_one_worker(names: dict[str, str], value: str) -> None:
    assert Worker.here(dict.fromkeys(names, value)) == Worker(0, 1, 0)


def test_one_value_of_nonsense_divides_by_nothing() -> None:
    everything = SRUN | ARRAY | TORCHRUN
    for name in everything:
        for value in ("0", "x", "99"):
            worker = Worker.here(everything | {name: value})
            assert worker.count >= 1
            assert worker.index >= 0


def test_a_worker_becomes_several() -> None:
    assert Worker(2, 3, 1).split(1) == [Worker(2, 3, 1)]
    parts = [part for index in range(3) for part in Worker(index, 3, index % 2).split(4)]
    assert [part.index for part in parts] == list(range(12))
    assert {part.count for part in parts} == {12}
    assert [part.local_rank for part in parts] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]


def test_alone_starts_no_others() -> None:
    config = RunConfig(cache=CacheConfig(workers=4))
    assert workers.alone(config).cache.workers == 1
    assert (config.cache.workers, workers.alone(config).store) == (4, config.store)


# ---- started


@dataclass(frozen=True)
class Config:
    """What the helpers below are told."""

    folder: Path
    fate: dict[int, str] = field(default_factory=dict)


def help_out(config: Config, worker: Worker) -> None:
    """What a helper does, in its own process."""
    (config.folder / f"begun {worker.index}").write_text(str(os.getpid()))
    match config.fate.get(worker.index, "work"):
        case "refuse":
            raise UserError(f"store.dir=x is refused by {worker.index}; choose another")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stuck":
            time.sleep(60)
    (config.folder / f"done {worker.index}").write_text(os.environ.get("OMP_WAIT_POLICY", ""))


HELPERS = [Worker(1, 4), Worker(2, 4), Worker(3, 4)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.stat().st_size)


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(process: int) -> bool:
    """Whether a process is gone, and no zombie either."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_helpers_work_while_the_block_runs_and_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    before = dict(os.environ)
    with started(help_out, Config(tmp_path), HELPERS[:2]):
        assert os.environ == before
        wait_until(lambda: names(tmp_path))
    assert names(tmp_path) == ["begun 1", "begun 2", "done 1", "done 2"]
    assert {path.read_text() for path in tmp_path.glob("done *")} == {"passive"}
    assert os.environ == before
    assert multiprocessing.active_children() == []
    assert all(ended(int(path.read_text())) for path in tmp_path.glob("begun *"))


def test_the_users_own_wait_policy_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with started(help_out, Config(tmp_path), HELPERS[:1]):
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert (tmp_path / "done 1").read_text() == os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_an_error_of_a_helper_is_raised_and_one_that_is_killed_is_none(tmp_path: Path) -> None:
    fate = {1: "killed", 2: "refuse"}
    with pytest.raises(UserError, match=r"^store.dir=x is refused by 2; choose another$"):  # noqa: SIM117
        with started(help_out, Config(tmp_path, fate), HELPERS):
            pass
    assert names(tmp_path) == ["begun 1", "begun 2", "begun 3", "done 3"]
    (tmp_path / "second").mkdir()
    with started(help_out, Config(tmp_path / "second", {1: "killed"}), HELPERS[:1]):
        pass
    assert names(tmp_path / "second") == ["begun 1"]


def test_helpers_end_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), started(help_out, Config(tmp_path, {1: "stuck"}), HELPERS[:1]):
        wait_until(lambda: names(tmp_path) and 1 / 0)
    assert names(tmp_path) == ["begun 1"]
    assert ended(int((tmp_path / "begun 1").read_text()))


def test_no_helpers_start_nothing() -> None:
    with started(help_out, None, []):
        assert multiprocessing.active_children() == []


def test_helpers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
        "import test_workers as mine\n"
        "if __name__ == '__main__':\n"
        "    config = mine.Config(Path(sys.argv[1]), {1: 'stuck', 2: 'stuck'})\n"
        "    with mine.started(mine.help_out, config, mine.HELPERS[:2]):\n"
        "        mine.time.sleep(60)\n"
    )
    folder = tmp_path / "helpers"
    folder.mkdir()
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(folder)]) as parent:
        wait_until(lambda: names(folder) == ["begun 1", "begun 2"])
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: all(ended(int(path.read_text())) for path in folder.iterdir()))
