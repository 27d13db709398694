import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from saepipe import lock
from saepipe.errors import UserError

ROOT = Path(__file__).parents[1]
# A process that holds the folder, says so, and waits to be killed
HOLD = """
import sys, time
from saepipe.lock import hold
with hold(sys.argv[1], key="run.dir"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_says_who_holds_the_folder_and_is_free_after_sigkill(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"run.dir={folder} is in use by process {holder.pid} on .*wait"):  # noqa: SIM117
        with lock.hold(folder, key="run.dir"):
            pytest.fail("two processes hold one folder")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.hold(folder, key="run.dir"):
        assert f"process {os.getpid()} " in (folder / lock.LOCK).read_text()
    assert (folder / lock.LOCK).read_text() == ""


def test_waits_until_the_folder_is_given_back(
    tmp_path: Path, holder: "subprocess.Popen[str]", caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    caplog.set_level(logging.INFO)
    threading.Timer(0.3, holder.kill).start()
    start = time.monotonic()
    with lock.hold(folder, key="run.dir", wait=True):
        assert time.monotonic() - start > 0.2
        # from the first byte on, though this process read the other's name in the same file
        assert (folder / lock.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert re.search(rf"run.dir={folder}: waiting for process {holder.pid} on .*", caplog.text)


def test_waits_for_nobody_where_the_folder_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        with lock.hold(tmp_path, key="run.dir", wait=True):
            assert (tmp_path / lock.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert caplog.text == ""


def test_two_threads_cannot_hold_one_folder(tmp_path: Path) -> None:
    errors: list[str] = []

    def second() -> None:
        try:
            with lock.hold(tmp_path, key="store.dir"):
                errors.append("held twice")
        except UserError as error:
            errors.append(str(error))

    with lock.hold(tmp_path, key="store.dir"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "is in use by" in errors[0]


def test_is_given_back_after_an_exception(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), lock.hold(tmp_path, key="store.dir"):
            raise RuntimeError("inside")


def test_refuses_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"store.dir=.*file cannot be written"),
        lock.hold(tmp_path / "file", key="store.dir"),
    ):
        pytest.fail("a file was locked as a folder")


@pytest.mark.parametrize("platform", ["no fcntl", "no lock daemon"])
def test_warns_and_goes_on_where_there_are_no_locks(
    tmp_path: Path, platform: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if platform == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.hold(tmp_path, key="store.dir"):
        assert "make sure that one process only" in caplog.text


def test_a_full_disk_keeps_nobody_from_holding_a_folder(small_disk: Path) -> None:
    with lock.hold(small_disk, key="store.dir"):
        assert (small_disk / lock.LOCK).read_text()
    (small_disk / "others").write_bytes(b"x" * 32_000)
    with suppress(OSError), (small_disk / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(b"x" * 100)
    with lock.hold(small_disk, key="store.dir"):
        assert (small_disk / lock.LOCK).exists()
