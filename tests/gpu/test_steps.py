"""A training step on a GPU is the CPU's, for every architecture and every way to revive latents."""

import copy

import pytest
import small_runs
import torch
from small_saes import D_IN, DEAD, TOKENS, data, make

from saepipe import saes
from saepipe.config import OptimConfig
from saepipe.point import Point
from saepipe.saes.base import SAE, Losses, Step
from saepipe.saes.topk import TopKConfig, TopKSAE

pytestmark = pytest.mark.gpu

STEPS = 12
CASES = {
    case: (name, dict(item.removeprefix("sae.").split("=") for item in keys))
    for case, (name, keys) in small_runs.cases().items()
}


def gradients(sae: SAE, x: torch.Tensor, dead: torch.Tensor) -> Losses:
    losses = sae.loss(x, x, Step(3, dead))
    losses.total.backward()
    return losses


def assert_equal_on_cuda(sae: SAE, x: torch.Tensor, dead: torch.Tensor, limit: float) -> None:
    there = copy.deepcopy(sae).cuda()
    mine, theirs = gradients(there, x.cuda(), dead.cuda()), gradients(sae, x, dead)
    for name, term in theirs.terms.items():
        torch.testing.assert_close(mine.terms[name].cpu(), term, rtol=10 * limit, atol=limit)
    assert torch.equal(mine.fired.cpu(), theirs.fired)
    for (name, one), (_, other) in zip(there.named_parameters(), sae.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.cpu() - other.grad).norm() <= limit * other.grad.norm(), name
        assert one.grad.stride() == other.grad.stride(), name


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case: str, dtype: torch.dtype, limit: float) -> None:
    name, keys = CASES[case]
    has = vars(saes.architecture(name).config_class())
    more = {"k": 4, "pre_act_loss_coefficient": 0.01}
    more = {key: more[key] for key in more.keys() & has.keys()}
    sae = make(name, dtype, dead_method=keys["dead_method"], **more)
    assert_equal_on_cuda(sae, data().to(dtype), DEAD, limit)


def test_losses_and_gradients_of_a_wide_sae() -> None:
    """Wide enough that the top k are looked for by groups; and some latents are on many tokens, most on none."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=4096, k=8), 200)
    sae.initialise(generator)
    x = torch.randn(1000, 200, generator=generator) + 3 * torch.randn(200, generator=generator)
    assert_equal_on_cuda(sae, x, torch.arange(0, 4096, 31), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_steps(case: str) -> None:
    """In float64, whose rounding decides nothing: optimizer, counters and resampling too."""
    name, keys = CASES[case]
    has = vars(saes.architecture(name).config_class())
    more = {"k": 4, "dead_after_tokens": 2 * TOKENS, "resample_every_steps": 4}
    sae = make(
        name, torch.float64, dead_method=keys["dead_method"], **{key: more[key] for key in more.keys() & has.keys()}
    )
    with torch.no_grad():
        sae.get_parameter(sae.latent_parameters[0])[DEAD] = -30.0
    points = [Point(copy.deepcopy(sae), OptimConfig(lr=0.003), total_steps=STEPS).to(to) for to in ("cuda", "cpu")]
    for point in points:
        point.make_optimizer()
    for number in range(STEPS):
        x = 3 * torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(number)).double() + 1
        for point in points:
            rows = x.to(point.density.device)
            point.take_step(rows, rows, number, measure=True)
    mine, theirs = (point.state_dict() for point in points)
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key].cpu(), value, rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", saes.registered())
def test_bfloat16_autocast_trains_float32_weights(name: str) -> None:
    sae, x = make(name).cuda(), data().cuda()
    exact = sae.loss(x, x, Step(dead=DEAD.cuda()))
    expected = torch.autograd.grad(exact.total, list(sae.parameters()))
    with torch.autocast("cuda", torch.bfloat16):
        losses = gradients(sae, x, DEAD.cuda())
    torch.testing.assert_close(losses.total, exact.total, rtol=0.02, atol=0)
    for parameter, theirs in zip(sae.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.cosine_similarity(parameter.grad.flatten(), theirs.flatten(), dim=0) > 0.99
