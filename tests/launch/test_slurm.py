"""What is asked of SLURM, as far as it can be seen without one."""

import pytest

from launch import slurm
from saepipe.errors import UserError


def test_a_cluster_that_is_not_there_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not slurm.there()
    assert slurm.largest_array() == 1001
    with pytest.raises(UserError, match="squeue is not installed"):
        slurm.states(["7"])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("sbatch: error: invalid partition specified: none\nsbatch: error: Batch job submission failed: Invalid",
         "invalid partition specified: none; Batch job submission failed: Invalid"),
        ("allocation failure: no\n", "allocation failure: no"),
        ("", "no reason given"),
    ],
)  # fmt: skip
def test_a_refusal_is_in_the_clusters_own_words(said: str, words: str) -> None:
    assert slurm.words(said) == words
