"""Processes that take turns; they are scripts of a line here, and saepipe's own in tests/prove/test_bench.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from saepipe.contest import WARM_UP_STEPS, Contestant, in_turns, together
from saepipe.errors import UserError

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
seconds = float(sys.argv[1])
print(0, flush=True)
for line in sys.stdin:
    steps = json.loads(line)["steps"]
    sys.stderr.write(f"took {steps} steps\\n")
    if steps > 90:
        sys.exit("no memory\\nis left")
    print(seconds * steps, flush=True)
"""


def contestant(seconds: float) -> Contestant:
    return Contestant(f"one of {seconds} s", [sys.executable, "-c", SCRIPT, str(seconds)], cure="buy some")


def test_they_take_turns_and_each_answers_for_itself() -> None:
    with contestant(2) as slow, contestant(0.5) as fast:
        seconds = in_turns({"slow": slow.ready(), "fast": fast.ready()}, 3, steps=4)
        assert seconds == {"slow": [2.0] * 3, "fast": [0.5] * 3}
        assert together([slow, fast], steps=WARM_UP_STEPS) == [6.0, 1.5]


def test_each_turn_begins_with_another_one() -> None:
    order = []

    class Noted(Contestant):
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, **command: int) -> float:
            order.append((self.name, command["steps"]))
            return 1.0

    in_turns({name: Noted(name) for name in "abc"}, 2)
    assert order == [*((name, WARM_UP_STEPS) for name in "abc"), *((name, 1) for name in "abcbca")]


def test_one_that_dies_says_why_and_what_to_do() -> None:
    with contestant(1) as mortal, pytest.raises(UserError) as caught:
        mortal.ready().ask(steps=91)
    assert str(caught.value) == "one of 1 s ended with exit code 1: took 91 steps | no memory | is left; buy some"


def test_one_that_waits_for_another_that_died_is_not_waited_for() -> None:
    waiting = [sys.executable, "-c", "import time; time.sleep(600)"]
    ending = [sys.executable, "-c", "exit(3)"]
    with Contestant("rank 0", waiting) as first, Contestant("rank 1", ending) as second:  # noqa: SIM117
        with pytest.raises(UserError, match="rank 1 ended with exit code 3: without a word"):
            first.hear([first, second])


def test_one_that_is_killed_says_by_what() -> None:
    with contestant(1) as killed:
        killed.ready()._process.kill()
        with pytest.raises(UserError, match="one of 1 s ended with signal SIGKILL, perhaps for want of memory"):
            killed.ask(steps=1)


def test_what_one_refuses_is_told_in_its_own_words() -> None:
    code = "import sys; sys.stderr.write('a word\\nsaepipe: sae.k=9 is more; give less\\n'); sys.exit(2)"
    with Contestant("the train verb", [sys.executable, "-c", code]) as refused:  # noqa: SIM117
        with pytest.raises(UserError, match=r"^the train verb ended: sae.k=9 is more; give less$"):
            refused.ready()


def test_one_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SAELens cannot be started with .* \(Permission denied\); buy some"):
        Contestant("SAELens", [str(tmp_path), "-m", "x"], cure="buy some")


def test_one_whose_listener_is_gone_ends(tmp_path: Path) -> None:
    code = "import time, saepipe.contest; answer = saepipe.contest.answering(); time.sleep(0.5); answer(1); exit(9)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 0


def test_one_that_has_died_before_it_is_told_says_so_too() -> None:
    with Contestant("nobody", [sys.executable, "-c", "raise SystemExit(3)"]) as nobody:
        with pytest.raises(UserError, match="nobody ended with exit code 3: without a word; run the same command"):
            nobody.ready()
        with pytest.raises(UserError, match="exit code 3"):
            nobody.ask(steps=1)


def test_what_a_library_prints_is_no_answer() -> None:
    code = "import saepipe.contest; answer = saepipe.contest.answering(); print('hello'); answer(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("1\n", "hello\n")
