"""A claim has one owner, and is free once that owner has ended."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saepipe import claims, processes
from saepipe.claims import Claims

ROOT = Path(__file__).parents[1]
# Takes a claim, and gives it back when told
OWNER = """
import sys
from pathlib import Path
from saepipe import claims
claims.TOUCH_S, claims.STALE_S = 0.02, float(sys.argv[2])
with claims.Claims(Path(sys.argv[1])) as mine:
    print(mine.take("a"), flush=True)
    sys.stdin.readline()
    mine.release("a")
    print("released", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def owner(folder: Path, stale_s: float = 60) -> "Iterator[subprocess.Popen[str]]":
    """Another process, which has claimed `a`."""
    command = [sys.executable, "-c", OWNER, str(folder), str(stale_s)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def forge(folder: Path, name: str, content: str | bytes, *, age_s: float = 0) -> Path:
    """Write a claim as somebody else may have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def signed(host: str = "ffffffff", process: int = 12) -> str:
    return json.dumps({"host": "node3", "id": host, "process": process, "claim": "00"})


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as first, Claims(tmp_path / "claims") as second:
        assert first.take("a")
        assert not first.take("a")
        assert not second.take("a")
        assert second.take("b")
        first.release("a")
        assert second.take("a")
        assert first.holders(["a", "b", "c"]) == [f"process {os.getpid()} on {socket.gethostname()}"]


def test_all_are_given_back_at_the_end_and_nothing_is_left(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as first:
        with Claims(tmp_path / "claims") as second:
            assert second.take("a")
            assert second.take("b")
            assert first.take("c")
        assert first.take("a")  # the folder stayed for `c`
        assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == ["a", "c"]
    assert list(tmp_path.iterdir()) == []


def test_given_back_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Claims(tmp_path / "claims") as first:
        assert first.take("a") / 0
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_vanish_under_it(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as first:
        assert first.take("a")
        (tmp_path / "claims" / "a").unlink()
        (tmp_path / "claims").rmdir()
        assert first.take("b")
        first.release("a")


def test_the_folder_may_vanish_while_a_claim_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        source.unlink()
        source.parent.rmdir()
        raise FileNotFoundError

    with Claims(tmp_path / "claims") as first:
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", link)
            assert not first.take("a")
        assert first.take("a")


def test_a_full_disk_is_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with Claims(tmp_path / "claims") as first:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write)
            with pytest.raises(OSError, match="No space left"):
                first.take("a")
        assert list((tmp_path / "claims").iterdir()) == []
        assert first.take("a")


# ---- owners that end


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owners_claim_is_free_at_once(tmp_path: Path, reaped: bool) -> None:
    with owner(tmp_path) as other, Claims(tmp_path) as mine:
        assert not mine.take("a")
        assert mine.holders(["a"]) == [f"process {other.pid} on {socket.gethostname()}"]
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))  # a zombie where nobody asked
        if not reaped and not Path("/proc/self/stat").exists():
            pytest.skip("only Linux tells of zombies")
        assert mine.take("a")


def test_on_another_machine_only_silence_tells(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with Claims(tmp_path) as mine:
        for age_s, free in ((0, False), (claims.STALE_S - 5, False), (claims.STALE_S + 1, True)):
            forge(tmp_path, "a", signed("ffffffff", gone.pid), age_s=age_s)
            assert mine.take("a") == free
        mine.release("a")
        forge(tmp_path, "b", signed(processes.host(), gone.pid))
        assert mine.take("b")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"12", b"{}", b'{"id": 3, "process": "x"}', signed(processes.host(), 10**30)],
)
def test_a_torn_claim_is_free_once_it_is_old(tmp_path: Path, content: str | bytes) -> None:
    with Claims(tmp_path) as mine:
        forge(tmp_path, "a", content)
        assert not mine.take("a")
        mine.holders(["a"])
        forge(tmp_path, "a", content, age_s=claims.STALE_S + 1)
        assert mine.take("a")
        assert mine.holders(["a"]) == [f"process {os.getpid()} on {socket.gethostname()}"]


def test_owners_touch_their_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_S", 0.02)
    with Claims(tmp_path) as mine:
        assert mine.take("a")
        os.utime(tmp_path / "a", (0, 0))
        wait_until(lambda: (tmp_path / "a").stat().st_mtime > 0)
        with Claims(tmp_path) as other:
            assert not other.take("a")


def test_an_owner_that_slept_harms_no_claim_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "STALE_S", 1.0)
    with owner(tmp_path, 1.0) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        with Claims(tmp_path) as mine:
            other.send_signal(signal.SIGSTOP)
            wait_until(lambda: mine.take("a"))
            content = (tmp_path / "a").read_bytes()
            os.utime(tmp_path / "a", (0, 0))
            other.send_signal(signal.SIGCONT)
            time.sleep(0.2)  # ten touches
            assert (tmp_path / "a").stat().st_mtime == 0
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "released\n"
            assert (tmp_path / "a").read_bytes() == content


def test_a_claim_that_another_process_makes_while_a_stale_one_is_removed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def slow(path: Path, target: Path) -> Path:
        forge(tmp_path, "a", signed(process=13))
        return rename(path, target)

    forge(tmp_path, "a", signed(), age_s=claims.STALE_S + 1)
    with Claims(tmp_path) as mine:
        monkeypatch.setattr(Path, "rename", slow)
        assert not mine.take("a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == signed(process=13)


@pytest.mark.parametrize("remover", ["at work", "killed"])
def test_one_alone_removes_a_stale_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remover: str) -> None:
    rename, taken = Path.rename, []

    def slow(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        taken.append(second.take("a"))
        if remover == "killed":
            raise KeyboardInterrupt
        rename(path, target)
        taken.append(third.take("a"))
        return target

    forge(tmp_path, "a", signed(), age_s=claims.STALE_S + 1)
    with Claims(tmp_path) as first, Claims(tmp_path) as second, Claims(tmp_path) as third:
        monkeypatch.setattr(Path, "rename", slow)
        if remover == "killed":
            with pytest.raises(KeyboardInterrupt):
                first.take("a")
            (marker,) = tmp_path.glob(".a-*")
            assert not second.take("a")
            os.utime(marker, (time.time() - claims.STALE_S - 1,) * 2)
            assert second.take("a")
        else:
            taken.append(first.take("a"))
            assert sum(taken) == 1
    assert not tmp_path.exists()


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a")
        assert not second.take("a")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        first.release("a")
        assert second.take("a")


# ---- races

# Eight forked processes take what they can of 50 names, each from its own beginning, and keep it until all are done
RACE = """
import os, sys, time
from pathlib import Path
from saepipe.claims import Claims

folder, names, pipes = Path(sys.argv[1]), [str(n) for n in range(50)], []
start = time.monotonic() + 0.2
for number in range(8):
    read, write = os.pipe()
    pipes.append(read)
    if not os.fork():
        with Claims(folder) as claims:
            time.sleep(max(0, start - time.monotonic()))
            begin = number % 2 * 25
            taken = [name for name in names[begin:] + names[:begin] if claims.take(name)]
            os.write(write, " ".join(taken).encode() + b"\\n")
            os.close(write)
            while not (folder.parent / "done").exists():
                time.sleep(0.01)
        os._exit(0)
    os.close(write)
for read in pipes:
    with open(read) as pipe:
        print(pipe.readline().strip(), flush=True)
(folder.parent / "done").touch()
for _ in pipes:
    assert os.wait()[1] == 0
"""


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_processes_each_name_has_one_owner(tmp_path: Path, stale: bool) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    for name in range(50 if stale else 0):
        forge(tmp_path / "claims", str(name), signed(), age_s=claims.STALE_S + 1)
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path / "claims")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    taken = [line.split() for line in done.stdout.splitlines()]
    assert len(taken) == 8
    assert sorted(name for names in taken for name in names) == sorted(str(n) for n in range(50))
    assert not (tmp_path / "claims").exists()


def test_a_claim_from_the_future_is_of_a_clock_that_was_put_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as mine:
        forge(tmp_path, "a", signed(), age_s=-claims.STALE_S + 5)
        assert not mine.take("a")
        forge(tmp_path, "a", signed(), age_s=-claims.STALE_S - 5)
        assert mine.take("a")
