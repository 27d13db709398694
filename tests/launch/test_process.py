"""A process is told apart from a later one that was given its number."""

import os
import signal
import subprocess
import sys

import pytest

from launch import process
from saepipe.errors import UserError


def test_a_number_that_another_process_has_is_not_the_process() -> None:
    named = process.name(os.getpid())
    assert process.is_alive(named)
    host, boot, begun, pid = named.split(" ")
    assert not process.is_alive(f"{host} {boot} {int(begun) - 1} {pid}")
    assert not process.is_alive(f"{host} another-boot {begun} {pid}")
    process.end(f"{host} another-boot {begun} {pid}", signal.SIGKILL)  # spares this one


def test_one_that_ended_is_not_alive_even_before_anybody_waits_for_it() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    named = process.name(sleeper.pid)
    assert process.is_alive(named)
    process.end(named, signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive(named)
    sleeper.wait()
    assert not process.is_alive(named)


def test_one_of_another_machine_can_only_be_ended_there() -> None:
    named = "elsewhere boot 1 2"
    assert process.is_alive(named)
    with pytest.raises(UserError, match="was submitted on elsewhere"):
        process.end(named, signal.SIGTERM)
