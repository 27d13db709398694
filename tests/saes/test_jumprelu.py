import pytest
import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.saes.base import Step
from saepipe.saes.jumprelu import JumpReLUConfig, JumpReLUSAE

D_IN, D_SAE, TOKENS = 6, 15, 12
DEAD = torch.tensor([1, 4])


def make(**values: object) -> tuple[JumpReLUSAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, D_IN, generator=generator) + 0.5
    sae = JumpReLUSAE(JumpReLUConfig(d_sae=D_SAE, **{"bandwidth": 0.4, **values}), D_IN)  # type: ignore[arg-type]
    sae.initialise(generator, mean=x.mean(0), norm_scale=1.5)
    with torch.no_grad():
        sae.W_enc.mul_(5)
        sae.W_dec.mul_(torch.linspace(0.5, 5, D_SAE)[:, None])
        sae.b_enc.copy_(0.3 * torch.randn(D_SAE, generator=generator))
        sae.threshold.copy_(torch.linspace(0.05, 0.8, D_SAE))
    return sae.double(), x.double()


def plain(sae: JumpReLUSAE, x: Tensor, sparsity: str) -> dict[str, Tensor]:
    """The loss, token by token and latent by latent, without gradients."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("mse_loss", "l0_loss", "pre_act_loss")}
    for row in 1.5 * x:
        reconstruction, l0 = sae.b_dec, 0
        for j in range(D_SAE):
            pre = (row - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j]
            f = pre if pre > sae.threshold[j] else 0 * pre
            l0 += int(f > 0)
            reconstruction = reconstruction + f * sae.W_dec[j]
            if sparsity == "tanh":
                sums["l0_loss"] += torch.tanh(3 * f * sae.W_dec[j].norm())
            if j in DEAD:
                sums["pre_act_loss"] += 0.2 * torch.relu(sae.threshold[j] - pre) * sae.W_dec[j].norm()
        sums["l0_loss"] += {"step": l0, "quadratic": 2 / 5 * (l0 - 5) ** 2, "tanh": 0}[sparsity]
        sums["mse_loss"] += (row - reconstruction).square().sum()
    return {name: value / TOKENS for name, value in sums.items()}


@pytest.mark.parametrize("sparsity", ["step", "tanh", "quadratic"])
def test_loss_is_written_out_token_by_token(sparsity: str) -> None:
    keys = {"sparsity_loss": sparsity, "target_l0": 5.0, "tanh_scale": 3.0, "pre_act_loss_coefficient": 0.2}
    sae, x = make(l0_coefficient=0.5, l0_warm_up_steps=4, **keys)
    with torch.no_grad():
        expected = plain(sae, x, sparsity)
    losses = sae.loss(x, x, Step(1, DEAD))
    expected["l0_loss"] *= 0.5 * 2 / 4
    assert losses.terms.keys() == expected.keys()
    for name, term in expected.items():
        assert term > 0
        assert losses.terms[name].item() == pytest.approx(term.item(), rel=1e-6), name  # counts are float32
    assert sae.revives


def gradients(sae: JumpReLUSAE, x: Tensor, term: str) -> tuple[Tensor, Tensor]:
    loss = sae.loss(x, x, Step(dead=DEAD)).terms[term]
    found = torch.autograd.grad(loss, (sae.threshold, sae.b_enc), allow_unused=True)
    none = torch.zeros(D_SAE, dtype=torch.float64)
    return none if found[0] is None else found[0], none if found[1] is None else found[1]


@pytest.mark.parametrize("ste_to_input", [False, True])
def test_estimators_are_written_out(ste_to_input: bool) -> None:
    """Within half a bandwidth of its threshold, a pre-activation moves it; the pre-activation too where asked."""
    sae, x = make(ste_to_input=ste_to_input)
    with torch.no_grad():
        x_scaled = 1.5 * x
        pre = (x_scaled - sae.b_dec) @ sae.W_enc + sae.b_enc
        near = (pre - sae.threshold).abs() < 0.2
        above = pre > sae.threshold
        error = -2 * (x_scaled - (pre * above) @ sae.W_dec - sae.b_dec) @ sae.W_dec.T  # of the squared error by f
    assert near.any(0).sum() > 5
    threshold, b_enc = gradients(sae, x, "l0_loss")
    counted = near.double().sum(0) / 0.4 / TOKENS
    torch.testing.assert_close(threshold, -counted, rtol=1e-6, atol=0)
    torch.testing.assert_close(b_enc, counted if ste_to_input else torch.zeros_like(counted), rtol=1e-6, atol=0)
    threshold, b_enc = gradients(sae, x, "mse_loss")
    jump = error * near * sae.threshold.detach() / 0.4
    torch.testing.assert_close(threshold, -jump.mean(0))
    torch.testing.assert_close(b_enc, (error * above + (jump if ste_to_input else 0)).mean(0))


@pytest.mark.parametrize("sparsity", ["step", "quadratic"])
def test_in_float64_nothing_is_rounded_to_float32(sparsity: str) -> None:
    sae = JumpReLUSAE(JumpReLUConfig(d_sae=8, sparsity_loss=sparsity, target_l0=3.0), 4).double()
    sae.initialise(torch.Generator().manual_seed(0))
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = sae.loss(x, x, Step())
    l0 = (sae.encode(x) > 0).sum(1).double()
    expected = l0.mean() if sparsity == "step" else (2 / 3.0 * (l0 - 3.0).square()).mean()
    assert losses.terms["l0_loss"].dtype == torch.float64
    torch.testing.assert_close(losses.terms["l0_loss"], expected, rtol=1e-15, atol=0)


def test_thresholds_start_where_asked_and_never_fall_below_zero() -> None:
    sae, x = make(init_threshold=0.25)
    fresh = JumpReLUSAE(sae.cfg, D_IN)
    fresh.initialise(torch.Generator())
    assert (fresh.threshold == 0.25).all()
    assert not fresh.b_enc.any()
    with torch.no_grad():
        sae.threshold[:5] -= 10
    before = sae.threshold.detach().clone()
    sae.after_step(sae.loss(x, x, Step()))
    assert torch.equal(sae.threshold, before.clamp(min=0))


def test_encode_keeps_what_is_above_its_threshold_as_it_is() -> None:
    sae, x = make()
    pre = (1.5 * x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = sae.encode(x)
    torch.testing.assert_close(f, torch.where(pre > sae.threshold, pre, 0.0))
    assert 0 < (f > 0).double().mean() < 1


def test_without_the_pre_activation_loss_nothing_asks_for_dead_latents() -> None:
    sae, x = make()
    assert not sae.revives
    assert sae.loss(x, x, Step(dead=DEAD)).terms.keys() == {"mse_loss", "l0_loss"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sparsity_loss": "l1"}, ["sae.sparsity_loss=l1", "quadratic"]),
        ({"sparsity_loss": "quadratic"}, ["sae.target_l0=null", "sae.sparsity_loss=quadratic"]),
        ({"sparsity_loss": "quadratic", "target_l0": 16.0}, ["sae.target_l0=16.0", "15 latents"]),
        ({"bandwidth": 0.0}, ["sae.bandwidth=0.0", "above 0"]),
        ({"init_threshold": -0.1}, ["sae.init_threshold=-0.1"]),
        ({"l0_coefficient": -1.0}, ["sae.l0_coefficient=-1.0"]),
        ({"tanh_scale": 0.0}, ["sae.tanh_scale=0.0"]),
        ({"pre_act_loss_coefficient": -1.0}, ["sae.pre_act_loss_coefficient=-1.0"]),
    ],
)
def test_impossible_values_are_refused_by_key(values: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert all(word in str(caught.value) for word in words), caught.value
