import json

import pytest
import torch

from saepipe import saes
from saepipe.errors import UserError
from saepipe.saes.base import Step
from saepipe.saes.standard import StandardConfig, StandardSAE
from saepipe.saes.topk import TopKConfig, TopKSAE


def test_architecture_names_the_close_matches() -> None:
    assert saes.architecture("topk") is TopKSAE
    with pytest.raises(UserError, match=r"sae=topkk .*did you mean topk"):
        saes.architecture("topkk")


def test_initial_weights_follow_the_rules() -> None:
    mean = torch.arange(8.0)
    sae = TopKSAE(TopKConfig(d_sae=40, k=4, decoder_init_norm=0.3), 8)
    sae.initialise(torch.Generator().manual_seed(0), mean=mean, norm_scale=0.5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((40,), 0.3))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.equal(sae.b_dec, mean * 0.5)
    assert not sae.b_enc.any()


def test_the_architecture_is_a_name_and_a_method_as_in_saelens() -> None:
    cfg = TopKSAE(TopKConfig(d_sae=40, k=4), 8).cfg
    assert cfg.architecture == cfg.architecture() == "topk"
    assert json.loads(json.dumps(cfg.to_dict()))["architecture"] == "topk"


def test_scale_is_ignored_without_normalisation() -> None:
    sae = StandardSAE(StandardConfig(normalize_activations="none"), 8)
    sae.initialise(torch.Generator().manual_seed(0), mean=torch.ones(8), norm_scale=0.5)
    assert sae.norm_scale == 1
    assert torch.equal(sae.b_dec, torch.ones(8))


def test_losses_and_latents_are_those_of_scaled_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dead = torch.randn(10, 8, generator=generator), torch.tensor([1, 2])
    scaled, plain = (StandardSAE(StandardConfig(d_sae=20), 8) for _ in range(2))
    for sae, scale in ((scaled, 0.25), (plain, 1.0)):
        sae.initialise(torch.Generator().manual_seed(1), norm_scale=scale)
    assert torch.equal(scaled.encode(4 * x), plain.encode(x))
    assert torch.equal(scaled(4 * x), 4 * plain(x))
    mine = scaled.loss(4 * x, 4 * x, Step(dead=dead))
    theirs = plain.loss(x, x, Step(dead=dead))
    assert torch.equal(mine.total, theirs.total)


def test_mean_reduction_divides_the_squared_error_by_the_width() -> None:
    x, dead, errors = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0]), []
    for reduction in ("sum", "mean"):
        sae = StandardSAE(StandardConfig(d_sae=20, mse_reduction=reduction), 8)
        sae.initialise(torch.Generator().manual_seed(1))
        errors.append(sae.loss(x, x, Step(dead=dead)).terms["mse_loss"])
    torch.testing.assert_close(errors[0], 8 * errors[1])
