"""What every rank must know of a step: signals, and values that are not finite, told a step late."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saepipe.ranks import ALONE
from saepipe.watch import STOPPING, News, Watch

NUMBERS = [getattr(signal, name) for name in STOPPING]


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Give this process other handlers than Python's, which end it or raise; afterwards, what there was."""
    before = {number: signal.signal(number, unheard) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def unheard(number: int, _: object) -> None:
    pytest.fail(f"signal {number} came to another handler")


def values(**terms: float) -> dict[tuple[int, str], Tensor]:
    """Values by name, of the point whose number the name ends with."""
    return {(int(name[-1]), name[:-1]): torch.tensor(value) for name, value in terms.items()}


@pytest.mark.parametrize("name", STOPPING)
def test_a_signal_is_a_flag_that_is_told_a_step_late(name: str) -> None:
    number, watch = getattr(signal, name), Watch(ALONE)
    with watch.listening():
        assert watch.tell(0, values(mse0=1.0)) is None
        os.kill(os.getpid(), number)  # nothing is raised, and nothing else happens
        assert watch.tell(1, values(mse0=1.0)) == News(0, 0, [])
        assert watch.tell(2, values(mse0=1.0)) == News(1, number, [])
        assert watch.read() == News(2, number, [])  # until somebody has stopped
        assert watch.read() is None


def test_a_signal_after_the_last_step_is_nobodys_news() -> None:
    watch = Watch(ALONE)
    with watch.listening():
        watch.tell(0, values(mse0=1.0))
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.read() == News(0, 0, [])
        assert watch.read() is None


def test_handlers_are_put_back_whatever_happens() -> None:
    watch = Watch(ALONE)

    def work() -> None:
        with watch.listening():
            assert all(signal.getsignal(number) not in (unheard, signal.SIG_IGN) for number in NUMBERS)
            os.kill(os.getpid(), signal.SIGINT)  # which changes its own handler once more
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert [signal.getsignal(number) for number in NUMBERS] == [unheard] * len(NUMBERS)


@pytest.mark.parametrize("name", STOPPING)
def test_what_is_ignored_stays_ignored(name: str) -> None:
    number, watch = getattr(signal, name), Watch(ALONE)
    signal.signal(number, signal.SIG_IGN)
    with watch.listening():
        os.kill(os.getpid(), number)
        watch.tell(0, values(mse0=1.0))
        assert watch.read() == News(0, 0, [])
        assert signal.getsignal(number) == signal.SIG_IGN
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_second_interrupt_is_pythons() -> None:
    watch = Watch(ALONE)
    with watch.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        watch.tell(0, values(mse0=1.0))
        assert watch.read() == News(0, signal.SIGINT, [])


def test_a_second_request_to_stop_is_no_more_than_one() -> None:
    watch = Watch(ALONE)
    with watch.listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        watch.tell(0, values(mse0=1.0))
        assert watch.read() == News(0, signal.SIGTERM, [])


def test_another_thread_listens_to_nothing_and_still_watches() -> None:
    found: list[object] = []

    def work() -> None:
        watch = Watch(ALONE)
        with watch.listening():
            found.extend(signal.getsignal(number) for number in NUMBERS)
            watch.tell(0, values(mse0=float("nan")))
            found.append(watch.read())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [*[unheard] * len(NUMBERS), News(0, 0, [(0, "mse")])]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_that_are_not_finite_are_told_by_point_and_name(bad: float, dtype: torch.dtype) -> None:
    watch = Watch(ALONE)
    for step, terms in enumerate(
        [
            {"mse0": 1.0, "l1_0": 0.0, "mse1": 3.0},
            {"mse0": 1.0, "l1_0": bad, "mse1": bad},
            {"mse0": -1e30, "l1_0": 0.0, "mse1": 3.0},
        ]
    ):
        news = watch.tell(step, {key: value.to(dtype) for key, value in values(**terms).items()})
        assert news == [None, News(0, 0, []), News(1, 0, [(0, "l1_"), (1, "mse")])][step]
    assert watch.read() == News(2, 0, [])
