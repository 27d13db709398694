import pytest

from saepipe.progress import bar


def test_it_shows_rate_and_time_left_and_is_quiet_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("train", 1000, done=200) as shown:
        for _ in range(8):
            shown.update(100)
    said = capfd.readouterr().err
    assert "tok/s" in said
    assert "1.00k/1.00k" in said
    assert said.count("\r") <= 3  # the beginning and the end; no line for every update
