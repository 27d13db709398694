from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saes import D_IN, D_SAE, data, make, make_transcoder
from torch import Tensor

from saepipe import saes
from saepipe.errors import UserError
from saepipe.formats import assembling
from saepipe.formats.assembling import Found
from saepipe.saes.base import SAE

CONFIG, WEIGHTS = Path("cfg.json"), Path("w.safetensors")
SCALES = ("norm_scale", "target_scale")


def parts(sae: SAE) -> tuple[Found, dict[str, Tensor]]:
    """Take an SAE apart, before anything is folded."""
    values = vars(sae.cfg)
    found = Found(CONFIG, sae.cfg.architecture, sae.d_in, sae.d_sae, sae.d_out if sae.is_transcoder else None, values)
    return found, {name: tensor.detach() for name, tensor in sae.state_dict().items() if name not in SCALES}


@pytest.mark.parametrize("name", saes.registered())
def test_parts_make_the_same_sae(name: str) -> None:
    sae = make(name, normalize_activations="none")
    made = assembling.assemble(*parts(sae), WEIGHTS)
    assert type(made) is type(sae)
    assert made.W_enc.T.is_contiguous()  # a latent's weights stay one row of memory
    x = data()
    assert torch.equal(made.encode(x), sae.encode(x))
    assert torch.equal(made(x), sae(x))


@pytest.mark.parametrize("name", saes.registered())
def test_scales_are_folded(name: str) -> None:
    for sae in (make(name), make_transcoder(name, skip_connection=True)):
        found, weights = parts(sae)
        scales = {"norm_scale": float(sae.norm_scale), "target_scale": float(sae.target_scale)}
        made = assembling.assemble(replace(found, **scales), weights, WEIGHTS)
        assert float(made.norm_scale) == float(made.target_scale) == 1
        assert made.cfg.normalize_activations == "none"
        x = data()
        torch.testing.assert_close(made.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made(x), sae(x), rtol=1e-5, atol=1e-5)


def test_a_latent_below_a_negative_threshold_is_silent() -> None:
    found, weights = parts(make("jumprelu", normalize_activations="none"))
    weights["threshold"] = torch.full((D_SAE,), -5.0)
    f = assembling.assemble(found, weights, WEIGHTS).encode(data())
    assert (f >= 0).all()


def test_the_norm_of_tokens_is_kept() -> None:
    found, weights = parts(make("topk", normalize_activations="none"))
    sae = assembling.assemble(replace(found, token_norm="layer_norm"), weights, WEIGHTS)
    assert (sae.token_norm, sae.cfg.normalize_activations) == ("layer_norm", "layer_norm")
    torch.testing.assert_close(sae.encode(data()), sae.encode(3 * data() + 7), rtol=1e-3, atol=1e-3)


def test_a_transcoder_that_normalises_tokens_is_refused() -> None:
    found, weights = parts(make_transcoder("jumprelu", normalize_activations="none"))
    with pytest.raises(UserError, match="normalize_activations=layer_norm of a transcoder"):
        assembling.assemble(replace(found, token_norm="layer_norm"), weights, WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"W_enc": torch.zeros(D_IN, D_SAE + 1)}, r"W_enc of shape \(16, 49\) where cfg\.json asks for \(16, 48\)"),
        ({"b_enc": None}, r"b_enc of shape \(missing\)"),
        ({"extra": torch.zeros(1)}, r"extra .* \(no such tensor\)"),
        ({"b_dec": torch.full((D_IN,), torch.nan)}, "b_dec of .* NaN"),
        ({"W_dec": torch.zeros(D_SAE, D_IN, dtype=torch.int8)}, "W_dec of type torch.int8"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    found, weights = parts(make("topk", normalize_activations="none"))
    weights = {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=words):
        assembling.assemble(found, weights, WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": {"k": 49}}, r"cfg\.json does not describe a topk SAE: sae\.k=49"),
        ({"values": {"k": "many"}}, "does not describe a topk SAE"),
        ({"d_out": 10, "values": {"k": 3}}, "topk transcoder SAE: sae.apply_b_dec_to_input"),
        ({"d_sae": 10**13}, r"asks for \(16, 10000000000000\)"),  # which costs no memory to find out
        ({"norm_scale": 0.0}, "normalises activations by 0.0"),
        ({"norm_scale": float("nan")}, "normalises activations by nan"),
    ],
)
def test_an_impossible_description_is_refused(changes: dict[str, Any], words: str) -> None:
    found, weights = parts(make("topk", normalize_activations="none"))
    with pytest.raises(UserError, match=words):
        assembling.assemble(replace(found, **changes), weights, WEIGHTS)


def test_names_and_sides_of_another_library() -> None:
    names = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias"}
    tensors = {"encoder.weight": torch.arange(6.0).view(3, 2), "encoder.bias": torch.zeros(3), "k": 3}
    found = assembling.renamed(WEIGHTS, tensors, names, ignored=("k", "threshold"))
    assert torch.equal(found["W_enc"], tensors["encoder.weight"].T)
    for changes, words in (
        ({"other": torch.zeros(1)}, r"w\.safetensors has other, which an SAE of its kind"),
        ({"encoder.bias": "text"}, r"no tensor encoder\.bias"),
        ({"encoder.weight": torch.zeros(3)}, r"encoder\.weight of shape \(3,\), which is no matrix"),
    ):
        with pytest.raises(UserError, match=words):
            assembling.renamed(WEIGHTS, tensors | changes, names, ignored=("k",))
