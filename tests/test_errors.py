import pytest

from saepipe.errors import UserError, explained_memory, unknown


def test_close_matches_come_first() -> None:
    assert "did you mean topk" in str(unknown("sae", "topkk", ["standard", "topk"]))


def test_without_a_close_match_the_choices_are_listed() -> None:
    assert "choose from standard, topk" in str(unknown("sae", "xyz", ["standard", "topk"]))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes"),
    ],
)
def test_out_of_memory_names_keys_with_values_to_try(error: Exception) -> None:
    ran_out = pytest.raises(UserError, match=r"training ran out of memory; try stream.batch_tokens=2048")
    with ran_out, explained_memory("training", stream__batch_tokens=4096):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), explained_memory("training", stream__batch_tokens=4096):
        raise RuntimeError("shape mismatch")
