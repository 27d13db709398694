"""What holds for a transcoder of every architecture: each test runs over whatever is registered."""

from pathlib import Path

import pytest
import torch
from small_saes import D_IN, D_OUT, D_SAE, DEAD, TOKENS, data, make, make_transcoder, targets

from saepipe import saes
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.saes.base import SAE, Step

pytestmark = pytest.mark.parametrize("name", saes.registered())


def test_transcoder_has_widths_of_its_own(name: str) -> None:
    sae, x, y = make_transcoder(name), data(), targets(D_OUT)
    losses = sae.loss(x, y, Step(dead=DEAD))
    losses.total.backward()
    assert losses.reconstruction.shape == sae(x).shape == (TOKENS, D_OUT)
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.any() for p in sae.parameters())


def test_transcoder_is_one_by_its_d_out_and_not_by_its_widths(name: str) -> None:
    cls = saes.architecture(name)
    assert not cls(cls.config_class(d_sae=D_SAE), D_IN).is_transcoder
    for d_out in (D_OUT, D_IN):
        with pytest.raises(UserError, match=r"sae\.apply_b_dec_to_input=True .* set it to false"):
            cls(cls.config_class(d_sae=D_SAE), D_IN, d_out)
    sae = cls(cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=False), D_IN, D_IN)
    sae.initialise(torch.Generator().manual_seed(0))
    assert sae.is_transcoder
    assert torch.cosine_similarity(sae.W_enc.T, sae.W_dec).abs().mean() < 0.5  # directions of its own


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_scales_its_target_by_itself(name: str, skip: bool) -> None:
    scaled = make_transcoder(name, torch.float64, skip_connection=skip)
    plain = make_transcoder(name, torch.float64, skip_connection=skip)
    plain.load_state_dict(scaled.state_dict() | dict.fromkeys(("norm_scale", "target_scale"), torch.ones(())))
    x, y, step = data().double(), targets(D_OUT).double(), Step(dead=DEAD)
    mine = scaled.loss(x, y, step)
    theirs = plain.loss(scaled.norm_scale * x, scaled.target_scale * y, step)
    torch.testing.assert_close(mine.total, theirs.total)
    torch.testing.assert_close(mine.target, scaled.target_scale * y)
    torch.testing.assert_close(scaled(x) * scaled.target_scale, plain(scaled.norm_scale * x))
    torch.testing.assert_close(scaled.b_dec / scaled.target_scale, targets(D_OUT).mean(0).double())


def test_bfloat16_autocast_trains_a_skip_connection_in_float32(name: str) -> None:
    sae, x, y = make_transcoder(name, skip_connection=True), data(), targets(D_OUT)
    exact = sae.loss(x, y, Step(dead=DEAD)).total
    with torch.autocast("cpu", torch.bfloat16):
        losses = sae.loss(x, y, Step(dead=DEAD))
        losses.total.backward()
    assert losses.reconstruction.dtype == torch.float32
    torch.testing.assert_close(losses.total, exact, rtol=0.02, atol=0)
    assert sae.W_skip is not None
    (expected,) = torch.autograd.grad(exact, sae.W_skip)
    assert sae.W_skip.grad is not None
    assert torch.cosine_similarity(sae.W_skip.grad.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("d_out", [D_OUT, D_IN])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_an_exported_transcoder_does_the_same_on_raw_activations(
    name: str, dtype: torch.dtype, limit: float, skip: bool, d_out: int, tmp_path: Path
) -> None:
    sae, x = make_transcoder(name, dtype, d_out=d_out, skip_connection=skip), data().to(dtype)
    saelens.save(sae, tmp_path / "sae", metadata={"hook_name": "blocks.0.hook_mlp_in", "hook_name_out": "mlp_out"})
    loaded = SAE.load(tmp_path / "sae", dtype=dtype)
    assert (loaded.is_transcoder, loaded.d_out, loaded.cfg.skip_connection) == (True, d_out, skip)
    f = sae.encode(x)
    torch.testing.assert_close(loaded.encode(x), f, rtol=limit, atol=limit)
    torch.testing.assert_close(loaded.decode(f), sae.decode(f), rtol=limit, atol=limit)
    torch.testing.assert_close(loaded(x), sae(x), rtol=limit, atol=limit)
    saelens.save(loaded, tmp_path / "again", metadata=loaded.metadata)
    torch.testing.assert_close(SAE.load(tmp_path / "again", dtype=dtype)(x), loaded(x))


def test_a_skip_connection_adds_a_linear_function_of_the_input(name: str) -> None:
    with pytest.raises(UserError, match=r"sae\.skip_connection=True .* set it to false, .* stream\.target_hook"):
        make(name, skip_connection=True)
    cls = saes.architecture(name)
    fresh = cls(cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=False, skip_connection=True), D_IN, D_OUT)
    fresh.initialise(torch.Generator().manual_seed(0))
    assert fresh.W_skip is not None
    assert fresh.W_skip.shape == (D_OUT, D_IN)
    assert not fresh.W_skip.any()
    sae, x = make_transcoder(name, torch.float64, skip_connection=True), data().double()
    assert sae.W_skip is not None
    f, added = sae.encode(x), sae.norm_scale * x @ sae.W_skip.T / sae.target_scale
    torch.testing.assert_close(sae.decode(f, x), sae.decode(f) + added)
    torch.testing.assert_close(sae(x), sae.decode(f, x))
    # Every term is as for a transcoder without one, of what the skip connection leaves over.
    without = make_transcoder(name, torch.float64)
    without.load_state_dict({key: value for key, value in sae.state_dict().items() if key != "W_skip"})
    y = targets(D_OUT).double()
    losses, expected = sae.loss(x, y, Step(dead=DEAD)), without.loss(x, y - added.detach(), Step(dead=DEAD))
    for key, term in losses.terms.items():
        torch.testing.assert_close(term, expected.terms[key])
    torch.testing.assert_close(losses.reconstruction - sae.target_scale * added, expected.reconstruction)
    losses.total.backward()
    assert sae.W_skip.grad is not None
    assert sae.W_skip.grad.any()
