"""A real SLURM on this machine, as root: munge, accounting, a controller and several nodes, in a temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server")
"""What Debian and Ubuntu call it."""
BINARIES = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
_START_S = 60.0


def missing() -> list[str]:
    """List the programs that are not installed."""
    return [name for name in BINARIES if not _program(name)]


def install() -> None:
    """Install SLURM with apt, as root."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # The services would start daemons of their own on the usual ports.
    policy = Path("/usr/sbin/policy-rc.d")
    kept = policy.read_bytes() if policy.exists() else None
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    finally:
        policy.unlink() if kept is None else policy.write_bytes(kept)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/libexec")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass
class Cluster:
    """The daemons of a cluster with partitions `low` and, preempting it, `high`.

    Args:
        folder: An empty folder, absolute.
        nodes: How many nodes, p1, p2 and so on, of two CPUs each.
    """

    folder: Path
    nodes: int = 4
    max_array_size: int = 4
    """Most tasks of an array; the usual 1001 would take a sweep as large."""
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        """The cluster's configuration file."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to speak with this cluster and no other."""
        foreign = ("SLURM", "SBATCH", "SQUEUE", "SCANCEL", "SUBMITIT")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return {**kept, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        for name in ("run", "log", "state", "spool", "db"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "db").chmod(0o777)
        _name_nodes([f"p{number + 1}" for number in range(self.nodes)])
        self._munge()
        self._write_configuration()
        self._database()
        self._daemon("slurmdbd", "-D")
        _wait(lambda: self._accepts(self.dbd_port), "slurmdbd")
        self._accounts()
        self.start_controller()
        for number in range(self.nodes):
            self.start_node(f"p{number + 1}")
        _wait(lambda: self.states().count("idle") == self.nodes, "the nodes")

    def stop(self) -> None:
        """End every daemon, and what they run."""
        with suppress(subprocess.TimeoutExpired, OSError):
            self.run("scancel", "--user", "root")
            _wait(lambda: not self.run("squeue", "-h").stdout.strip(), "the queue to empty", 15)
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        self.daemons.clear()

    def start_controller(self) -> None:
        """Start the controller, which goes on with what it knew."""
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        _wait(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld")

    def stop_controller(self) -> None:
        """Stop the controller; the nodes go on with their jobs."""
        daemon = self.daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(30)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._daemon("slurmd", "-D", "-N", name, "-f", str(self.conf), known_as=name)

    def kill_node(self, name: str) -> None:
        """Kill the daemon of a node and all that it started, as if the machine lost its power."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for pid in self.processes_on(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def drain(self, *names: str) -> None:
        """Give nodes no further job."""
        self._update(names, "state=drain", "reason=test")

    def resume(self, *names: str) -> None:
        """Give nodes jobs again."""
        self._update(names, "state=resume")

    def _update(self, names: Sequence[str], *settings: str) -> None:
        done = self.run("scontrol", "update", f"nodename={','.join(names)}", *settings)
        assert done.returncode == 0, done.stderr

    def processes_on(self, name: str) -> list[int]:
        """List the processes that a node's daemon started."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                words = environ.read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={name}".encode() in words and f"SLURM_CONF={self.conf}".encode() in words:
                    found.append(int(environ.parent.name))
        return found

    def run(self, *command: str, timeout: float = 60, **more: object) -> "subprocess.CompletedProcess[str]":
        """Run a command against this cluster."""
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, **more
        )

    def states(self) -> list[str]:
        """States of the nodes."""
        return self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t").stdout.split()

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol says of a job; nothing of one that it has forgotten."""
        shown = self.run("scontrol", "show", "job", "-o", job_id).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def preempt(self, *names: str) -> None:
        """Take nodes, all if none is named, for a job of higher priority, for a moment."""
        nodes = [f"--nodes={len(names) or self.nodes}", *([f"--nodelist={','.join(names)}"] if names else [])]
        taken = self.run("sbatch", "--partition=high", *nodes, "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
        assert taken.returncode == 0, taken.stderr
        job = taken.stdout.split()[-1]
        _wait(lambda: self.job(job).get("JobState") in ("COMPLETED", "COMPLETING"), "the preempting job")

    def _daemon(self, program: str, *arguments: str, known_as: str | None = None) -> None:
        found = _program(program)
        assert found, program
        name = known_as or program
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                # Where a test is killed, its cluster ends as well.
                ["setpriv", "--pdeathsig=TERM", found, *arguments],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _munge(self) -> None:
        (self.folder / "munge").mkdir(mode=0o700)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.munge_socket = self.folder / "munge" / "socket"
        (self.folder / "munge").chmod(0o711)
        places = {name: self.folder / "munge" / name for name in ("pid-file", "log-file", "seed-file")}
        self._daemon(
            "munged",
            *("-F", "--force", f"--key-file={key}", f"--socket={self.munge_socket}"),
            *(f"--{name}={path}" for name, path in places.items()),
        )
        _wait(self.munge_socket.exists, "munged")

    def _database(self) -> None:
        folder, port = self.folder / "db", self.database_port
        common = ["--no-defaults", f"--datadir={folder}"]
        log = (self.folder / "log" / "mariadb-install.out").open("wb")
        with log:
            subprocess.run(
                ["mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--user=root"],
                check=True, stdout=log, stderr=log,
            )  # fmt: skip
        self._daemon(
            "mariadbd",
            *common,
            *("--user=root", "--bind-address=127.0.0.1", f"--port={port}", f"--socket={folder}/socket"),
            *("--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--skip-log-bin"),
        )
        _wait(lambda: self._accepts(port), "mariadbd")
        account = "CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm.* TO 'slurm'@'localhost';"
        account += account.replace("'localhost'", "'127.0.0.1'")
        subprocess.run(["mariadb", "--no-defaults", f"--socket={folder}/socket", "-e", account], check=True)

    def _accounts(self) -> None:
        """Charge root's jobs to the account `lab`; with the QOS `few`, two jobs at most are in the queue."""
        for words in (
            ["cluster", "saepipe"],
            ["qos", "few", "MaxSubmitJobsPerUser=2"],
            ["account", "lab"],
            ["user", "root", "account=lab", "qos=normal,few", "defaultqos=normal"],
        ):
            done = self.run("sacctmgr", "--immediate", "add", *words)
            assert done.returncode == 0, done.stdout + done.stderr

    def _write_configuration(self) -> None:
        host, run, log = socket.gethostname().split(".")[0], self.folder / "run", self.folder / "log"
        self.database_port, self.dbd_port, controller, *ports = _free_ports(3 + self.nodes)
        munge = f"AuthType=auth/munge\nAuthInfo=socket={self.munge_socket}"
        database = self.folder / "slurmdbd.conf"
        database.write_text(
            f"{munge}\nDbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={self.dbd_port}\nSlurmUser=root\n"
            f"LogFile={log}/slurmdbd.log\nPidFile={run}/slurmdbd.pid\nStorageType=accounting_storage/mysql\n"
            f"StorageHost=127.0.0.1\nStoragePort={self.database_port}\nStorageUser=slurm\nStoragePass=slurm\n"
            "StorageLoc=slurm\n"
        )
        database.chmod(0o600)
        nodes = [
            f"NodeName=p{number + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
            for number, port in enumerate(ports)
        ]
        settings = f"""
ClusterName=saepipe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self.munge_socket},cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd-%n.pid
SlurmctldLogFile={log}/slurmctld.log
SlurmdLogFile={log}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self.dbd_port}
AccountingStorageEnforce=associations,limits,qos
AccountingStoragePass={self.munge_socket}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,bf_interval=5,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
KillWait=5
MessageTimeout=30
UnkillableStepTimeout=30
MaxArraySize={self.max_array_size}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=8
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
        self.conf.write_text("\n".join([*settings.strip().splitlines(), *nodes, ""]))

    def _accepts(self, port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0


def _name_nodes(names: list[str]) -> None:
    """Have the nodes' names mean this machine: the first one of a job is where its ranks meet."""
    hosts = Path("/etc/hosts")
    known = hosts.read_text()
    if new := [name for name in names if f" {name}\n" not in known]:
        hosts.write_text(known.rstrip("\n") + "".join(f"\n127.0.0.1 {name}" for name in new) + "\n")


def _wait(until: Callable[[], bool], what: str, seconds: float = _START_S) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:.0f} s")
        time.sleep(0.1)
