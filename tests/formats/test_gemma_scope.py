import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_saes import D_IN, D_SAE, data
from torch import Tensor

from saepipe import formats
from saepipe.errors import UserError
from saepipe.formats import gemma_scope


def tensors(**more: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "w_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["threshold"] = torch.rand(D_SAE, generator=generator)
    return {name: tensor for name, tensor in (drawn | more).items() if tensor is not None}


def write_one(folder: Path, weights: dict[str, Tensor], *, upper: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name.replace("w_", "W_") if upper else name: tensor.numpy() for name, tensor in weights.items()}
    np.savez(folder / "params.npz", **arrays)
    return folder


def write_two(folder: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    named = {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt", "hf_hook_point_in": "model.layers.7.output"}
    (folder / "config.json").write_text(json.dumps(named | config))
    save_file(weights, folder / "params.safetensors")
    return folder


def reference(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and output, as Google's code computes them."""
    pre = x @ w["w_enc"] + w["b_enc"]
    f = (pre > w["threshold"]) * torch.relu(pre)
    out = f @ w["w_dec"] + w["b_dec"]
    return f, out + x @ w["affine_skip_connection"] if "affine_skip_connection" in w else out


@pytest.mark.parametrize("upper", [True, False])
def test_one_does_what_it_says(upper: bool, tmp_path: Path) -> None:
    weights = tensors(threshold=torch.linspace(-1, 2, D_SAE))
    folder = write_one(tmp_path / "gemma-scope-2b-pt-att" / "layer_12" / "width_16k", weights, upper=upper)
    assert formats.detect(folder) == formats.detect(folder / "params.npz") == "gemma_scope"
    for path in (folder, folder / "params.npz"):
        sae = formats.load(path)
        f, out = reference(weights, data())
        torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(f), out, rtol=1e-5, atol=1e-5)
        assert (sae.is_transcoder, sae.cfg.architecture) == (False, "jumprelu")
        assert sae.metadata == {"model_name": "gemma-2-2b", "hook_name": "blocks.12.attn.hook_z"}


def test_a_transcoder_of_one_is_known_by_its_release(tmp_path: Path) -> None:
    folder = write_one(tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "layer_3", tensors())
    sae = formats.load(folder)
    assert sae.is_transcoder
    assert sae.metadata["hook_name"] == "blocks.3.ln2.hook_normalized"
    assert sae.metadata["hook_name_out"] == "blocks.3.hook_mlp_out"
    torch.testing.assert_close(sae(data()), reference(tensors(), data())[1], rtol=1e-5, atol=1e-5)


def test_an_sae_of_embeddings_takes_them_scaled(tmp_path: Path) -> None:
    sae = formats.load(write_one(tmp_path / "gemma-scope-9b-pt-res" / "embedding" / "width_4k", tensors()))
    f, out = reference(tensors(), data())
    scale = D_IN**0.5
    torch.testing.assert_close(sae.encode(data() * scale), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(f), out * scale, rtol=1e-5, atol=1e-4)
    assert sae.metadata["hook_name"] == "hook_embed"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcoder", [False, True])
def test_two_does_what_it_says(transcoder: bool, skip: bool, tmp_path: Path) -> None:
    weights = tensors(affine_skip_connection=torch.linspace(-1, 1, D_IN**2).view(D_IN, D_IN) if skip else None)
    config: dict[str, Any] = {"hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output"}
    if transcoder:
        config["hf_hook_point_out"] = "model.layers.7.post_feedforward_layernorm.output"
    folder = write_two(tmp_path, weights, **config)
    assert formats.detect(folder) == "gemma_scope"
    sae = formats.load(folder)
    f, out = reference(weights, data())
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(data()), out, rtol=1e-5, atol=1e-4)
    assert (sae.is_transcoder, sae.cfg.skip_connection) == (transcoder or skip, skip)
    assert sae.metadata["hook_name"] == "model.layers.7.mlp.input"
    assert sae.metadata.get("hook_name_out") == ("blocks.7.hook_mlp_out" if transcoder else None)


def test_two_in_bfloat16(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    sae = formats.load(write_two(tmp_path, weights))
    f, _ = reference({name: tensor.float() for name, tensor in weights.items()}, data())
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)
    assert sae.metadata["hook_name"] == "blocks.7.hook_resid_post"
    assert sae.metadata["hf_hook_name"] == "model.layers.7.output"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"b_enc": None}, "no tensor b_enc"),
        ({"b_enc": torch.zeros(3)}, r"b_enc of shape \(3,\)"),
        ({"w_enc": torch.zeros(2, D_IN, D_SAE)}, "which is no matrix"),
        ({"threshold": torch.full((D_SAE,), torch.nan)}, "threshold of .* NaN"),
        ({"other": torch.zeros(1)}, "has other, which"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    for folder in (write_one(tmp_path / "1", tensors(**changes)), write_two(tmp_path / "2", tensors(**changes))):
        with pytest.raises(UserError, match=words):
            gemma_scope.load(folder)


def test_scales_of_unknown_use_are_refused(tmp_path: Path) -> None:
    assert gemma_scope.load(write_one(tmp_path, tensors(scaling_factor=torch.ones(D_SAE)))).d_sae == D_SAE
    with pytest.raises(UserError, match="scaling_factor other than 1"):
        gemma_scope.load(write_one(tmp_path, tensors(scaling_factor=torch.full((D_SAE,), 2.0))))


def test_configurations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for config, words in (
        ({"architecture": "topk"}, "says architecture=topk"),
        ({"affine_connection": True}, r"affine_connection=True, and params\.safetensors has none"),
    ):
        with pytest.raises(UserError, match=words):
            gemma_scope.load(write_two(tmp_path, tensors(), **config))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        gemma_scope.load(tmp_path)
