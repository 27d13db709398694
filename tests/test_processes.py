import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saepipe import processes
from saepipe.processes import ended, host


@pytest.fixture
def sleeper() -> "Iterator[subprocess.Popen[bytes]]":
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_process_lives_until_it_ends(sleeper: "subprocess.Popen[bytes]") -> None:
    assert not ended(host(), sleeper.pid)
    assert not ended(host(), os.getpid())
    sleeper.kill()
    sleeper.wait()
    assert ended(host(), sleeper.pid)


def test_a_zombie_has_ended(sleeper: "subprocess.Popen[bytes]") -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("only Linux tells of zombies")
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    os.kill(sleeper.pid, 0)  # its number is not free yet
    assert ended(host(), sleeper.pid)


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    """Its name stands in brackets in what Linux says of it, before the state."""
    name = tmp_path / "a) Z (b"
    name.symlink_to(sys.executable)
    with subprocess.Popen([name, "-Ic", "input()"], stdin=subprocess.PIPE) as process:
        assert not ended(host(), process.pid)


@pytest.mark.parametrize("process", [999_999_999, 10**30, 1, 0, -1])
def test_nobody_can_tell_of_other_machines(process: int) -> None:
    assert not ended("00000000", process)
    assert ended(host(), process) == (process == 999_999_999)


def test_a_hosts_name_is_good_in_a_files_name_and_differs_between_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    first = host()
    assert re.fullmatch("[0-9a-f]{8}", first)
    for change in ("numbers of processes", "name"):
        host.cache_clear()
        with monkeypatch.context() as patch:
            if change == "name":
                patch.setattr(processes.socket, "gethostname", lambda: "node4")
            else:
                patch.setattr(Path, "readlink", lambda path: Path("pid:[12]"))
            assert host() != first
        host.cache_clear()
        assert host() == first


def test_processes_of_one_machine_agree_on_its_name() -> None:
    code = "from saepipe.processes import host; print(host())"
    root = Path(__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host()
