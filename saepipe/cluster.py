"""A cluster's profile: how `launch` asks its scheduler for nodes. Values live in `conf/slurm/<cluster>.yaml`."""

import shlex
from dataclasses import dataclass, field, fields, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from saepipe.errors import UserError, unknown
from saepipe.keys import Group, key

EXECUTORS = ("local", "slurm")
_OF_ALL_STAGES = ("stages", "executor", "dry_run", "cache_jobs", "min_nodes", "nodes", "gpus_per_node")
STAGES = ("tokenise", "cache", "train", "evaluate", "collect")


@dataclass
class SlurmConfig(Group, group="slurm"):
    """A cluster; or this machine, on which the stages run one after the other."""

    executor: str = key("local", choices=EXECUTORS)
    """slurm, or local: this machine without a scheduler."""
    dry_run: bool = False
    """Check everything, print the plan and the batch scripts, and submit nothing."""
    partition: str | None = None
    """Partition; None is the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes to keep away from."""
    gres: str | None = None
    """Generic resource of one GPU, such as `gpu` or `gpu:a100`, without a number: a node is asked for one per rank, so
    eight of them are trainer.devices=8 (caching: cache.workers=8). None: no GPUs."""
    cpus_per_rank: int = key(1, least=1)
    """CPU cores of a rank, or of one of cache.workers."""
    mem_gb: float | None = key(None, above=0)
    """Memory of a rank, or of one of cache.workers, in GB; None is the cluster's default."""
    time_min: int = key(240, least=1)
    """Time limit of a job in minutes. A stage that needs longer goes on in another job, as often as it takes."""
    signal_delay_s: int = key(120, least=1)
    """Seconds before the time limit, and before a preemption where the cluster tells of it, to save and requeue in.
    SLURM looks at the limits every 30 s, so it may be as much more."""
    cache_jobs: int = key(1, least=1)
    """Jobs that cache one store together, each on a node."""
    array_parallelism: int | None = key(None, least=1)
    """Most jobs of a stage at a time; None is no limit, and on this machine one."""
    min_nodes: int | None = key(None, least=1)
    """Fewest nodes to train on where trainer.num_nodes cannot be had; None is exactly as many."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before everything else in a cluster's job: modules, an environment, a proxy. One that fails ends
    the job."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the jobs."""
    python: str | None = key(None, filled="name a command, or leave it out")
    """Command that starts Python, such as `apptainer exec --nv sae.sif python`; None is the one that submits."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun, which starts the ranks."""
    sbatch_args: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, without the dashes."""
    mail_user: str | None = None
    """Who is written to."""
    mail_type: str | None = None
    """When: END, FAIL and others, as sbatch has them."""
    scratch: str | None = key(None, filled="name a folder, or leave it out")
    """Folder on each node's own disk, such as $TMPDIR, to which the store is copied before training; None: it is read
    where it is."""
    nodes: int | None = key(None, least=1)
    """Nodes that the cluster has, to check against; None asks nobody."""
    gpus_per_node: int | None = key(None, least=0)
    """GPUs that a node has, to check against; None asks nobody."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage (tokenise, cache, train, evaluate, collect) -> keys of this group that differ for it."""

    def __post_init__(self) -> None:
        """Check the stages' own keys as well."""
        super().__post_init__()
        for stage in self.stages:
            if stage not in STAGES:
                raise unknown("slurm.stages", stage, STAGES)
            self.of(stage)
        try:
            shlex.split(self.python or "")
        except ValueError as error:
            raise UserError(f"slurm.python={self.python} is no command ({error}); write it as in a shell") from None
        if self.signal_delay_s >= 60 * self.time_min:
            raise UserError(
                f"slurm.signal_delay_s={self.signal_delay_s} is not less than slurm.time_min={self.time_min}, in "
                f"seconds; try slurm.signal_delay_s={max(1, 10 * self.time_min)}"
            )

    def of(self, stage: str) -> "SlurmConfig":
        """Return the profile with what differs for a stage.

        Raises:
            UserError: A key that is none of a stage's, or a value of another type.
        """
        own, kinds = self.stages.get(stage) or {}, get_type_hints(SlurmConfig)
        known = [item.name for item in fields(self) if item.name not in _OF_ALL_STAGES]
        for name, value in own.items():
            if name not in known:
                raise unknown("key", f"slurm.stages.{stage}.{name}", [f"slurm.stages.{stage}.{each}" for each in known])
            if not _fits(value, kinds[name]):
                raise UserError(f"slurm.stages.{stage}.{name}={value} is no value of slurm.{name}: {kinds[name]}")
        return replace(self, stages={}, **own)


def _fits(value: object, kind: Any) -> bool:
    """Tell whether a value is of a field's type, of which Hydra checks only those outside of `stages`."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return any(isinstance(value, get_origin(each) or each) for each in (*kinds, *([int] if float in kinds else [])))
