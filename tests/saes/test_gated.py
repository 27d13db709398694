import pytest
import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.saes.base import Step
from saepipe.saes.gated import GatedConfig, GatedSAE

D_IN, D_SAE, TOKENS = 6, 15, 12


def make(**values: object) -> tuple[GatedSAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, D_IN, generator=generator) + 0.5
    sae = GatedSAE(GatedConfig(d_sae=D_SAE, **values), D_IN)  # type: ignore[arg-type]
    sae.initialise(generator, mean=x.mean(0), norm_scale=1.5)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 5, D_SAE)[:, None])
        for name in sae.latent_parameters:
            sae.get_parameter(name).copy_(0.3 * torch.randn(D_SAE, generator=generator))
    return sae.double(), x.double()


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_loss_is_written_out_token_by_token(apply_b_dec_to_input: bool) -> None:
    sae, x = make(l1_coefficient=3.0, apply_b_dec_to_input=apply_b_dec_to_input)
    mse, l1, aux, fired = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for row in 1.5 * x:
        centred = row - sae.b_dec if apply_b_dec_to_input else row
        reconstruction, by_gates = sae.b_dec, sae.b_dec
        for j in range(D_SAE):
            gate = centred @ sae.W_enc[:, j] + sae.b_gate[j]
            magnitude = centred @ (sae.W_enc[:, j] * sae.r_mag[j].exp()) + sae.b_mag[j]
            if gate > 0:
                reconstruction = reconstruction + magnitude.relu() * sae.W_dec[j]
                by_gates = by_gates + gate * sae.W_dec[j]
                l1 = l1 + gate * sae.W_dec[j].norm()
                fired = fired + (magnitude > 0)
        mse = mse + (row - reconstruction).square().sum()
        aux = aux + (row - by_gates).square().sum()
    losses = sae.loss(x, x, Step())
    expected = {"mse_loss": mse, "l1_loss": 3 * l1, "auxiliary_reconstruction_loss": aux}
    assert losses.terms.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(losses.terms[name], term / TOKENS)
    assert losses.fired.sum() == fired
    parameters = list(sae.parameters())
    theirs = torch.autograd.grad(sum(expected.values()) / TOKENS, parameters)
    for mine, their in zip(torch.autograd.grad(losses.total, parameters), theirs, strict=True):
        torch.testing.assert_close(mine, their)


def test_a_closed_gate_keeps_a_latent_off_whatever_it_measures() -> None:
    sae, x = make()
    with torch.no_grad():
        sae.b_gate.fill_(-100)
        sae.b_mag.fill_(100)
    assert not sae.encode(x).any()
    with torch.no_grad():
        sae.b_gate.fill_(100)
    assert (sae.encode(x) > 0).all()


def test_the_gates_alone_are_penalised() -> None:
    sae, x = make(l1_warm_up_steps=4)
    (l1_of_magnitude,) = torch.autograd.grad(sae.loss(x, x, Step()).terms["l1_loss"], sae.b_mag, allow_unused=True)
    assert l1_of_magnitude is None or not l1_of_magnitude.any()
    terms = [sae.loss(x, x, Step(step)).terms["l1_loss"].item() for step in (0, 3, 9)]
    assert [term / terms[-1] for term in terms] == pytest.approx([0.25, 1, 1])


def test_ghost_gradients_open_gates() -> None:
    sae, x = make(dead_method="ghost")
    sae.loss(x, x, Step(dead=torch.tensor([2]))).terms["ghost_grad_loss"].backward()
    assert sae.b_gate.grad is not None
    assert sae.b_gate.grad.nonzero().tolist() == [[2]]
    assert sae.b_mag.grad is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"l1_coefficient": -1.0}, ["sae.l1_coefficient=-1.0", "at least 0"]),
        ({"l1_warm_up_steps": -1}, ["sae.l1_warm_up_steps=-1"]),
        ({"architecture": "standard"}, ["sae.architecture=standard", "keys of gated"]),
    ],
)
def test_impossible_values_are_refused_by_key(values: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert all(word in str(caught.value) for word in words), caught.value
