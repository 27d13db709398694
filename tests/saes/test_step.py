import pytest
import torch

from saepipe.saes.step import Losses, warm_up


def test_a_coefficient_rises_linearly_and_stays() -> None:
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm_up(0, 0) == 1


def test_terms_are_summed_and_latents_counted_per_token() -> None:
    terms = {"mse_loss": torch.tensor(2.0, requires_grad=True), "l1_loss": torch.tensor(0.5)}
    losses = Losses(terms, torch.zeros(4, 3), torch.zeros(4, 3), fired=torch.tensor([4.0, 0.0, 2.0]))
    assert losses.total.item() == pytest.approx(2.5)
    assert losses.total.requires_grad
    assert losses.l0 == 1.5
