import itertools

import numpy as np
import pytest

from saepipe.matching import match


def best_of_all(similarity: np.ndarray) -> float:
    """Try every matching."""
    if similarity.shape[0] > similarity.shape[1]:
        similarity = similarity.T
    rows = np.arange(similarity.shape[0])
    return max(
        similarity[rows, list(columns)].sum()
        for columns in itertools.permutations(range(similarity.shape[1]), len(rows))
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4), (6, 6), (3, 7), (7, 3), (5, 6)])
@pytest.mark.parametrize("kind", ["drawn", "with ties", "all equal", "crowded"])
def test_no_matching_is_better(shape: tuple[int, int], kind: str) -> None:
    generator = np.random.Generator(np.random.PCG64(sum(shape)))
    for _ in range(20):
        similarity = generator.standard_normal(shape)
        if kind == "with ties":
            similarity = np.round(similarity)
        elif kind == "all equal":
            similarity[:] = 0.5
        elif kind == "crowded":  # every row likes the first columns best
            similarity = similarity * 0.1 - np.arange(shape[1])
        rows, columns = match(similarity)
        assert len(rows) == len(set(rows)) == len(set(columns)) == min(shape)
        assert (np.diff(rows) > 0).all()
        assert similarity[rows, columns].sum() == pytest.approx(best_of_all(similarity), abs=1e-9)


def test_greed_is_not_enough() -> None:
    rows, columns = match(np.array([[0.9, 0.8], [0.8, 0.1]]))
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])


def test_a_hidden_permutation_is_found() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    hidden = generator.permutation(300)[:200]
    similarity = generator.uniform(0, 0.9, (200, 300))
    similarity[np.arange(200), hidden] = 1
    np.testing.assert_array_equal(match(similarity)[1], hidden)
