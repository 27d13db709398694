import pytest

from saepipe.config import OptimConfig
from saepipe.schedule import learning_rate


def rates(total: int, **keys: object) -> list[float]:
    return [learning_rate(OptimConfig(lr=1.0, **keys), step, total) for step in range(total)]  # type: ignore[arg-type]


def test_constant() -> None:
    assert rates(5) == [1.0] * 5


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert rates(6, lr_warm_up_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_decay_is_linear_towards_zero_over_the_last_steps() -> None:
    assert rates(6, lr_decay_steps=4) == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_falls_from_the_peak_to_the_end() -> None:
    found = rates(101, lr_scheduler_name="cosineannealing", lr_end=0.2)
    assert found[0] == 1.0
    assert found[100] == pytest.approx(0.2, abs=1e-3)
    assert found == sorted(found, reverse=True)
    assert found[50] == pytest.approx(0.6, abs=0.02)


def test_cosine_ends_at_a_tenth_by_default() -> None:
    assert rates(1001, lr_scheduler_name="cosineannealing")[-1] == pytest.approx(0.1, abs=1e-4)


def test_a_schedule_longer_than_the_run_stays_positive() -> None:
    assert all(rate > 0 for rate in rates(5, lr_warm_up_steps=10, lr_decay_steps=10))
