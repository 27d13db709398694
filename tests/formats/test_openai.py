from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saes import D_IN, D_SAE, data
from torch import Tensor
from torch.nn.functional import linear

from saepipe import formats
from saepipe.errors import UserError
from saepipe.formats import openai

K = 5
TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def write(path: Path, **changes: Any) -> Path:
    """A file as the state_dict of their Autoencoder; what is None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"pre_bias": (D_IN,), "latent_bias": (D_SAE,), "encoder.weight": (D_SAE, D_IN)}
    content: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    content |= {
        "decoder.weight": torch.randn(D_IN, D_SAE, generator=generator),
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
    }
    content = {name: item for name, item in (content | TOPK | changes).items() if item is not None}
    torch.save(OrderedDict(content), path)
    return path


def reference(w: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction, as OpenAI's code computes them."""
    mean, std = x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
    normed = (x - mean) / (std + 1e-5) if w["activation"] == "TopK" else x
    f = linear(normed - w["pre_bias"], w["encoder.weight"], w["latent_bias"]).relu()
    if w["activation"] == "TopK":
        top = f.topk(K)
        f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
    out = linear(f, w["decoder.weight"]) + w["pre_bias"]
    return f, out * std + mean if w["activation"] == "TopK" else out


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_does_what_openai_does(activation: str, tmp_path: Path) -> None:
    relu = {"activation": "ReLU", "activation_state_dict": {}}
    path = write(tmp_path / "5.pt", **({} if activation == "TopK" else relu))
    assert formats.detect(path) == "openai"
    sae = formats.load(path)
    f, out = reference(torch.load(path, weights_only=True), data())
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(data())), out, rtol=1e-5, atol=1e-4)
    assert sae.token_norm == ("layer_norm" if activation == "TopK" else "none")


def test_a_tied_decoder_is_the_encoder(tmp_path: Path) -> None:
    tied = torch.randn(D_SAE, D_IN)
    changes = {"encoder.weight": tied, "decoder.linear.weight": tied, "decoder.weight": None}
    sae = formats.load(write(tmp_path / "5.pt", **changes))
    assert torch.equal(sae.W_enc, sae.W_dec.T)


def test_the_path_says_what_it_was_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt")
    assert formats.load(path).metadata == {"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_post"}
    assert formats.load(write(tmp_path / "8.pt")).metadata == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "Identity"}, "says activation=Identity"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "says postact_fn=Identity"),
        ({"activation_state_dict": None}, "no valid k"),
        ({"activation_state_dict": {"k": 49}}, r"sae\.k=49"),
        ({"encoder.weight": torch.zeros(D_SAE)}, "which is no matrix"),
        ({"latent_bias": torch.zeros(3)}, r"b_enc of shape \(3,\)"),
        ({"pre_bias": torch.full((D_IN,), torch.nan)}, "b_dec of .* NaN"),
        ({"decoder.weight": None}, r"no tensor decoder\.weight"),
        ({"other": torch.zeros(1)}, "has other, which"),
    ],
)
def test_what_is_no_such_autoencoder_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        openai.load(write(tmp_path / "5.pt", **changes))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "5.pt")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"5\.pt is damaged"):
        openai.load(path)
    with pytest.raises(UserError, match=r"6\.pt is no file"):
        openai.load(tmp_path / "6.pt")
