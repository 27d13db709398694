import math

import numpy as np
import pytest
import torch

from saepipe.metrics import ReconstructionFit, ce_loss_score, geometric_median, histogram, kl_div_score


def test_fit_of_a_whole_set_does_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(97, 8, generator=generator) + 30  # a mean far above the spread: float32 sums would lose it
    reconstruction = x + 0.1 * torch.randn(97, 8, generator=generator)
    whole, parts = ReconstructionFit(8), ReconstructionFit(8)
    whole.update(x, reconstruction)
    for rows in torch.arange(97).split([1, 40, 56]):
        parts.update(x[rows], reconstruction[rows])
    assert parts.rows == 97
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-10)
    x, reconstruction = x.double(), reconstruction.double()
    error = (x - reconstruction).square().sum(1)
    assert whole.compute() == pytest.approx(
        {
            "mse": error.mean().item(),
            "explained_variance": 1 - error.mean().item() / x.var(0, correction=0).sum().item(),
            "cosine_similarity": torch.cosine_similarity(x, reconstruction).mean().item(),
            "relative_reconstruction_bias": ((reconstruction**2).sum() / (x * reconstruction).sum()).item(),
        },
        rel=1e-9,
    )


def test_fit_of_the_mean_explains_nothing_and_of_the_truth_everything() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    for reconstruction, explained in ((x, 1.0), (x.mean(0).expand_as(x), 0.0)):
        fit = ReconstructionFit(2)
        fit.update(x, reconstruction)
        assert fit.compute()["explained_variance"] == pytest.approx(explained)


def test_shrunk_reconstruction_has_a_bias_below_one() -> None:
    fit = ReconstructionFit(2)
    fit.update(torch.ones(3, 2), torch.full((3, 2), 0.5))
    assert fit.compute()["relative_reconstruction_bias"] == pytest.approx(0.5)


def test_undefined_measures_are_nan_not_errors() -> None:
    fit = ReconstructionFit(2)
    fit.update(torch.ones(3, 2), torch.zeros(3, 2))
    result = fit.compute()
    assert math.isnan(result["explained_variance"])
    assert math.isnan(result["relative_reconstruction_bias"])
    assert result["cosine_similarity"] == 0
    assert math.isnan(ce_loss_score(2.0, 2.0, 2.0))


def test_scores_are_one_for_the_clean_model_and_zero_for_a_zeroed_activation() -> None:
    assert ce_loss_score(2.0, 2.0, 6.0) == 1
    assert ce_loss_score(2.0, 6.0, 6.0) == 0
    assert ce_loss_score(2.0, 3.0, 6.0) == 0.75
    assert kl_div_score(0.5, 2.0) == 0.75


def test_geometric_median_has_the_least_sum_of_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9001, 5, generator=generator).exp() + 100
    median = geometric_median(rows)
    assert median.dtype == torch.float64
    offsets = rows.double() - median
    # Where the sum is least, the unit vectors towards all rows cancel.
    pull = (offsets / offsets.norm(dim=1, keepdim=True)).mean(0)
    assert pull.norm() < 1e-5
    assert (rows.double().mean(0) - median).norm() > 0.1  # it is not the mean


def test_geometric_median_is_not_pulled_away_by_few_rows() -> None:
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    rows[:10] = 1e6
    assert geometric_median(rows).norm() < 0.2
    assert rows.mean(0).norm() > 1e4


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[3.0, 4.0]], [3.0, 4.0]),
        ([[1.0, 1.0]] * 5, [1.0, 1.0]),
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),  # the mean is a row, and the median
        ([[0.0, 0.0]] * 3 + [[3.0, 0.0], [0.0, 3.0]], [0.0, 0.0]),  # most rows are equal
        ([[-4.0, 0.0], [0.0, 0.0], [4.0, 0.0], [4.0, 3.0], [-4.0, -3.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [-1.0, 0.0], [-2.0, 0.0], [3.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
)
def test_geometric_median_where_it_is_a_row(rows: list[list[float]], expected: list[float]) -> None:
    found = geometric_median(torch.tensor(rows))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_scores_of_many_draws_are_computed_at_once() -> None:
    scores = ce_loss_score(np.array([2.0, 2.0]), np.array([3.0, 2.0]), np.array([4.0, 2.0]))
    assert scores[0] == 0.5
    assert math.isnan(scores[1])


def test_a_histogram_counts_each_value_once() -> None:
    found = histogram(torch.tensor([-5.0, 0.0, 0.5, 1.0, 1.5, 9.0]), [0.0, 1.0, 2.0])
    assert found == {"edges": [0.0, 1.0, 2.0], "counts": [3, 3]}
    assert histogram(torch.zeros(0), [0.0, 1.0, 2.0])["counts"] == [0, 0]
