"""How dead latents come back, in every architecture."""

from typing import Any

import pytest
import torch
from small_saes import D_IN, D_OUT, D_SAE, DEAD, TOKENS, data, make, make_transcoder, targets
from torch import Tensor

from saepipe import saes
from saepipe.errors import UserError
from saepipe.saes.base import SAE, Step
from saepipe.saes.dead import draw, ghost_error

MANY_DEAD = torch.arange(0, D_SAE, 3)  # more than d_in // 2
ARCHITECTURES = pytest.mark.parametrize("name", saes.registered())


@ARCHITECTURES
@pytest.mark.parametrize("dead", [DEAD[:0], DEAD, MANY_DEAD], ids=["none", "few", "many"])
@pytest.mark.parametrize("method", ["none", "ghost", "resample", "auxk"])
@pytest.mark.parametrize("skip", [None, False, True], ids=["autoencoder", "transcoder", "skip"])
def test_every_parameter_has_a_gradient_however_many_latents_are_dead(
    name: str, method: str, dead: Tensor, skip: bool | None
) -> None:
    if method == "auxk" and saes.architecture(name).config_class().dead_method != "auxk":
        with pytest.raises(UserError, match=r"sae\.dead_method=auxk is not known"):
            make(name, dead_method="auxk")
        return
    keys = {"dead_method": method}
    sae = make(name, **keys) if skip is None else make_transcoder(name, skip_connection=skip, **keys)
    losses = sae.loss(data(), data() if skip is None else targets(D_OUT), Step(dead=dead))
    losses.total.backward()
    for key, parameter in sae.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    term = {"ghost": "ghost_grad_loss", "auxk": "auxiliary_reconstruction_loss"}.get(method)
    assert sae.revives == (term is not None)
    assert ("ghost_grad_loss" in losses.terms) == (method == "ghost")
    if term is not None:
        assert (losses.terms[term] != 0) == (len(dead) > 0)


@ARCHITECTURES
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ghost_gradients_are_written_out(name: str, reduction: str) -> None:
    """Token by token, for all architectures; they reach the dead latents and what the input is centred by alone."""
    sae, x = make(name, torch.float64, dead_method="ghost", mse_reduction=reduction), data().double()
    losses = sae.loss(x, x, Step(dead=DEAD))
    bias = sae.get_parameter(sae.latent_parameters[0])
    total = torch.zeros((), dtype=torch.float64)
    for target, reconstruction in zip(losses.target, losses.reconstruction, strict=True):
        residual = target - reconstruction
        ghost = torch.zeros_like(residual)
        for latent in DEAD.tolist():
            pre = (target - sae.b_dec) @ sae.W_enc[:, latent] + bias[latent]
            ghost = ghost + pre.exp() * sae.W_dec[latent]
        ghost = ghost * (residual.norm() / (2 * ghost.norm())).detach()
        error, own = (residual - ghost).square().sum(), residual.square().sum()
        total = total + error * (own / error).detach()
    expected = total / TOKENS / (D_IN if reduction == "mean" else 1)
    torch.testing.assert_close(losses.terms["ghost_grad_loss"], expected)
    parameters = dict(sae.named_parameters())
    for key, mine, theirs in zip(
        parameters,
        torch.autograd.grad(losses.terms["ghost_grad_loss"], parameters.values(), allow_unused=True),
        torch.autograd.grad(expected, parameters.values(), allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (theirs is None), key
        if mine is not None:
            torch.testing.assert_close(mine, theirs)
    parts = [sae.loss(part, part, Step(dead=DEAD)).terms["ghost_grad_loss"] for part in x.split(TOKENS // 4)]
    if "topk_threshold" not in losses.notes:  # which keeps other latents in other batches
        torch.testing.assert_close(torch.stack(parts).mean(), losses.terms["ghost_grad_loss"])


@ARCHITECTURES
@pytest.mark.parametrize("skip", [None, True], ids=["autoencoder", "transcoder"])
def test_resampled_latents_look_at_rows_that_are_reconstructed_badly(name: str, skip: bool | None) -> None:
    x, y = data(), data() if skip is None else targets(D_OUT)
    sae = make(name) if skip is None else make_transcoder(name, skip_connection=True)
    before = {key: value.detach().clone() for key, value in sae.named_parameters()}
    errors = torch.zeros(TOKENS)
    errors[[4, 9]] = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        lacking = sae.target_scale * (y - sae(x) if sae.is_transcoder else y) - (0 if sae.is_transcoder else sae.b_dec)
    inputs = sae.norm_scale * x - (sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else 0)
    reset = sae.resample(x, y, errors, DEAD, torch.Generator().manual_seed(1))
    assert reset.tolist() == [0, 3]  # two rows have an error: the third latent waits
    live = torch.ones(D_SAE, dtype=torch.bool).index_fill_(0, DEAD, False)
    for latent in reset:
        (row,) = [row for row in (4, 9) if torch.cosine_similarity(sae.W_enc[:, latent], inputs[row], dim=0) > 0.9999]
        errors[row] = 0
        assert torch.cosine_similarity(sae.W_dec[latent], lacking[row], dim=0) > 0.9999
        torch.testing.assert_close(sae.W_enc[:, latent].norm(), 0.2 * before["W_enc"][:, live].norm(dim=0).mean())
        torch.testing.assert_close(sae.W_dec[latent].norm(), before["W_dec"][live].norm(dim=1).mean())
    assert not errors.any()  # each row once
    fresh = saes.architecture(name)(sae.cfg, D_IN, sae.d_out if sae.is_transcoder else None)
    fresh.initialise(torch.Generator())
    for key, value in sae.named_parameters():
        axis = sae.latent_axis(key)
        if axis is None:
            assert torch.equal(value, before[key])
            continue
        others = [latent for latent in range(D_SAE) if latent not in reset]
        index = torch.tensor(others)
        assert torch.equal(value.index_select(axis, index), before[key].index_select(axis, index))
        if key in sae.latent_parameters:
            assert torch.equal(value[reset], fresh.get_parameter(key)[reset])


@ARCHITECTURES
def test_all_latents_can_be_resampled(name: str) -> None:
    sae, x = make(name, resample_scale=0.5, normalize_sae_decoder=True), data(3 * D_SAE)
    reset = sae.resample(x, x, torch.rand(len(x)), torch.arange(D_SAE), torch.Generator().manual_seed(0))
    assert len(reset) == D_SAE
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.full((D_SAE,), 0.5))


def test_ghost_gradients_bear_any_size_of_pre_activation() -> None:
    generator = torch.Generator().manual_seed(0)
    pre, rows = torch.randn(5, 3, generator=generator), torch.randn(3, 8, generator=generator)
    residual = torch.randn(5, 8, generator=generator)
    expected = ghost_error(pre, rows, residual)
    for shift in (-1000.0, 1000.0):  # exp of either is no float32
        shifted = (pre + shift).requires_grad_()
        error = ghost_error(shifted, rows, residual)
        torch.testing.assert_close(error, expected, rtol=1e-3, atol=0)
        error.sum().backward()
        assert shifted.grad is not None
        assert shifted.grad.isfinite().all()
        assert shifted.grad.any()


def test_ghost_gradients_of_a_perfect_reconstruction_are_zero() -> None:
    pre, rows = torch.zeros(2, 3, requires_grad=True), torch.ones(3, 8)
    error = ghost_error(pre, rows, torch.zeros(2, 8))
    error.sum().backward()
    assert not error.any()
    assert pre.grad is not None
    assert not pre.grad.any()


def test_ghost_gradients_of_decoder_rows_that_cancel_are_finite() -> None:
    pre, rows = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    error = ghost_error(pre, rows, torch.full((2, 2), 1e15))
    error.sum().backward()
    torch.testing.assert_close(error, torch.full((2,), 2e30))
    assert pre.grad is not None
    assert pre.grad.isfinite().all()


def test_rows_are_drawn_by_the_square_of_their_squared_error() -> None:
    errors = torch.tensor([0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.cat([draw(errors, 1, generator) for _ in range(4000)]), minlength=4)
    assert counts[0] == 0
    torch.testing.assert_close(counts / 4000, torch.tensor([0, 1, 4, 9]) / 14, rtol=0, atol=0.03)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_row_is_drawn_twice_and_none_without_an_error(scale: float) -> None:
    errors = scale * torch.tensor([1.0, 0.0, 2.0, 5.0, 0.0])
    for most, expected in ((2, 2), (3, 3), (9, 3)):
        drawn = draw(errors, most, torch.Generator().manual_seed(1)).tolist()
        assert len(drawn) == len(set(drawn)) == expected
        assert set(drawn) <= {0, 2, 3}
    assert not len(draw(0 * errors, 3, torch.Generator()))
    again = draw(errors, 2, torch.Generator().manual_seed(1)).tolist()
    assert again == draw(errors, 2, torch.Generator().manual_seed(1)).tolist()


def never_firing(name: str, **values: Any) -> SAE:
    """Make an SAE of which some latents are far from ever firing."""
    sae = make(name, **values)
    with torch.no_grad():
        sae.get_parameter(sae.latent_parameters[0])[DEAD] = -20.0
        if "threshold" in dict(sae.named_buffers()):
            sae.get_buffer("threshold").fill_(1e-3)
    return sae


@ARCHITECTURES
@pytest.mark.parametrize("method", ["none", "ghost"])
def test_ghost_gradients_lift_latents_that_nothing_else_would(name: str, method: str) -> None:
    sae, x = never_firing(name, dead_method=method), data()
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05)
    before = sae.W_enc[:, DEAD].clone()
    for step in range(20):
        optimizer.zero_grad()
        losses = sae.loss(x, x, Step(step, DEAD))
        assert not losses.fired[DEAD].any()
        losses.total.backward()
        optimizer.step()
    bias = sae.get_parameter(sae.latent_parameters[0])[DEAD]
    assert torch.equal(sae.W_enc[:, DEAD], before) == (method == "none")
    assert (bias != -20).any() == (method == "ghost")


@ARCHITECTURES
def test_a_resampled_latent_fires_on_the_row_that_it_was_made_for(name: str) -> None:
    sae, x = never_firing(name), data()
    errors = torch.zeros(TOKENS)
    errors[[4, 9, 20]] = 1.0
    assert not sae.encode(x)[:, DEAD].any()
    reset = sae.resample(x, x, errors, DEAD, torch.Generator().manual_seed(0))
    sae.cfg.k = D_SAE  # where the k largest are kept, the newcomer need not be one of them at once
    assert sorted(reset.tolist()) == DEAD.tolist()
    assert sae.encode(x)[[4, 9, 20]][:, DEAD].any(0).all()
