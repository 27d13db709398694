import threading
import time

import pytest

from saepipe.parallel import concurrently, threads


def test_results_come_in_order() -> None:
    def slow(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number

    assert list(concurrently(slow, range(20))) == list(range(20))
    assert list(concurrently(slow, [])) == []
    assert 1 <= threads() <= 8


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    begun, before = [], threading.active_count()

    def fail(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    work = concurrently(fail, range(1000))
    assert [next(work), next(work)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(work)
    assert len(begun) <= 3 + 2 * threads()
    assert threading.active_count() == before


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    work = concurrently(lambda number: number, range(1000))
    next(work)
    work.close()
    assert threading.active_count() == before
