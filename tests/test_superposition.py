import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from saepipe import saes
from saepipe.known_features import Features
from saepipe.superposition import HELD_OUT, Superposition, cosines, score


def small(**changed: object) -> Features:
    return replace(Features.drawn(64, 16, seed=0, roots=2, branching=3, depth=2, rank=3), **changed)


def firing(data: Superposition, batches: int) -> Tensor:
    return torch.cat([data.batch(number).magnitudes > 0 for number in range(batches)])


def test_golden_batch() -> None:
    features = Features.drawn(12, 4, seed=5, roots=1, branching=2, depth=2, rank=2)
    batch = Superposition(features, 3, 64).batch(7)
    fires = batch.magnitudes > 0
    assert fires.sum(0).tolist() == [25, 10, 4, 6, 2, 1, 3, 3, 1, 1, 0, 0]
    assert fires.nonzero()[:6].tolist() == [[0, 0], [0, 1], [0, 3], [0, 7], [2, 0], [2, 2]]
    assert batch.magnitudes[fires][:3].tolist() == pytest.approx([4.99218, 5.0563, 4.23919], rel=1e-5)
    assert batch.x[10].tolist() == pytest.approx([4.0609, 0.77401, 3.87286, 1.98523], rel=1e-4)


def test_a_batch_is_a_function_of_its_number_and_the_seed() -> None:
    data = Superposition(small(), 0, 50)
    whole = [data.batch(number) for number in range(4)]
    torch.rand(5)  # no generator of torch's has a part in it
    alone = Superposition(small(), 0, 50).batch(2)
    assert torch.equal(alone.x, whole[2].x)
    assert torch.equal(alone.magnitudes, whole[2].magnitudes)
    others = [whole[1], whole[3], Superposition(small(), 1, 50).batch(2), data.batch(HELD_OUT + 2)]
    assert all(not torch.equal(alone.x, other.x) for other in others)


def test_activations_are_sums_of_what_fires() -> None:
    features = small()
    batch = Superposition(features, 0, 200).batch(0)
    torch.testing.assert_close(batch.x, batch.magnitudes @ features.directions + features.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_features_fire_as_often_as_asked(exclusive: bool, rank: int) -> None:
    features = Features.drawn(
        64, 16, seed=0, roots=2, branching=3, depth=2, rank=rank, correlation=0.4, exclusive=exclusive
    )
    n = 100_000
    often = firing(Superposition(features, 0, 10_000), 10).double().mean(0)
    p = features.marginal.double()
    assert ((often - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_a_child_never_fires_without_its_parent() -> None:
    features = small()
    fires = firing(Superposition(features, 0, 10_000), 5)
    children = (features.parent >= 0).nonzero().squeeze(1)
    assert len(children) == 24
    assert fires[:, children].any(0).all()
    assert not (fires[:, children] & ~fires[:, features.parent[children]]).any()


@pytest.mark.parametrize("exclusive", [True, False])
def test_siblings_exclude_each_other_where_asked(exclusive: bool) -> None:
    features = Features.drawn(64, 16, seed=0, roots=2, branching=3, depth=2, exclusive=exclusive)
    fires = firing(Superposition(features, 0, 10_000), 5)
    for parent in (0, 1):
        siblings = (features.parent == parent).nonzero().squeeze(1).tolist()
        for one, other in itertools.combinations(siblings, 2):
            together = (fires[:, one] & fires[:, other]).sum().item()
            expected = features.marginal[parent] * features.probability[one] * features.probability[other] * 50_000
            assert together == 0 if exclusive else abs(together - expected) < 5 * expected.sqrt()


def test_roots_correlate_as_asked() -> None:
    # Of two normal variables with correlation r, both are positive with probability 1/4 + asin(r) / 2 pi.
    factor = torch.tensor([[0.9, 0.0], [0.8, 0.0], [-0.8, 0.0], [0.0, 0.9]])
    half = Features.drawn(4, 4, seed=0, roots=0, rank=2)
    features = replace(half, factor=factor, probability=torch.full((4,), 0.5))
    fires = firing(Superposition(features, 0, 10_000), 10)
    for one, other in itertools.combinations(range(4), 2):
        expected = 0.25 + math.asin(float(factor[one] @ factor[other])) / (2 * math.pi)
        assert (fires[:, one] & fires[:, other]).double().mean().item() == pytest.approx(expected, abs=0.007)


def test_magnitudes_have_their_mean_and_deviation() -> None:
    features = small(mean=torch.linspace(5, 4, 64), std=torch.full((64,), 0.5))
    data = Superposition(features, 0, 10_000)
    magnitudes = torch.cat([data.batch(number).magnitudes for number in range(3)])
    first = magnitudes[:, 0][magnitudes[:, 0] > 0]
    assert first.mean().item() == pytest.approx(5, abs=0.03)
    assert first.std().item() == pytest.approx(0.5, abs=0.03)


@dataclass
class Oracle:
    """An SAE that tells each of the toy tree's features from the activations exactly, in another order."""

    features: Features
    order: Tensor
    blind: int = 0

    @property
    def W_dec(self) -> Tensor:
        return 3 * self.features.directions[self.order]

    def encode(self, x: Tensor) -> Tensor:
        f = x @ self.features.directions[self.order].T
        f[:, : self.blind] = 0
        return f * (f > 0.5)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec / 3


def test_a_perfect_sae_scores_1() -> None:
    data = Superposition(Features.toy_tree(seed=0), 0, 1000)
    found = score(Oracle(data.features, torch.randperm(20)), data, tokens=20_000)
    ones = dict.fromkeys(("mcc", "f1", "precision", "recall", "uniqueness", "explained_variance"), 1.0)
    assert {name: found[name] for name in ones} == pytest.approx(ones)
    assert found["dead"] == 0
    assert found["l0"] == found["true_l0"] == pytest.approx(1.12, abs=0.03)


def test_a_dead_latent_costs_f1_and_no_cosine() -> None:
    data = Superposition(Features.toy_tree(seed=0), 0, 1000)
    found = score(Oracle(data.features, torch.arange(20), blind=5), data, tokens=20_000)
    assert (found["dead"], found["f1"], found["recall"]) == pytest.approx((0.25, 0.75, 0.75))
    assert found["mcc"] == pytest.approx(1)


def test_latents_that_share_a_feature_are_not_unique() -> None:
    data = Superposition(Features.toy_tree(seed=0), 0, 1000)
    found = score(Oracle(data.features, torch.arange(20) // 2), data, tokens=2_000)
    assert found["uniqueness"] == 0.5
    assert found["mcc"] == pytest.approx(0.5, abs=1e-6)  # each feature is paired once, its second latent with another
    assert found["f1"] == pytest.approx(1)


def test_a_random_sae_scores_low() -> None:
    data = Superposition(Features.drawn(64, 32, seed=0, roots=0), 0, 1000)
    cls = saes.architecture("batchtopk")
    sae = cls(cls.config_class(d_sae=32, k=4.0), 32)
    sae.initialise(torch.Generator().manual_seed(0))
    found = score(sae, data, tokens=5_000)
    assert found["mcc"] < 0.5
    assert found["f1"] < 0.3


def test_f1_is_that_of_the_nearest_feature() -> None:
    features = replace(Features.toy_tree(seed=0), probability=torch.full((20,), 0.5), parent=torch.full((20,), -1))
    data = Superposition(features, 0, 1000)

    class Always(Oracle):
        def encode(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 20)

    found = score(Always(features, torch.arange(20)), data, tokens=50_000)
    assert found["precision"] == pytest.approx(0.5, abs=0.01)
    assert found["recall"] == 1
    assert found["f1"] == pytest.approx(2 / 3, abs=0.01)


def test_cosines_do_not_depend_on_norms() -> None:
    features = small()
    scaled = features.directions * torch.linspace(0.1, 9, 64)[:, None]
    torch.testing.assert_close(cosines(scaled, features).diagonal(), torch.ones(64, dtype=torch.float64))
    assert not cosines(torch.zeros(3, 16), features).any()
