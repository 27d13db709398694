"""A thousand random faults over a store, other ones at every run: the printed seed gives them again."""

import random
from pathlib import Path

import pytest
from small_store import build
from test_faults import DTYPES, SIZES, check

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_random_faults(tmp_path: Path, dtype: str) -> None:
    build(tmp_path, dtype=dtype, **SIZES)
    check(tmp_path, 500, random.SystemRandom().randrange(2**32))
