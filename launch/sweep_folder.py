"""What lies in a submitted sweep's folder: what was asked for, the frozen code, the jobs, and what became of them.

`<run.dir>/launch/1/` is a submission, the next one of the same sweep is 2. In it are

- `sweep.json`: the stages and their jobs,
- `code/`: saepipe, launch and conf as they were,
- `requirements.txt`: the versions of every package,
- `configs/train-0.yaml` and so on: the resolved configuration of each task,
- `logs/train/` and so on: a cluster's batch scripts, and what they printed,
- `tasks/train-0/` and so on: log.txt, starts.jsonl, outcome.json, and `cancelled` once it is,
- `runner`: without a cluster, the process that runs the stages.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saepipe import durable, entry
from saepipe.config import RunConfig
from saepipe.errors import UserError

_START = "==> start "
"""How each start of a task begins in its log."""
_CURE = "delete the submission's folder, and submit the sweep again, which goes on from what its runs left"
FINAL = ("done", "failed", "cancelled")
"""Outcomes after which a task never starts again."""


@dataclass
class Task:
    """A job, as often as it takes to end it."""

    title: str
    """What it is about: a point of the sweep, or the store."""
    run_dir: str
    """Folder of its run; of the store's tasks, the sweep's."""
    job_id: str | None = None
    """What the scheduler calls it, once it is submitted."""


@dataclass
class Stage:
    """Tasks that do the same for different points, or a part each of one thing."""

    name: str
    tasks: list[Task]
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    after: str | None = None
    """The stage that has to be done before."""
    each: bool = False
    """Whether a task only waits for the task of the same number."""
    anyhow: bool = False
    """Whether it also begins where the stage before it failed."""
    workers: int = 1
    """Processes of each rank."""


@dataclass
class Outcome:
    """What became of a task when it last ended."""

    state: str
    """done, failed, cancelled or requeued."""
    why: str = ""
    """The cause, where it is not done."""
    interrupted: bool = False
    """Whether others ended it before its time was up, which says nothing about itself."""
    time: float = field(default_factory=time.time)
    """When, in seconds since 1970."""

    @classmethod
    def on_request(cls) -> "Outcome":
        """What becomes of a task that `launch.cancel` stops."""
        return cls("cancelled", "cancelled by launch.cancel")


class SweepFolder:
    """A submission of a sweep.

    Args:
        folder: `<run.dir>/launch/<number>`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.code = self.folder / "code"
        self.lock = self.folder / "requirements.txt"
        self.logs = self.folder / "logs"
        self._file = self.folder / "sweep.json"

    @classmethod
    def newest(cls, run_dir: str | Path) -> "SweepFolder":
        """Find the last submission of a sweep.

        Raises:
            UserError: Nothing was submitted from there.
        """
        return cls.all(run_dir)[0]

    @classmethod
    def all(cls, run_dir: str | Path) -> list["SweepFolder"]:
        """Find every submission of a sweep, the last one first.

        Raises:
            UserError: Nothing was submitted from there.
        """
        found = [cls(folder) for folder in _numbered(run_dir) if (folder / "sweep.json").exists()]
        if not found:
            raise UserError(f"{run_dir} holds no submitted sweep; python -m launch.submit makes one")
        return found[::-1]

    @classmethod
    def next(cls, run_dir: str | Path) -> "SweepFolder":
        """Name the folder of the next submission."""
        taken = _numbered(run_dir)  # also by one that broke off
        return cls(Path(run_dir).resolve() / "launch" / str(1 + int(taken[-1].name) if taken else 1))

    @property
    def run_dir(self) -> Path:
        """The sweep's folder, in which each point has one."""
        return self.folder.parents[1]

    def write(self, stages: list[Stage], **more: Any) -> None:
        """Write what was submitted; `more` is kept beside it."""
        kept = {**(self._read() if self._file.exists() else {}), **more}
        durable.write_text(self._file, json.dumps({**kept, "stages": [asdict(stage) for stage in stages]}, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            text = self._file.read_text()
        except OSError as error:
            raise UserError(f"{self._file} cannot be read ({error.strerror}); {_CURE}") from None
        kept = _json(self._file, text)
        if "stages" not in kept:
            raise UserError(f"{self._file} is damaged (no stages); {_CURE}")
        return kept

    @property
    def about(self) -> dict[str, Any]:
        """What was kept beside the stages: executor, command, time."""
        return {key: value for key, value in self._read().items() if key != "stages"}

    @property
    def stages(self) -> list[Stage]:
        """The stages, in order."""
        return [
            Stage(**{**stage, "tasks": [Task(**task) for task in stage["tasks"]]}) for stage in self._read()["stages"]
        ]

    def stage(self, name: str) -> Stage:
        """Return a stage by its name."""
        return next(stage for stage in self.stages if stage.name == name)

    def config_file(self, stage: str, index: int) -> Path:
        """Where the configuration of a task is."""
        return self.folder / "configs" / f"{stage}-{index}.yaml"

    def config(self, stage: str, index: int) -> RunConfig:
        """Read the configuration of a task."""
        return entry.read_config(self.config_file(stage, index))

    def task_folder(self, stage: str, index: int) -> Path:
        """Where a task's log and fate are."""
        return self.folder / "tasks" / f"{stage}-{index}"

    def log_file(self, stage: str, index: int) -> Path:
        """What a task printed, over all of its starts."""
        return self.task_folder(stage, index) / "log.txt"

    def find(self, wanted: str | None) -> list[tuple[str, int]]:
        """Find tasks: all, or those of a name (a point's, a stage's, or one such as train-0); none may fit."""
        return [
            (stage.name, index)
            for stage in self.stages
            for index, task in enumerate(stage.tasks)
            if wanted in (None, stage.name, task.title, f"{stage.name}-{index}")
        ]

    def names(self) -> list[str]:
        """What `find` knows tasks by."""
        tasks = [(stage.name, at, task.title) for stage in self.stages for at, task in enumerate(stage.tasks)]
        return [*dict.fromkeys(title for _, _, title in tasks), *(f"{stage}-{at}" for stage, at, _ in tasks)]

    def script_logs(self, stage: str, index: int) -> list[Path]:
        """What a task's batch script printed before the task began: modules, and why Python did not start."""
        job = self.stage(stage).tasks[index].job_id
        return sorted((self.logs / stage).glob(f"{job}_*_log.out")) if job else []

    def outcome(self, stage: str, index: int) -> Outcome | None:
        """Read what became of a task when it last ended; None: it has not begun, or is at it."""
        path = self.task_folder(stage, index) / "outcome.json"
        return Outcome(**_json(path, path.read_text())) if path.exists() else None

    def end(self, stage: str, index: int, outcome: Outcome) -> None:
        """Write what became of a task."""
        durable.write_text(self.task_folder(stage, index) / "outcome.json", json.dumps(asdict(outcome)))

    def cancel(self, stage: str, index: int) -> None:
        """Have a task end, and never begin again."""
        file = self.task_folder(stage, index) / "cancelled"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def is_cancelled(self, stage: str, index: int) -> bool:
        """Tell whether a task was cancelled by `launch.cancel`."""
        return (self.task_folder(stage, index) / "cancelled").exists()

    def starts(self, stage: str, index: int) -> list[dict[str, Any]]:
        """Read when and where a task was started, and how far it was then."""
        path = self.task_folder(stage, index) / "starts.jsonl"
        return [_json(path, line) for line in path.read_text().splitlines()] if path.exists() else []

    def begin(self, stage: str, index: int, **start: Any) -> None:
        """Write down a start, and that an earlier outcome is none any more."""
        folder = self.task_folder(stage, index)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "outcome.json").unlink(missing_ok=True)
        number = len(self.starts(stage, index)) + 1
        with (folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), **start}) + "\n")
        with self.log_file(stage, index).open("a") as file:
            file.write(f"\n{_START}{number} on {start.get('nodes')}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")

    def last_words(self, stage: str, index: int) -> str:
        """Return the line of a task's log that says most: saepipe's own last sentence, else the last line."""
        path = self.log_file(stage, index)
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            _, begun, text = file.read().decode(errors="replace").rpartition(_START)
        text = text.partition("\n")[2] if begun else text
        lines = [line.split("\r")[-1].strip() for line in text.split("\n")]
        said = [line for line in lines if line and not line.startswith(("srun:", "slurmstepd:"))]
        own = [line.removeprefix("saepipe: ") for line in said[-40:] if line.startswith("saepipe: ")]
        return (own or said or [""])[-1]


def _numbered(run_dir: str | Path) -> list[Path]:
    """The folders of a sweep's submissions, also of those that broke off, in order."""
    found = [path for path in (Path(run_dir).resolve() / "launch").glob("*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def _json(path: Path, text: str) -> dict[str, Any]:
    """Read an object from a file's text."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); {_CURE}") from None
