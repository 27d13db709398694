"""Ranks as real processes: that all of them end, soon, and what their parent says of it."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import psutil
import pytest
import small_works
import torch.distributed as dist

from saepipe import rank_processes
from saepipe.errors import UserError
from saepipe.rank_processes import LOST, losing_ranks
from saepipe.ranks import Ranks

SOON_S = 30
"""Long before the ranks themselves would give up, even where other processes leave them little of the machine."""


@pytest.fixture(autouse=True)
def handlers_stay() -> object:
    numbers = [*(getattr(signal, name) for name in rank_processes.PASSED_ON), signal.SIGINT]
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert not multiprocessing.active_children()


def assert_gone(folder: Path) -> None:
    numbers = [int(path.read_text()) for path in folder.iterdir()]
    assert len(numbers) == 2
    assert not any(psutil.pid_exists(number) for number in numbers)


def test_each_rank_is_told_what_it_is(tmp_path: Path) -> None:
    rank_processes.run(small_works.report, tmp_path, 2)
    first, second = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2))
    for rank, found in enumerate((first, second)):
        launch = found["launch"]
        assert launch.ranks == Ranks(rank, 2)
        assert (launch.local_rank, launch.local_world_size, launch.address) == (rank, 2, "127.0.0.1")
        assert found["ignores_interrupts"]
        assert found["parent"] == os.getpid()
    assert first["launch"].port == second["launch"].port > 0
    assert (first["hidden"], second["hidden"]) == (False, True)
    assert first["level"] < logging.ERROR == second["level"]


def test_what_a_rank_refuses_is_told_and_one_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "_GRACE_S", 0.2)
    with pytest.raises(UserError, match=r"^sae\.k=0 is out of range$"):
        rank_processes.run(small_works.refuse_or_hang, tmp_path, 2)
    assert_gone(tmp_path)


def test_a_rank_that_is_killed_ends_the_others_at_once() -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^rank 1 of 2 was killed \(SIGKILL\); the same command goes on from the last"):
        rank_processes.run(small_works.die, True, 2)
    assert time.monotonic() - begin < SOON_S


def test_a_rank_that_fails_is_named_and_not_those_that_lost_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^rank 1 of 2 failed; its own words are above$"):
        rank_processes.run(small_works.die, False, 2)
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1
    assert "ZeroDivisionError: nobody can put this right" in said


def test_signals_are_passed_on_and_the_ranks_codes_are_the_parents(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        rank_processes.run(small_works.take_signals, tmp_path, 2)
    assert ended.value.code == 130  # as after any Ctrl-C, though the ranks get it as SIGTERM
    expected = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM]
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == expected


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        rank_processes.run(small_works.interrupt_twice, tmp_path, 2)
    assert_gone(tmp_path)


OWN, OTHER = "optim.lr=0 is out of range", f"rank 0 of 2 {LOST} (closed); the same command goes on"


@pytest.mark.parametrize(
    ("codes", "errors", "words"),
    [
        ((0, 0), (None, None), ""),
        ((2, 2), (OWN, OWN), OWN),
        ((2, 2), (OTHER, OWN), OWN),
        ((None, 2), (None, OWN), OWN),  # the other hung, and was ended by the parent
        ((2, -9), (OTHER, None), "rank 1 of 2 was killed (SIGKILL)"),
        ((-6, -9), (OTHER, None), "rank 1 of 2 was killed (SIGKILL)"),  # aborted on its way out
        ((2, -11), (OTHER, None), "rank 1 of 2 was killed (SIGSEGV)"),
        ((2, 1), (OTHER, None), "rank 1 of 2 failed; its own words are above"),
        ((None, 1), (None, None), "rank 1 of 2 failed"),
        ((143, 1), (None, None), "rank 1 of 2 failed"),  # the other still waited for it, and was asked to end
        ((143, -9), (None, None), "rank 1 of 2 was killed (SIGKILL)"),
        ((None, -9), (None, None), "rank 1 of 2 was killed (SIGKILL)"),
        ((1, 1), (None, None), "rank 0 of 2 failed"),
        ((2, 0), (None, None), "rank 0 of 2 failed"),
        ((2, 2), (OTHER, OTHER), OTHER),
        ((2, 0), (OTHER, None), OTHER),
    ],
)
def test_the_first_cause_is_told_before_its_consequences(
    codes: tuple[int | None, int | None], errors: tuple[str | None, str | None], words: str
) -> None:
    pipes = []
    for error in errors:
        mine, theirs = multiprocessing.Pipe(duplex=False)
        if error is not None:
            theirs.send(error)
        theirs.close()
        pipes.append(mine)
    if not words:
        rank_processes._judge(list(codes), pipes, [])
        return
    with pytest.raises(UserError) as raised:
        rank_processes._judge(list(codes), pipes, [])
    assert str(raised.value).startswith(words)


@pytest.mark.parametrize(
    ("codes", "sent", "expected"),
    [
        ((143, 143), (), 143),
        ((138, 138), (), 138),
        ((143, None), (), 143),
        ((143, 143), (signal.SIGINT,), 130),
        ((-15, 143), (), 143),  # it came before the rank had a handler
        ((-15, -15), (signal.SIGINT,), 130),
        ((-12, 140), (signal.SIGUSR2,), 140),
    ],
)
def test_ranks_that_stopped_give_their_code(
    codes: tuple[int | None, int | None], sent: tuple[int, ...], expected: int
) -> None:
    with pytest.raises(SystemExit) as raised:
        rank_processes._judge(list(codes), [], list(sent))
    assert raised.value.code == expected


@pytest.mark.parametrize(
    ("error", "world", "reworded"),
    [
        (dist.DistNetworkError("closed by peer\nmore"), 2, True),
        (RuntimeError("[gloo/transport] Connection closed by peer"), 2, True),
        (RuntimeError("[gloo/transport] Connection closed by peer"), 1, False),
        (RuntimeError("shapes cannot be multiplied"), 2, False),
        (ValueError("gloo"), 2, False),
    ],
)
def test_a_lost_rank_is_worded_and_what_is_none_is_left_alone(error: Exception, world: int, reworded: bool) -> None:
    expected, words = (
        UserError,
        rf"^rank 1 of 2 {LOST} \(.*peer\); the same command goes on from the last checkpoint$",
    )
    if not reworded:
        expected, words = type(error), None
    with pytest.raises(expected, match=words) as raised, losing_ranks(Ranks(1, world)):
        raise error
    assert (raised.value is error) == (not reworded)
