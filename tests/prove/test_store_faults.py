"""A thousand random faults over stores, other ones at every run: the printed seed gives them again."""

import os
import random
from pathlib import Path

import pytest
from small_store import build
from test_faults import DTYPES, SIZES, check

FLIPS = int(os.environ.get("PROVE_FLIPS", "1000"))
pytestmark = [pytest.mark.prove, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_faults(tmp_path: Path, dtype: str) -> None:
    build(tmp_path, dtype=dtype, **SIZES)
    check(tmp_path, FLIPS // len(DTYPES), random.SystemRandom().randrange(2**32))
