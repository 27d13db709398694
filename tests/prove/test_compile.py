"""A loss that is compiled into code is the plain one, to rounding."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import small_works

from saepipe import saes

pytestmark = [pytest.mark.prove, pytest.mark.timeout(600)]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler, and none is found")
@pytest.mark.parametrize("name", [name for name in saes.registered() if not saes.architecture(name).sparse_step])
def test_a_loss_compiled_into_code_is_the_plain_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ((loss, weight, _),) = small_works.elsewhere(partial(small_works.compiled, steps=6, into_code=True), name)
    print(f"{name}: losses apart by {loss:.1e}, weights by {weight:.1e}")
    assert loss < 1e-5
    assert weight < 1e-4
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"
