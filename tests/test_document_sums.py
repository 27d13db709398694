import numpy as np
import pytest
import torch

from saepipe.document_sums import DocumentSums, Sums


def mean(sums: Sums) -> dict[str, np.ndarray]:
    return {"mean": sums["value"] / sums["tokens"]}


def summed(documents: np.ndarray, values: np.ndarray, cuts: list[int]) -> DocumentSums:
    sums = DocumentSums()
    for part, value in zip(np.split(documents, cuts), np.split(values, cuts), strict=True):
        sums.add(part, {"value": torch.from_numpy(value), "tokens": torch.ones(len(part))})
    return sums


def test_batches_do_not_change_the_sums() -> None:
    random = np.random.default_rng(0)
    documents, values = np.sort(random.integers(0, 30, 500)), random.normal(size=500)
    whole, parts = summed(documents, values, []), summed(documents, values, [1, 77, 400])
    assert len(whole) == len(parts) == 30
    assert whole.total()["value"] == pytest.approx(values.sum())
    assert parts.total()["value"] == pytest.approx(values.sum())
    assert whole.intervals(mean) == {"mean": pytest.approx(parts.intervals(mean)["mean"])}


def test_what_other_processes_summed_is_added() -> None:
    documents, values = np.repeat(np.arange(10), 7), np.arange(70.0)
    whole = summed(documents, values, [])
    first, second = summed(documents[:33], values[:33], []), summed(documents[33:], values[33:], [])
    first.merge(second)
    assert first.total() == whole.total()
    assert first.intervals(mean) == whole.intervals(mean)


def test_the_interval_covers_the_truth_where_tokens_of_a_document_are_alike() -> None:
    """With a token as the unit it would be seven times too narrow, and miss most of the time."""
    random, covered = np.random.default_rng(1), 0
    for _ in range(60):
        documents = np.repeat(np.arange(60), 50)
        values = random.normal(size=60)[documents] + 0.01 * random.normal(size=3000)
        low, high = summed(documents, values, []).intervals(mean)["mean"]
        covered += low <= 0 <= high
    assert 50 <= covered <= 60


def test_one_document_and_undefined_figures_have_no_interval() -> None:
    assert summed(np.zeros(5, int), np.ones(5), []).intervals(mean) == {}
    two = summed(np.array([0, 0, 1]), np.ones(3), [])
    assert two.intervals(lambda sums: {"never": sums["value"] * np.nan, "one": sums["value"] / sums["tokens"]}) == {
        "one": [1.0, 1.0]
    }


def test_a_value_that_came_later_counts_as_nothing_before() -> None:
    sums = DocumentSums()
    sums.add(np.array([3, 4]), {"tokens": torch.ones(2)})
    sums.add(np.array([5]), {"tokens": torch.ones(1), "value": torch.tensor([2.0])})
    assert {name: total.tolist() for name, total in sums.total().items()} == {"tokens": [3.0], "value": [2.0]}
    assert len(sums) == 3
