"""Measures of redundancy, against dictionaries that were made to repeat, split or absorb."""

import math

import pytest
import torch

from saepipe import redundancy
from saepipe.redundancy import ABSORBING_COSINE, clusters, similar

AXES = torch.eye(6)


def fired(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_directions_of_their_own_are_not_redundant() -> None:
    f = (torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    found = redundancy.redundancy(AXES, f)
    assert found == {
        "nearest_cosine": 0.0,
        "clusters": 0,
        "clustered_fraction": 0.0,
        "largest_cluster": 0,
        "split_fraction": 0.0,
        "absorption_fraction": 0.0,
    }
    assert redundancy.redundancy(AXES, f.to_sparse()) == found


def test_copies_are_a_cluster_and_dead_latents_are_left_out() -> None:
    W_dec = torch.stack([AXES[0], 3 * AXES[0], AXES[0] + 0.1 * AXES[1], AXES[2], AXES[2]])
    found = redundancy.redundancy(W_dec, fired([1, 1, 1, 1, 0], [1, 1, 1, 0, 0]))
    assert (found["clusters"], found["largest_cluster"]) == (1, 3)
    assert found["clustered_fraction"] == pytest.approx(3 / 4)
    assert found["split_fraction"] == 0.0  # they fire together


def test_two_halves_of_one_direction_that_take_turns_are_split() -> None:
    W_dec = torch.stack([AXES[0] + 0.3 * AXES[1], AXES[0] - 0.3 * AXES[1], AXES[2]])
    found = redundancy.redundancy(W_dec, fired([1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]))
    assert found["split_fraction"] == pytest.approx(2 / 3)


def test_a_parent_that_is_silent_where_its_child_fires_is_absorbed() -> None:
    """Of 100 tokens with the parent 30 have the child, whose row holds both: the textbook case."""
    parent = torch.zeros(100, 2)
    parent[:, 0], parent[:30, 0], parent[:30, 1] = 1, 0, math.sqrt(2)
    absorbed = torch.stack([AXES[0], (AXES[0] + AXES[1]) / math.sqrt(2)])
    found = redundancy.redundancy(absorbed, parent)
    assert found["absorption_fraction"] == pytest.approx((0.30 + 70 / 100) / 2)  # the child's row is the parent's, too
    both = torch.zeros(100, 2)
    both[:, 0], both[:30, 1] = 1, 1
    assert redundancy.redundancy(AXES[:2], both)["absorption_fraction"] == 0.0


def test_where_nothing_fired_there_is_nothing_to_tell() -> None:
    found = redundancy.redundancy(AXES, torch.zeros(5, 6))
    assert math.isnan(found["absorption_fraction"])
    assert found["clusters"] == 0


def test_pairs_do_not_depend_on_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    W_dec, live = torch.randn(50, 4, generator=random), torch.rand(50, generator=random) > 0.2
    f = torch.randn(80, 50, generator=random).relu() * live
    whole, figures = similar(W_dec, live), redundancy.redundancy(W_dec, f)
    monkeypatch.setattr(redundancy, "_ELEMENTS_AT_ONCE", 7)
    parts = similar(W_dec, live)
    assert torch.equal(whole.first, parts.first)
    assert torch.equal(whole.second, parts.second)
    assert redundancy.redundancy(W_dec, f) == pytest.approx(figures)
    rows = torch.nn.functional.normalize(W_dec, dim=1)
    cosine = (rows @ rows.T).triu(1)
    cosine[~live] = cosine[:, ~live] = 0
    assert len(whole.first) == int((cosine >= ABSORBING_COSINE).sum())
    assert sorted(map(len, clusters(whole, 0.99)), reverse=True) == [len(group) for group in clusters(whole, 0.99)]
