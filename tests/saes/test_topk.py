import pytest
import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.saes.base import Step
from saepipe.saes.topk import TopKConfig, TopKSAE

D_IN, D_SAE, K, TOKENS = 12, 40, 5, 64


def make(dtype: torch.dtype = torch.float64, **values: object) -> tuple[TopKSAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, D_IN, generator=generator) + 1
    sae = TopKSAE(TopKConfig(**{"d_sae": D_SAE, "k": K, **values}), D_IN)  # type: ignore[arg-type]
    sae.initialise(generator, mean=x.mean(0), norm_scale=1.25)
    with torch.no_grad():
        sae.W_enc.add_(0.3 * torch.randn(D_IN, D_SAE, generator=generator))
        sae.W_dec.mul_(torch.rand(D_SAE, 1, generator=generator) + 0.5)
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE, generator=generator) - 0.1)
    return sae.to(dtype), x.to(dtype)


def dense_losses(sae: TopKSAE, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error, auxiliary term and activations, as they are defined, by plain autograd."""
    x = sae.norm_scale * x
    norm = sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else torch.ones_like(sae.b_enc)
    pre = ((x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc) * norm
    top = pre.topk(sae.cfg.k)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    reconstruction = (f / norm) @ sae.W_dec + sae.b_dec
    mask = torch.zeros(sae.d_sae, dtype=torch.bool)
    mask[dead] = True
    k_aux = sae.d_in // 2
    top = torch.where(mask, pre, -torch.inf).topk(min(k_aux, len(dead)))
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    missed = (x - reconstruction).detach() - (z / norm) @ sae.W_dec
    aux = sae.cfg.aux_loss_coefficient * min(len(dead) / k_aux, 1) * missed.square().sum(1).mean()
    return (x - reconstruction).square().sum(1).mean(), aux, f


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("n_dead", [0, 3, 17])  # none, fewer than k_aux, more than k_aux
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_sparse_step_equals_dense_autograd(
    dtype: torch.dtype, limit: float, n_dead: int, rescale: bool, apply_b_dec_to_input: bool
) -> None:
    sae, x = make(
        dtype,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec_to_input,
        aux_loss_coefficient=0.7,
    )
    dead = torch.arange(0, 2 * n_dead, 2)
    losses = sae.loss(x, x, Step(dead=dead))
    mse, aux, f = dense_losses(sae, x, dead)
    torch.testing.assert_close(losses.terms["mse_loss"], mse, rtol=limit, atol=limit)
    torch.testing.assert_close(
        losses.terms["auxiliary_reconstruction_loss"], aux if n_dead else torch.zeros_like(aux), rtol=limit, atol=limit
    )
    assert torch.equal(losses.fired, (f > 0).sum(0).float())
    parameters = list(sae.parameters())
    expected = torch.autograd.grad(mse + aux if n_dead else mse, parameters)
    for mine, theirs in zip(torch.autograd.grad(losses.total, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=limit, atol=limit)


def test_dead_latents_learn_through_their_encoder() -> None:
    sae, x = make()
    fired = sae.loss(x, x, Step()).fired
    dead = torch.tensor([int(fired.argmin())])
    with torch.no_grad():
        sae.b_enc[dead] = -100  # never among the top k
    losses = sae.loss(x, x, Step(dead=dead))
    assert losses.fired[dead] == 0
    losses.total.backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad[:, dead].any()
    sae.zero_grad()
    sae.cfg.dead_method = "none"
    losses = sae.loss(x, x, Step(dead=dead))
    losses.total.backward()
    assert set(losses.terms) == {"mse_loss"}
    assert not sae.W_enc.grad[:, dead].any()


def test_encode_keeps_at_most_k_and_agrees_with_the_training_step() -> None:
    sae, x = make()
    f = sae.encode(x)
    assert (f > 0).sum(1).max() == K
    assert torch.equal((f > 0).sum(0).float(), sae.loss(x, x, Step(dead=torch.tensor([0]))).fired)
    torch.testing.assert_close(
        sae.decode(f) * sae.norm_scale, sae.loss(x, x, Step(dead=torch.tensor([0]))).reconstruction
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"k": 0}, ["sae.k=0", "at least 1"]),
        ({"k": 41}, ["sae.k=41", "at most 40"]),
        ({"dead_method": "auxx"}, ["sae.dead_method=auxx", "auxk"]),
        ({"aux_loss_coefficient": -1.0}, ["sae.aux_loss_coefficient=-1.0"]),
    ],
)
def test_impossible_values_are_refused_by_key(values: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert all(word in str(caught.value) for word in words), caught.value
