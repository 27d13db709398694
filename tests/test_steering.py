"""Steering moves activations along a latent's direction, and by nothing else."""

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_hooked import HOOK, IDS, WAYS, by_hand, make, opened
from torch import Tensor

from saepipe import saes
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.saes.base import SAE
from saepipe.steering import Steer
from saepipe.typical import Typical

Z = "blocks.1.attn.hook_z"
EVERYWHERE = slice(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module", params=WAYS)
def model(request: pytest.FixtureRequest, folder: Path) -> HookedSAETransformer:
    return opened(request.param, folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> HookedSAETransformer:
    return opened("plain", folder)


@torch.no_grad()
def steered(steer: Steer, found: Tensor) -> Tensor:
    """Call the one function of a steering."""
    ((_, function),) = steer.fwd_hooks
    return function(found, hook=None)


@pytest.fixture(scope="module")
def x(plain: HookedSAETransformer) -> Tensor:
    return plain.run_with_cache(IDS, names_filter=[HOOK])[1][HOOK]


def most_active(sae: SAE, x: Tensor) -> int:
    return int((sae.encode(x)[:, 1:] > 0).sum((0, 1)).argmax())


@pytest.mark.parametrize("name", saes.registered())
def test_a_unit_of_a_latent_adds_its_direction_to_the_reconstruction(name: str) -> None:
    sae = make(name=name)
    sae.norm_scale, sae.target_scale = torch.tensor(0.5), torch.tensor(0.25)
    unit = torch.zeros(24)
    unit[3] = 1.0
    expected = sae.decode(unit) - sae.decode(torch.zeros(24))
    torch.testing.assert_close(sae.directions()[3], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.directions([5, 3])[1], expected, atol=1e-5, rtol=1e-5)


def test_adding_then_subtracting_is_identity(x: Tensor) -> None:
    sae = make()
    there = steered(Steer(sae, {3: 5.0, 7: -2.0}), x)
    torch.testing.assert_close(there[:, 1:] - x[:, 1:], (5 * sae.W_dec[3] - 2 * sae.W_dec[7]).expand_as(x[:, 1:]))
    torch.testing.assert_close(steered(Steer(sae, {3: -5.0, 7: 2.0}), there), x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["standard", "gated", "topk", "jumprelu"])
def test_clamping_and_ablating_change_the_latent_alone(name: str, x: Tensor) -> None:
    sae = make(name=name)
    latent = most_active(sae, x)
    f = sae.encode(x)
    for mode, value in (("clamp", 3.0), ("ablate", 0.0)):
        changed = f.clone()
        changed[..., latent] = value
        expected = sae.decode(changed) + (x - sae.decode(f))
        steer = Steer(sae, {latent: value}, mode, positions=EVERYWHERE)
        torch.testing.assert_close(steered(steer, x), expected, atol=1e-5, rtol=1e-5)


def test_ablating_a_silent_latent_changes_nothing_at_all(x: Tensor) -> None:
    sae = make()
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    assert torch.equal(steered(Steer(sae, [5], "ablate", positions=EVERYWHERE), x), x)


def test_clamping_at_what_it_is_changes_nothing(x: Tensor) -> None:
    sae = make()
    latent = most_active(sae, x)
    where = (sae.encode(x)[..., latent] > 0).nonzero()[0].tolist()
    value = sae.encode(x)[where[0], where[1], latent].detach().item()
    out = steered(Steer(sae, {latent: value}, "clamp", positions=[where[1]]), x[where[:1]])
    torch.testing.assert_close(out, x[where[:1]], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("positions", "touched"),
    [
        (None, [1, 2, 3, 4, 5, 6, 7, 8]),
        ([0, 4, 99], [0, 4]),
        (slice(6, None), [6, 7, 8]),
        (torch.arange(9)[None].eq(2).expand(2, -1), [2]),
    ],
)
def test_only_the_positions_asked_for_are_touched(positions: Any, touched: list[int], x: Tensor) -> None:
    out = steered(Steer(make(), {3: 1.0}, positions=positions), x)
    assert (out != x).any(2).any(0).nonzero()[:, 0].tolist() == touched


def test_the_model_runs_on_with_it(model: HookedSAETransformer) -> None:
    sae = make()
    out = model.run_with_hooks(IDS, fwd_hooks=Steer(sae, {3: 5.0}).fwd_hooks)

    def added(found: Tensor) -> Tensor:
        moved = torch.cat([torch.zeros(1, small_models.WIDTH), (5 * sae.W_dec[3]).expand(8, -1)])
        return found + moved

    torch.testing.assert_close(out, by_hand(model, {HOOK: added}), atol=1e-5, rtol=1e-5)
    assert (out - model(IDS)).abs().max() > 0.1


def test_the_heads_of_a_hook_are_steered_side_by_side(model: HookedSAETransformer) -> None:
    sae = make(Z)
    out = model.run_with_hooks(IDS, fwd_hooks=Steer(sae, {3: 5.0}, "clamp", positions=EVERYWHERE).fwd_hooks)

    def clamped(found: Tensor) -> Tensor:
        flat = found.flatten(2)
        change = 5 - sae.encode(flat)[..., [3]]
        return found + (change @ sae.W_dec[[3]]).view_as(found)

    torch.testing.assert_close(out, by_hand(model, {Z: clamped}), atol=1e-5, rtol=1e-5)


def test_a_transcoder_is_read_at_one_hook_and_written_at_the_other(model: HookedSAETransformer) -> None:
    read, write = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    sae = make(read, d_out=small_models.WIDTH, hook_name_out=write)
    latent = most_active(sae, model.run_with_cache(IDS, names_filter=[read])[1][read])
    out = model.run_with_hooks(IDS, fwd_hooks=Steer(sae, [latent], "ablate", positions=EVERYWHERE).fwd_hooks)
    seen: list[Tensor] = []

    def keep(found: Tensor) -> None:
        seen.append(found)

    expected = by_hand(
        model, {read: keep, write: lambda found: found - sae.encode(seen[-1])[..., [latent]] @ sae.W_dec[[latent]]}
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (out - model(IDS)).abs().max() > 1e-3


def test_an_sae_that_normalises_each_token_is_steered_in_units_of_the_normalised(x: Tensor) -> None:
    sae = make()
    sae.token_norm = "layer_norm"
    out = steered(Steer(sae, {3: 2.0}, positions=EVERYWHERE), x)
    f = sae.encode(x)
    more = f.clone()
    more[..., 3] += 2.0
    torch.testing.assert_close(out - x, sae.decode(more, x) - sae.decode(f, x), atol=1e-5, rtol=1e-5)


def test_strengths_are_in_units_of_the_typical_activation(x: Tensor) -> None:
    sae = make()
    typical = Typical(torch.arange(24.0), torch.ones(24, dtype=torch.int64), 9)
    steer = Steer(sae, {3: 2.0, 4: -1.0}, typical=typical)
    assert steer.amounts == {3: 6.0, 4: -4.0}
    torch.testing.assert_close(steered(steer, x), steered(Steer(sae, {3: 6.0, 4: -4.0}), x))


def test_generation_is_steered_at_every_step_and_repeatable(plain: HookedSAETransformer) -> None:
    keys: dict[str, Any] = {"max_new_tokens": 6, "seed": 1, "stop_at_eos": False}
    sae = make()
    free = plain.generate(IDS, **keys)
    same = plain.generate(IDS, fwd_hooks=Steer(sae, {3: 0.0}).fwd_hooks, **keys)
    assert torch.equal(free, same)
    late = plain.generate(IDS, fwd_hooks=Steer(sae, {3: 500.0}, positions=slice(10, None)).fwd_hooks, **keys)
    assert torch.equal(late[:, :11], free[:, :11])  # position 10 is the first to be steered, 11 the first to differ
    assert not torch.equal(late, free)


@pytest.mark.parametrize("positions", [None, slice(2, None), slice(12, None), [3, 13]])
def test_a_cache_of_keys_and_values_changes_no_position(plain: HookedSAETransformer, positions: Any) -> None:
    steer = Steer(make(), {3: 300.0, 5: -300.0}, positions=positions)
    keys: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
    for input in (IDS, ["", "abc", "ab"]):
        found = [
            plain.generate(input, fwd_hooks=steer.fwd_hooks, use_past_kv_cache=cached, return_type="tokens", **keys)
            for cached in (False, True)
        ]
        assert torch.equal(*found)
    assert not torch.equal(plain.generate(IDS, **keys), plain.generate(IDS, fwd_hooks=steer.fwd_hooks, **keys))


@pytest.mark.parametrize(
    ("latents", "keys", "said"),
    [
        ({24: 1.0}, {}, "latents=24 is none of the SAE's 24; give a number from 0 to 23"),
        ({-1: 1.0}, {}, "latents=-1 is none of the SAE's 24; give a number from 0 to 23"),
        ([], {"mode": "ablate"}, r"latents=\[\] names no latent"),
        ([3], {}, r"latents=\[3\] has no strengths to add"),
        ({3: float("nan")}, {}, "is no strength; give a number"),
        ({3: 1.0}, {"mode": "abblate"}, "mode=abblate is not known; did you mean ablate"),
        ({3: 1.0}, {"positions": [2, -1]}, r"positions=\[2, -1\] counts from the end, which moves"),
        ([3, 4, 3], {"mode": "ablate"}, r"latents=\[3, 4, 3\] names a latent more than once"),  # taken off twice
    ],
)
def test_what_has_no_meaning_is_refused(latents: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Steer(make(), latents, **keys)


def test_a_mask_of_another_shape_than_the_tokens_is_refused(plain: HookedSAETransformer) -> None:
    steer = Steer(make(), {3: 1.0}, positions=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(UserError, match=r"positions is a mask of shape \[1, 3\], and the tokens are"):
        plain.run_with_hooks(IDS, fwd_hooks=steer.fwd_hooks)


def test_a_latent_that_never_fired_has_no_typical_activation_to_steer_by() -> None:
    typical = Typical(torch.full((24,), torch.nan), torch.zeros(24, dtype=torch.int64), 1234)
    with pytest.raises(UserError, match="latent 3 fired on none of the 1,234 tokens that were read, so its typical"):
        Steer(make(), {3: 1.0}, typical=typical)
    assert Steer(make(), [3], "ablate", typical=typical).amounts == {3: 0.0}


def test_an_sae_of_another_width_is_refused(plain: HookedSAETransformer) -> None:
    with pytest.raises(UserError, match=rf"{HOOK} is 32 wide in this model, and the SAE's d_out is 8"):
        plain.run_with_hooks(IDS, fwd_hooks=Steer(make(d_in=8), {3: 1.0}).fwd_hooks)
