import pytest
import torch

from saepipe import neighbours


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_nearest_are_those_of_brute_force(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ROWS", 16)
    weights = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)) * 3
    values, indices = neighbours.nearest(weights, 4)
    assert values.shape == indices.shape == (rows, min(4, rows - 1))
    for row in range(rows):
        cosines = torch.nn.functional.cosine_similarity(weights[row][None], weights, dim=1)
        expected = sorted((other for other in range(rows) if other != row), key=lambda other: -float(cosines[other]))
        assert indices[row].tolist() == expected[:4]
        torch.testing.assert_close(values[row], cosines[expected[:4]])
