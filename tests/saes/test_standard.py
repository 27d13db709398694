import logging

import pytest
import torch

from saepipe.saes.base import Step
from saepipe.saes.standard import StandardConfig, StandardSAE

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
NONE_DEAD = torch.zeros(0, dtype=torch.int64)


def make(**values: float | str | bool) -> StandardSAE:
    sae = StandardSAE(StandardConfig(d_sae=15, **values), 6)
    sae.initialise(torch.Generator().manual_seed(1), mean=X.mean(0), norm_scale=1.5)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 15)[:, None])
        sae.b_enc.fill_(0.01)
    return sae


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_loss_is_written_out(apply_b_dec_to_input: bool) -> None:
    sae = make(l1_coefficient=3.0, apply_b_dec_to_input=apply_b_dec_to_input)
    losses = sae.loss(X, X, Step())
    x = 1.5 * X
    f = torch.relu((x - sae.b_dec * apply_b_dec_to_input) @ sae.W_enc + sae.b_enc)
    reconstruction = f @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(losses.terms["mse_loss"], (x - reconstruction).square().sum(1).mean())
    torch.testing.assert_close(losses.terms["l1_loss"], 3 * (f * sae.W_dec.norm(dim=1)).sum(1).mean())
    torch.testing.assert_close(losses.total, losses.terms["mse_loss"] + losses.terms["l1_loss"])
    torch.testing.assert_close(losses.reconstruction, reconstruction)
    assert torch.equal(losses.fired, (f > 0).sum(0).float())
    assert losses.l0 == (f > 0).sum(1).float().mean()


def test_penalty_warms_up_linearly() -> None:
    sae = make(l1_warm_up_steps=4)
    terms = [sae.loss(X, X, Step(step)).terms["l1_loss"].item() for step in range(6)]
    assert [term / terms[-1] for term in terms] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize(
    ("reduction", "coefficient", "warned"),
    [
        ("sum", 1.0, False),
        ("sum", 5.0, False),
        ("sum", 1e-4, True),
        ("sum", 8e-5, True),
        ("mean", 1e-4, False),
        ("mean", 8e-5, False),
        ("mean", 1.0, True),
        ("mean", 5.0, True),
        ("sum", 0.0, False),
        ("mean", 0.0, False),
    ],
)
def test_penalty_of_the_other_convention_is_pointed_out(
    reduction: str, coefficient: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="saepipe"):
        make(mse_reduction=reduction, l1_coefficient=coefficient)
    said, *warnings = caplog.records
    words = f"sae.l1_coefficient={coefficient:g} is weighed against the squared error's {reduction} over 6 channels"
    assert words in said.getMessage()
    assert said.levelno == logging.INFO
    assert [record.levelno for record in warnings] == [logging.WARNING] * warned
    assert all("differ by a factor of d_out, here 6" in record.getMessage() for record in warnings)
