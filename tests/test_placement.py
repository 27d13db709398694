"""A model is put on devices that are there, or refused in one sentence."""

import pytest

from saepipe import placement
from saepipe.errors import UserError


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:9", r"model.device=cuda:9 is not on this machine"), ("gpu0", r"model.device=gpu0 is no device")],
)
def test_device_that_is_not_there(device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        placement.device(device)
