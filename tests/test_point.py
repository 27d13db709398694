"""What one point does in a step: alone, whatever parts its batch comes in, and where something is not finite."""

import copy
import io
from functools import partial
from typing import Any

import pytest
import small_runs
import small_works
import torch
from small_saes import D_IN, D_SAE, make
from torch import Tensor

from saepipe import saes
from saepipe.config import OptimConfig
from saepipe.point import Point
from saepipe.saes.base import Step

TOKENS = 48
STEPS = 6
NEVER = [0, 3, 5]
"""Latents that no row activates."""
CASES = {
    case: (name, dict(item.removeprefix("sae.").split("=") for item in keys))
    for case, (name, keys) in small_runs.cases().items()
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
DENSE = [name for name in saes.registered() if not saes.architecture(name).sparse_step]
ARCHITECTURES = pytest.mark.parametrize("name", saes.registered())


def batch(number: int) -> Tensor:
    return 3 * torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(number)).double() + 1


def point(name: str, optim: OptimConfig | None = None, *, micro_batches: int = 1, **values: Any) -> Point:
    """Make a point whose latents soon count as dead, and NEVER fire."""
    has = vars(saes.architecture(name).config_class())
    keys = {"dead_after_tokens": 2 * TOKENS, "k": 4, "pre_act_loss_coefficient": 0.01, "l1_warm_up_steps": 4} | values
    sae = make(name, torch.float64, **{key: value for key, value in keys.items() if key in has})
    with torch.no_grad():
        sae.get_parameter(sae.latent_parameters[0])[NEVER] = -30.0
    found = Point(sae, optim or OptimConfig(lr=0.01), total_steps=STEPS, lanes=4, seed=3, micro_batches=micro_batches)
    found.make_optimizer()
    return found


def of_case(case: str, optim: OptimConfig | None = None, *, micro_batches: int = 1) -> Point:
    name, keys = CASES[case]
    every = {"resample_every_steps": 3} if keys["dead_method"] == "resample" else {}
    return point(name, optim, micro_batches=micro_batches, dead_method=keys["dead_method"], **every)


def run(one: Point, start: int = 0, stop: int = STEPS) -> None:
    for number in range(start, stop):
        one.take_step(batch(number), batch(number), number, measure=False)


def everything(one: Point) -> dict[str, Tensor]:
    """Copy all that a step may change: weights, buffers and the optimizer's state."""
    found = {name: value.clone() for name, value in one.state_dict().items()}
    assert one.optimizer is not None
    for at, moments in one.optimizer.state_dict()["state"].items():
        found |= {f"{at}.{name}": value.clone() for name, value in moments.items()}
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@EVERY_CASE
def test_parts_of_a_batch_take_the_step_of_the_whole(case: str) -> None:
    optim = OptimConfig(lr=0.01, grad_clip=1.0)
    whole = of_case(case, optim)
    run(whole)
    expected = everything(whole)
    for micro_batches in (2, 3):
        parted = of_case(case, optim, micro_batches=micro_batches)
        run(parted)
        for name, value in everything(parted).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert whole.dead.any() or not case.endswith("none")


@ARCHITECTURES
@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_a_step_is_the_loss_the_clipping_and_adam(name: str, grad_clip: float | None) -> None:
    one = point(name, OptimConfig(lr=0.01, lr_warm_up_steps=2, grad_clip=grad_clip), normalize_sae_decoder=True)
    sae = copy.deepcopy(one.sae)
    adam = torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999), fused=True)
    dead = torch.zeros(0, dtype=torch.int64)
    for number in range(3):
        x = batch(number)
        adam.zero_grad()
        losses = sae.loss(x, x, Step(number, dead))
        losses.total.backward()
        sae.before_step()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), grad_clip or torch.inf)
        assert grad_clip is None or norm > grad_clip
        adam.param_groups[0]["lr"] = 0.005 if number == 0 else 0.01
        adam.step()
        sae.after_step(losses)
        _, told = one.take_step(x, x, number, measure=True)
        assert told == norm
        if sae.revives:
            dead = one.dead.nonzero().squeeze(1)
    assert_same_bits(dict(one.sae.state_dict()), dict(sae.state_dict()))


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is(
    measure: bool, grad_clip: float | None
) -> None:
    one = point("standard", OptimConfig(lr=0.01, grad_clip=grad_clip))
    run(one, stop=2)
    before = everything(one)
    one.sae.W_dec.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), torch.inf))
    done, norm = one.take_step(batch(2), batch(2), 2, measure=measure)
    assert torch.stack(list(done.terms.values())).isfinite().all()
    assert not norm.isfinite()
    before["broken"] = torch.ones(())
    assert_same_bits(everything(one), before)


@EVERY_CASE
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_loss_that_is_not_finite_changes_nothing_and_neither_do_the_steps_after_it(case: str, bad: float) -> None:
    one = of_case(case, OptimConfig(lr=0.01, grad_clip=1.0))
    run(one, stop=2)
    before = everything(one)
    x = batch(2)
    x[7, 2] = bad
    done, _ = one.take_step(x, x, 2, measure=True)  # one that resamples, where that is asked for
    assert not torch.stack(list(done.terms.values())).isfinite().all()
    assert one.broken
    before["broken"] = torch.ones(())
    assert_same_bits(everything(one), before)
    run(one, start=3)
    assert_same_bits(everything(one), before)


@EVERY_CASE
def test_a_point_that_never_took_a_sound_step_stays_at_its_start(case: str) -> None:
    one = of_case(case)
    before = {name: value.clone() for name, value in one.sae.state_dict().items()}
    for number in range(3):
        one.take_step(batch(number) * torch.nan, batch(number) * torch.nan, number, measure=False)
    assert_same_bits(dict(one.sae.state_dict()), before)
    assert not one.tokens_since_fired.any()
    assert not one.density.any()


@ARCHITECTURES
def test_resampling_touches_the_dead_latents_alone(name: str) -> None:
    one, plain = (
        point(name, dead_method=method, resample_every_steps=3, dead_after_tokens=3 * TOKENS)
        for method in ("resample", "none")
    )
    run(one, stop=2)
    run(plain, stop=2)
    assert_same_bits(everything(one), everything(plain))
    run(one, start=2, stop=3)
    run(plain, start=2, stop=3)
    reset = plain.dead.nonzero().squeeze(1)
    assert set(NEVER) <= set(reset.tolist())
    assert len(reset) < D_SAE
    kept = (~plain.dead).nonzero().squeeze(1)
    assert one.optimizer is not None
    assert plain.optimizer is not None
    for key, value in one.sae.named_parameters():
        other, axis = dict(plain.sae.named_parameters())[key], one.sae.latent_axis(key)
        if axis is None:
            assert torch.equal(value, other), key
            continue
        assert torch.equal(value.index_select(axis, kept), other.index_select(axis, kept)), key
        if key in ("W_enc", "W_dec"):
            assert (value != other).any(1 - axis)[reset].all(), key
        for moment in ("exp_avg", "exp_avg_sq"):
            mine, theirs = one.optimizer.state[value][moment], plain.optimizer.state[other][moment]
            assert torch.equal(mine.index_select(axis, kept), theirs.index_select(axis, kept)), (key, moment)
            assert not mine.index_select(axis, reset).any(), (key, moment)
    assert not one.tokens_since_fired[reset].any()
    assert torch.equal(one.tokens_since_fired[kept], plain.tokens_since_fired[kept])
    assert torch.equal(one.density, plain.density)


def test_resampling_is_drawn_by_seed_and_step() -> None:
    found = []
    for seed in (3, 3, 4):
        one = point("standard", dead_method="resample", resample_every_steps=3)
        one._seed = seed
        run(one, stop=3)
        found.append(one.sae.W_dec[NEVER].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@ARCHITECTURES
def test_latents_are_counted_by_the_tokens_since_they_fired(name: str) -> None:
    one, since = point(name, dead_method="none", dead_after_tokens=3 * TOKENS), torch.zeros(D_SAE, dtype=torch.int64)
    density = torch.zeros(D_SAE, dtype=torch.float64)
    for number in range(4):
        done, _ = one.take_step(batch(number), batch(number), number, measure=False)
        assert done.tokens == TOKENS
        since = torch.where(done.fired > 0, 0, since + TOKENS)
        density += done.fired / TOKENS
        assert torch.equal(one.tokens_since_fired, since)
        assert torch.equal(one.dead, since >= 3 * TOKENS)
        assert one.dead[NEVER].all() == (number >= 2)
    torch.testing.assert_close(one.density.double(), density / 4, rtol=1e-5, atol=1e-7)
    assert (since == 0).any()


@pytest.mark.parametrize("method", ["ghost", "none"])
def test_the_loss_is_told_of_dead_latents_where_it_revives_them(method: str) -> None:
    one = point("standard", dead_method=method)
    told = []
    loss = one._loss
    one._loss = lambda x, y, step: told.append(step.dead.tolist()) or loss(x, y, step)
    run(one, stop=4)
    assert [set(NEVER) <= set(dead) for dead in told] == [method == "ghost" and number >= 2 for number in range(4)]


def test_the_logged_figures_are_those_of_the_batch() -> None:
    optim = OptimConfig(lr=0.01, lr_warm_up_steps=10)
    one = point("jumprelu", optim, micro_batches=3, dead_method="ghost", dead_after_tokens=TOKENS)
    run(one, stop=1)
    x, before = batch(1), copy.deepcopy(one.sae)
    since, density = one.tokens_since_fired.clone(), one.density.clone()
    figures = one.metrics(*one.take_step(x, x, 1, measure=True), 1)
    losses = before.loss(x, x, Step(1, since.ge(TOKENS).nonzero().squeeze(1)))
    losses.total.backward()
    scaled = x * before.norm_scale
    error = (scaled - losses.reconstruction).square().sum(1).mean()
    variance = (scaled - scaled.mean(0)).square().sum(1).mean()
    fired = before.encode(x) > 0
    since = torch.where(fired.any(0), 0, since + TOKENS)
    density = (density + fired.double().mean(0)) / 2
    assert set(losses.terms) == {"mse_loss", "l0_loss", "ghost_grad_loss", "pre_act_loss"}
    expected = {
        **{f"losses/{name}": term for name, term in losses.terms.items()},
        "losses/overall_loss": losses.total,
        "metrics/l0": fired.sum(1).double().mean(),
        "metrics/explained_variance": 1 - error / variance,
        "metrics/mean_log10_feature_sparsity": (density + 1e-10).log10().mean(),
        "sparsity/dead_features": (since >= TOKENS).sum(),
        "sparsity/mean_passes_since_fired": since.double().mean() / TOKENS,
        "sparsity/below_1e-5": (density < 1e-5).sum(),
        "sparsity/below_1e-6": (density < 1e-6).sum(),
        "weights/W_enc_norm": one.sae.W_enc.norm(dim=0).mean(),
        "weights/W_dec_norm": one.sae.W_dec.norm(dim=1).mean(),
        "weights/b_dec_norm": one.sae.b_dec.norm(),
        "weights/threshold": one.sae.get_parameter("threshold").mean(),
        "details/grad_norm": torch.nn.utils.clip_grad_norm_(before.parameters(), torch.inf),
        "details/current_learning_rate": 0.002,
        "details/n_training_samples": 2 * TOKENS,
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(float(torch.as_tensor(value).detach()), rel=2e-5), name
    assert figures["sparsity/dead_features"] >= len(NEVER)


@ARCHITECTURES
def test_a_threshold_is_logged_where_there_is_one(name: str) -> None:
    one = point(name)
    figures = one.metrics(*one.take_step(batch(0), batch(0), 0, measure=True), 0)
    assert ("weights/threshold" in figures) == hasattr(one.sae, "threshold")


@EVERY_CASE
def test_a_restored_point_goes_on_with_the_same_bits(case: str) -> None:
    whole, first, resumed = of_case(case), of_case(case), of_case(case)
    run(whole)
    run(first, stop=4)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    resumed.make_optimizer()
    assert_same_bits(everything(resumed), everything(first))
    run(resumed, start=4)
    assert_same_bits(everything(resumed), everything(whole))


def test_weights_that_are_not_finite_are_named() -> None:
    one = point("gated")
    assert one.not_finite() is None
    with torch.no_grad():
        one.sae.get_parameter("r_mag")[2] = torch.inf
    assert one.not_finite() == "r_mag"
    assert "optim.lr (now 0.01)" in one.cure()


def test_a_loss_is_compiled_once_for_all_steps() -> None:
    """Its graphs, as they are; `prove/test_compile.py` has them compiled into code, which takes 15 s each."""
    for loss, weight, graphs in small_works.elsewhere(
        partial(small_works.compiled, steps=STEPS, into_code=False), *DENSE
    ):
        assert loss < 1e-6
        assert weight < 1e-6
        assert graphs == 1
