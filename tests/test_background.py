"""Threads do work in its order, and end however they are stopped."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_store import numbered

from saepipe.background import Background, StoppedError
from saepipe.config import StreamConfig
from saepipe.stream import Stream

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_and_errors_come_in_their_place(threads: int) -> None:
    background = Background(threads, "test")
    waiting = [background.begin(lambda n=n: 12 // n) for n in (3, 0, 2)]
    assert waiting[0]() == 4
    with pytest.raises(ZeroDivisionError):
        waiting[1]()
    assert waiting[2]() == 6
    background.stop()
    background.join()
    assert not [thread for thread in threading.enumerate() if thread.name == "test"]


def test_one_thread_keeps_the_order() -> None:
    background, seen = Background(1, "test"), list[int]()
    for wait in [background.begin(lambda n=n: seen.append(n)) for n in range(100)]:
        wait()
    background.stop()
    background.join()
    assert seen == [*range(100)]


def test_a_stop_ends_work_in_between_and_drops_what_was_not_begun() -> None:
    background, begun = Background(1, "test"), threading.Event()

    def endless() -> None:
        while True:
            background.check()
            begun.set()

    first, second = background.begin(endless), background.begin(lambda: pytest.fail("it was begun"))
    begun.wait()
    background.stop()
    background.join()
    for wait in (first, second):
        with pytest.raises(StoppedError):
            wait()


def test_the_garbage_collector_may_end_iterators_in_any_thread(tmp_path: Path) -> None:
    """It begins wherever memory is asked for: in the threads themselves too, and under the locks of others."""
    hooks = {"blocks.0.hook_resid_post": 5}
    store = numbered(tmp_path, hooks=hooks, block_rows=dict.fromkeys(hooks, 16), rows=4500)
    config = StreamConfig(batch_tokens=240, window_tokens=300, lanes=6, prefetch_batches=2)
    stream = Stream(store, config, exclude_special_tokens=True)

    class Cycle:
        itself: object
        batches: object

    before, thresholds = threading.active_count(), gc.get_threshold()
    gc.set_threshold(50)
    try:
        for _ in range(30):
            cycle = Cycle()
            cycle.itself, batches = cycle, stream.iterate()
            cycle.batches = batches
            for _ in range(3):
                next(batches)
            del cycle, batches
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("loop", ["[None for _ in batches]", "[next(batches) for _ in range(3)]"])
def test_a_process_ends_while_a_thread_of_its_own_reads_on(tmp_path: Path, loop: str) -> None:
    hooks = {"blocks.0.hook_resid_post": 5}
    numbered(tmp_path, hooks=hooks, block_rows=dict.fromkeys(hooks, 16), rows=4500)
    script = (
        "import sys, threading, time; from saepipe.config import StreamConfig; from saepipe.store import Store; "
        "from saepipe.stream import Stream; "
        "stream = Stream(Store.open(sys.argv[1]), StreamConfig(batch_tokens=240), exclude_special_tokens=True); "
        f"batches = stream.iterate(); threading.Thread(target=lambda: {loop}, daemon=True).start(); time.sleep(0.5)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_is_told_before_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = {"blocks.0.hook_resid_post": 5}
    store = numbered(tmp_path, hooks=hooks, block_rows=dict.fromkeys(hooks, 16), rows=4500)
    original: Callable[..., int] = store.read_block_into
    reads: list[object] = []

    def failing(*where: object) -> int:
        reads.append(where)
        if len(reads) == 3:
            raise OSError("third block")
        time.sleep(0.002)
        return original(*where)

    monkeypatch.setattr(store, "read_block_into", failing)
    config = StreamConfig(batch_tokens=240, window_tokens=4000, lanes=1)
    with pytest.raises(OSError, match="third block"):
        next(Stream(store, config, exclude_special_tokens=True).iterate())
    assert len(reads) < 20
