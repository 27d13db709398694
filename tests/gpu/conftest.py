import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> None:
    """Fail where there is nothing to test on: whoever asked for these tests means the device."""
    assert torch.cuda.is_available(), "no CUDA device here; `make test` needs none"
