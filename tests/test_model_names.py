"""Short names of TransformerLens mean hub ids, on each of its versions."""

from pathlib import Path

import pytest

from saepipe.model_names import hub_id, same


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("gemma-2b", "google/gemma-2b"),
        ("Gemma-2-2b", "google/gemma-2-2b"),
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("google/gemma-2b", "google/gemma-2b"),
        ("owner/no-such", "owner/no-such"),
        ("no-such", "no-such"),
        ("demo", "demo"),
    ],
)
def test_hub_ids(name: str, expected: str) -> None:
    assert hub_id(name) == expected


def test_a_folder_of_a_short_name_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2-small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id("gpt2-small") == "gpt2-small"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("gpt2", "gpt2-small", True),
        ("openai-community/gpt2", "gpt2-small", True),
        ("gemma-2b", "google/gemma-2b", True),
        ("/models/gemma-2b/", "google/gemma-2b", True),
        ("gemma-2b", "gemma-2-2b", False),
        ("gpt2", "gpt2-medium", False),
    ],
)
def test_same(one: str, other: str, expected: bool) -> None:
    assert same(one, other) is same(other, one) is expected
