"""Which libraries are compared; their steps are in tests/peers/test_peer_steps.py, beside them."""

import pytest

from saepipe import peer_steps, saes
from saepipe.contest import Task


def test_every_architecture_is_compared_with_those_who_have_it() -> None:
    assert {name: peer_steps.offered(name) for name in ("topk", "batchtopk", "gated", "mine")} == {
        "topk": ["SAELens", "sparsify", "dictionary_learning"],
        "batchtopk": ["SAELens", "dictionary_learning"],
        "gated": ["SAELens"],
        "mine": [],
    }
    assert all(peer_steps.offered(name) for name in saes.registered())


def test_a_library_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peer_steps._MODULES, "SAELens", "sae_lens_of_nobody")
    with pytest.raises(ModuleNotFoundError, match="sae_lens_of_nobody"):
        peer_steps.maker(Task("SAELens", "topk", "", 16, 64, 32))
