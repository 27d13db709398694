"""The weights that training starts with: drawn, or those of another SAE."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saes import D_IN, D_OUT, D_SAE, data, make, make_transcoder, targets

from saepipe import saes
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.saes.base import SAE

ARCHITECTURES = pytest.mark.parametrize("name", saes.registered())


def fresh(name: str, d_out: int | None = None, seed: int = 9, **values: Any) -> SAE:
    """Make an SAE as a run does that begins on other activations, of other norms."""
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=d_out is None, **values), D_IN, d_out)
    scales = {"norm_scale": 0.7, "target_scale": None if d_out is None else 1.3}
    sae.initialise(torch.Generator().manual_seed(seed), **scales)
    return sae


def exported(sae: SAE, folder: Path) -> SAE:
    """Export and open again; an SAE that learns a threshold has that of some training."""
    if "threshold" in dict(sae.named_buffers()):
        sae.get_buffer("threshold").fill_(0.01)
    saelens.save(sae, folder, metadata={"hook_name": "blocks.0.hook_resid_post"})
    return saelens.load(folder)


def assert_same_function(sae: SAE, other: SAE, *, latents: bool = True) -> None:
    x = data()
    f, theirs = sae.encode(x), other.encode(x)
    assert 0.02 < (theirs > 0).float().mean() < 0.98
    assert torch.equal(f > 0, theirs > 0)
    if latents:  # those that are rescaled by their decoder rows are so by the scale of this run's activations, too
        factor = sae.W_dec.norm(dim=1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1
        torch.testing.assert_close(f, theirs * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(f, x), other.decode(theirs, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), other(x), rtol=1e-5, atol=1e-5)


@ARCHITECTURES
@pytest.mark.parametrize("by_export", [True, False])
@pytest.mark.parametrize("rule", ["expected_average_only_in", "none"])
def test_an_adopted_sae_does_the_same_on_raw_activations(name: str, by_export: bool, rule: str, tmp_path: Path) -> None:
    trained = make(name, **({"k": 9} if "k" in vars(saes.architecture(name).config_class()) else {}))
    other = exported(trained, tmp_path)
    sae = fresh(name, normalize_activations=rule, **({"k": 9} if hasattr(trained.cfg, "k") else {}))
    scales = (sae.norm_scale.clone(), sae.target_scale.clone())
    before = sae(data())
    sae.adopt(other if by_export else trained)
    assert_same_function(sae, other)
    assert not torch.allclose(sae(data()), before)
    assert (sae.norm_scale, sae.target_scale) == scales  # those of this run's store
    assert all(parameter.requires_grad for parameter in sae.parameters())


@ARCHITECTURES
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [D_OUT, D_IN])
def test_an_adopted_transcoder_does_the_same(name: str, skip: bool, d_out: int, tmp_path: Path) -> None:
    keys = {"skip_connection": skip} | ({"k": 9} if "k" in vars(saes.architecture(name).config_class()) else {})
    other = exported(make_transcoder(name, d_out=d_out, **keys), tmp_path)
    sae = fresh(name, d_out, **keys)
    sae.adopt(other)
    assert_same_function(sae, other)
    assert sae.W_skip is None or sae.W_skip.any()


@ARCHITECTURES
@pytest.mark.parametrize("transcoder", [False, True])
def test_rows_are_held_at_norm_1_without_a_change_of_the_function(name: str, transcoder: bool, tmp_path: Path) -> None:
    keys = {"k": 9, "rescale_acts_by_decoder_norm": True} if saes.architecture(name).sparse_step else {}
    other = exported(make_transcoder(name, **keys) if transcoder else make(name, **keys), tmp_path)
    sae = fresh(name, D_OUT if transcoder else None, normalize_sae_decoder=True, **keys)
    sae.adopt(other)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert_same_function(sae, other, latents=False)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("rescale", [False, True])
def test_one_threshold_is_the_mean_of_what_the_latents_are_ranked_by(name: str, rescale: bool, tmp_path: Path) -> None:
    other = exported(make("jumprelu"), tmp_path)  # a threshold and a norm of its own for each latent
    raw = other.get_parameter("threshold")
    for held in (False, True):
        sae = fresh(name, k=9, rescale_acts_by_decoder_norm=rescale, normalize_sae_decoder=held)
        sae.adopt(other)
        norm = other.W_dec.norm(dim=1) * sae.target_scale if rescale or held else torch.ones(D_SAE)
        torch.testing.assert_close(sae.get_buffer("threshold").float(), (raw * norm).mean().detach())


def test_a_batchtopk_becomes_a_jumprelu_that_does_the_same(tmp_path: Path) -> None:
    other = exported(make("batchtopk", k=9), tmp_path)
    assert other.cfg.architecture == "jumprelu"
    sae = fresh("jumprelu")
    sae.adopt(other)
    assert_same_function(sae, other)


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        ("gated", "standard", "has no b_gate, which sae=gated needs; it is a standard SAE: choose sae=standard"),
        ("standard", "gated", "has no b_enc, which sae=standard needs; it is a gated SAE: choose sae=gated"),
        ("jumprelu", "standard", "has no threshold, which sae=jumprelu needs; it is a standard SAE"),
        ("jumprelu", "topk", "has no threshold, which sae=jumprelu needs; it is a topk SAE"),
        ("standard", "jumprelu", "has a threshold, which sae=standard would leave out; it is a jumprelu SAE"),
        ("topk", "jumprelu", "has a threshold, which sae=topk would leave out; it is a jumprelu SAE"),
    ],
)
def test_an_architecture_whose_weights_do_not_fit_is_refused(mine: str, theirs: str, words: str) -> None:
    sae = fresh(mine)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(f"train.init_from {words}")):
        sae.adopt(make(theirs))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_widths_and_kinds_that_do_not_fit_are_refused() -> None:
    cls = saes.architecture("standard")
    other = cls(cls.config_class(d_sae=D_SAE), D_IN)
    narrow = cls(cls.config_class(d_sae=D_SAE - 1), D_IN)
    thin = cls(cls.config_class(d_sae=D_SAE), D_IN - 1)
    transcoder, skipping = fresh("standard", D_IN), fresh("standard", D_IN, skip_connection=True)
    uncentred = cls(cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=False), D_IN)
    for sae, given, words in (
        (narrow, other, f"d_sae={D_SAE}, where this run's has {D_SAE - 1}; change sae.d_sae, or start from another"),
        (thin, other, f"d_in={D_IN}, where this run's has {D_IN - 1}; change stream.hook and stream.target_hook"),
        (fresh("standard", D_OUT), transcoder, f"d_out={D_IN}, where this run's has {D_OUT}; change stream.hook and"),
        (uncentred, transcoder, "is_transcoder=True, where this run's has False; change stream.hook and"),
        (transcoder, uncentred, "is_transcoder=False, where this run's has True; change stream.hook and"),
        (uncentred, other, "apply_b_dec_to_input=True; set sae.apply_b_dec_to_input=true"),
        (other, uncentred, "apply_b_dec_to_input=False; set sae.apply_b_dec_to_input=false"),
        (skipping, transcoder, "skip_connection=False; set sae.skip_connection=false"),
        (transcoder, skipping, "skip_connection=True; set sae.skip_connection=true"),
    ):
        with pytest.raises(UserError, match=re.escape(f"train.init_from has an SAE with {words}")):
            sae.adopt(given)


@ARCHITECTURES
def test_an_autoencoder_starts_as_its_own_transpose_and_at_the_mean(name: str) -> None:
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=D_SAE, decoder_init_norm=0.3), D_IN)
    sae.initialise(torch.Generator().manual_seed(0), mean=data().mean(0), norm_scale=0.5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.3))
    assert torch.equal(sae.W_enc.T, sae.W_dec)
    torch.testing.assert_close(sae.decode(torch.zeros(D_SAE)), data().mean(0))
    assert sae.norm_scale == sae.target_scale == 0.5


def test_a_transcoder_reads_and_writes_in_directions_of_their_own() -> None:
    sae = saes.architecture("standard")
    other = sae(sae.config_class(d_sae=D_SAE, apply_b_dec_to_input=False), D_IN, D_IN)
    other.initialise(torch.Generator().manual_seed(0), mean=targets(D_IN).mean(0), norm_scale=0.5, target_scale=0.25)
    cosine = torch.cosine_similarity(other.W_enc.T, other.W_dec, dim=1)
    assert cosine.abs().mean() < 0.5
    torch.testing.assert_close(other.decode(torch.zeros(D_SAE)), targets(D_IN).mean(0))
    assert (other.norm_scale, other.target_scale) == (0.5, 0.25)
