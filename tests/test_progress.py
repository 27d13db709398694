import os
import subprocess
import sys
from pathlib import Path

import pytest

from saepipe.progress import bar, hidden


def test_it_shows_rate_and_time_left_and_is_quiet_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("train", 1000, done=200) as shown:
        for _ in range(8):
            shown.update(100)
    said = capfd.readouterr().err
    assert "tok/s" in said
    assert "1.00k/1.00k" in said
    assert said.count("\r") <= 3  # the beginning and the end; no line for every update


def test_none_is_shown_while_they_are_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    with hidden():
        bar("train", 10).close()
    assert capfd.readouterr().err == ""
    bar("train", 10).close()
    assert "train" in capfd.readouterr().err


HIDDEN = "from saepipe import progress\nprogress.hide()\nprogress.bar('cache', 10).close()"
SPAWNED = """
import multiprocessing
from saepipe.progress import bar
def show():
    bar('train', 10).close()
if __name__ == '__main__':
    child = multiprocessing.get_context('spawn').Process(target=show)
    child.start()
    child.join()
"""


def test_only_a_process_that_says_so_shows_no_bar(tmp_path: Path) -> None:
    """The demo runs its verbs in processes of their own, and theirs are the only bars there are."""
    (tmp_path / "spawned.py").write_text(SPAWNED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for arguments, words in ((["-c", HIDDEN], ""), ([str(tmp_path / "spawned.py")], "train")):
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stderr.strip().startswith(words)
        assert bool(done.stderr) == bool(words)
