from typing import Any

import numpy as np
import pytest
import torch

from saepipe.errors import UserError
from saepipe.known_features import Features, normal, uniform
from saepipe.permutation import derive_key


def made(**changed: Any) -> Features:
    """Two roots, the first with two children."""
    values: dict[str, Any] = {
        "directions": torch.eye(4),
        "probability": torch.tensor([0.5, 0.25, 0.5, 0.25]),
        "parent": torch.tensor([-1, -1, 0, 0]),
        "exclusive": torch.ones(4, dtype=torch.bool),
        "factor": torch.zeros(4, 0),
        "mean": torch.ones(4),
        "std": torch.zeros(4),
        "bias": torch.zeros(4),
    }
    return Features(**values | changed)


def test_golden_numbers() -> None:
    key = derive_key("golden")
    found = [round(number * 2**24) for number in uniform(key, 5).tolist()]
    assert found == [7065041, 16314463, 3179397, 5086563, 11888493]
    assert torch.equal(uniform(key, 5), uniform(key, 8)[:5])
    assert normal(key, 3).tolist() == pytest.approx([-0.199057, 1.917579, -0.879715], rel=1e-5)


def test_no_number_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extreme:
        def __init__(self, key: int) -> None: ...

        def random_raw(self, n: int) -> np.ndarray:
            return np.array([0, 2**64 - 1], dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Extreme)
    drawn = uniform(0, 4)
    assert 0 < drawn.min() < drawn.max() < 1
    assert normal(0, 4).isfinite().all()


def test_golden_features() -> None:
    features = Features.drawn(12, 4, seed=5, roots=1, branching=2, depth=2, rank=2)
    assert features.parent.tolist() == [-1, 0, 0, 1, 1, 2, 2, -1, -1, -1, -1, -1]
    assert features.directions[3].tolist() == pytest.approx([0.287709, 0.761699, 0.51286, -0.272053], rel=1e-4)
    assert features.probability[:5].tolist() == pytest.approx([0.4, 0.447164, 0.308792, 0.475869, 0.357502], rel=1e-4)
    assert features.std[:3].tolist() == pytest.approx([0.706901, 0.171251, 0.051954], rel=1e-4)


def test_drawn_features_are_as_asked() -> None:
    features = Features.drawn(256, 32, seed=0, roots=4, branching=3, depth=2, rank=5, correlation=0.2, bias=3)
    torch.testing.assert_close(features.directions.norm(dim=1), torch.ones(256))
    assert features.bias.norm().item() == pytest.approx(3, rel=1e-5)
    assert [len(generation) for generation in features.generations] == [4 + 256 - 52, 12, 36]
    falling = torch.arange(1, 257, dtype=torch.float64) ** -0.5
    zipf = 5e-4 + (0.4 - 5e-4) * (falling - falling[-1]) / (1 - falling[-1])
    roots = features.generations[0]
    torch.testing.assert_close(features.marginal[roots].double(), zipf[roots], rtol=1e-5, atol=0)
    children = features.generations[1]  # less than they want, since they exclude one another
    assert (features.marginal[children] < zipf[children]).all()
    assert (features.marginal[children] > 0.4 * zipf[children]).all()
    alone = Features.drawn(256, 32, seed=0, roots=4, branching=3, depth=2, exclusive=False)
    torch.testing.assert_close(alone.marginal[children].double(), zipf[children], rtol=1e-5, atol=0)
    assert features.factor.std().item() == pytest.approx(0.2, rel=0.1)
    assert features.factor.norm(dim=1).max() < 1
    assert Features.drawn(256, 32, seed=1, roots=0).directions[0].tolist() != features.directions[0].tolist()


def test_synthsaebench_at_full_size_has_its_number_of_active_features() -> None:
    features = Features.drawn(16_384, 2, seed=0, roots=128, rank=1)
    assert features.marginal.sum().item() == pytest.approx(30.5, abs=0.1)  # its documentation says about 34


def test_toy_tree() -> None:
    tree = Features.toy_tree(seed=0)
    torch.testing.assert_close(tree.directions @ tree.directions.T, torch.eye(20), rtol=0, atol=1e-6)
    assert tree.marginal.sum().item() == pytest.approx(1.12)
    assert tree.marginal[[0, 3, 19]].tolist() == pytest.approx([0.15, 0.03, 0.05])


def test_marginals_multiply_along_the_tree() -> None:
    assert made().marginal.tolist() == pytest.approx([0.5, 0.25, 0.25, 0.125])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parent": torch.tensor([-1, 2, 0, 0])}, "number parents first"),
        ({"probability": torch.tensor([0.5, 0, 0.5, 0.25])}, "probability holds 0"),
        ({"probability": torch.tensor([0.5, 0.5, 0.75, 0.5])}, "adds up to 1.25"),
        ({"factor": torch.ones(4, 1)}, "row of norm 1"),
    ],
)
def test_features_that_would_not_fire_as_asked_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**changed)


def test_trees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="n_features=100 is fewer than the 680 of the trees; lower roots or depth"):
        Features.drawn(100, 8, seed=0)
