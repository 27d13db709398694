import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_saes import D_IN, D_SAE, data
from torch import Tensor

from saepipe import formats
from saepipe.errors import UserError
from saepipe.formats import saelens

OLDEST = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "device": "mps",
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
}
LATER = {
    "architecture": "standard",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": False,
    "finetuning_scaling_factor": False,
    "context_size": 1024,
    "model_name": "gemma-2b",
    "hook_name": "blocks.6.hook_resid_post",
    "hook_layer": 6,
    "hook_head_index": None,
    "prepend_bos": True,
    "normalize_activations": "none",
    "dtype": "torch.float32",
    "sae_lens_training_version": "3.13.0",
}
VECTORS = {"standard": ("b_enc",), "gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


def tensors(architecture: str = "standard", **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    shapes |= dict.fromkeys(VECTORS[architecture], (D_SAE,))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | more


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def relu(w: dict[str, Tensor], x: Tensor, *, centre: bool = True) -> Tensor:
    return torch.relu((x - w["b_dec"] if centre else x) @ w["W_enc"] + w["b_enc"])


def test_the_oldest_layout(tmp_path: Path) -> None:
    weights = tensors()
    sae = formats.load(write(tmp_path, OLDEST, weights))
    torch.testing.assert_close(sae.encode(data()), relu(weights, data()), rtol=1e-5, atol=1e-5)
    assert (sae.cfg.architecture, sae.cfg.apply_b_dec_to_input) == ("standard", True)
    assert sae.metadata["hook_name"] == sae.cfg.hook_name == "blocks.8.hook_resid_pre"
    assert (sae.metadata["model_name"], sae.metadata["context_size"]) == ("gpt2-small", 128)
    assert (sae.metadata["prepend_bos"], sae.metadata["hook_layer"]) == (True, 8)
    saelens.save(sae, tmp_path / "new", metadata=sae.metadata)
    assert torch.equal(formats.load(tmp_path / "new").encode(data()), sae.encode(data()))


def test_a_later_layout_with_a_head(tmp_path: Path) -> None:
    config = LATER | {"hook_name": "blocks.6.attn.hook_z", "hook_head_index": 3}
    weights = tensors()
    sae = formats.load(write(tmp_path, config, weights))
    torch.testing.assert_close(sae.encode(data()), relu(weights, data(), centre=False), rtol=1e-5, atol=1e-5)
    assert sae.metadata["hook_name"] == "blocks.6.attn.hook_z.head.3"


@pytest.mark.parametrize("key", ["activation_fn", "activation_fn_str"])
def test_topk_is_an_activation_function_there(key: str, tmp_path: Path) -> None:
    """Rows of the decoder have no say in it, as they have in what later versions train."""
    config = {name: item for name, item in LATER.items() if name != "activation_fn_str"}
    config |= {key: "topk", "activation_fn_kwargs": {"k": 5}, "normalize_activations": "layer_norm"}
    weights = tensors()
    sae = formats.load(write(tmp_path, config, weights))
    x = data()
    x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    pre = relu(weights, x, centre=False)
    top = pre.topk(5)
    f = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)
    assert (sae.cfg.architecture, sae.cfg.k, sae.token_norm) == ("topk", 5, "layer_norm")
    assert not sae.cfg.rescale_acts_by_decoder_norm


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    weights = tensors(architecture, **({"b_enc": torch.ones(D_SAE)} if architecture == "gated" else {}))
    sae = formats.load(write(tmp_path, LATER | {"architecture": architecture}, weights))
    pre = data() @ weights["W_enc"]
    if architecture == "gated":
        f = torch.relu(pre * weights["r_mag"].exp() + weights["b_mag"]) * (pre + weights["b_gate"] > 0)
    else:
        pre = pre + weights["b_enc"]
        f = torch.relu(pre) * (pre > weights["threshold"])
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_finetuned_factors_are_folded(name: str, tmp_path: Path) -> None:
    factors = torch.linspace(0.5, 2, D_SAE)
    weights = tensors(**{name: factors})
    sae = formats.load(write(tmp_path, LATER | {"finetuning_scaling_factor": True}, weights))
    f = relu(weights, data(), centre=False)
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(f), (f * factors) @ weights["W_dec"] + weights["b_dec"], rtol=1e-5, atol=1e-4)
    with pytest.raises(UserError, match=r"scaling_factor of shape \(48,\).*finetuning_scaling_factor=False"):
        formats.load(write(tmp_path, LATER, weights))
    ones = tensors(**{name: torch.ones(D_SAE)})
    assert torch.equal(formats.load(write(tmp_path, LATER, ones)).W_dec, weights["W_dec"])


def test_bfloat16_opens(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    sae = formats.load(write(tmp_path, OLDEST | {"dtype": "torch.bfloat16"}, weights))
    f = relu({name: tensor.float() for name, tensor in weights.items()}, data())
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_fn_str": "tanh-relu"}, "says activation_fn=tanh-relu"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5, "signed": True}},
            "topk .*signed",
        ),
        ({"activation_fn_str": "topk"}, "no valid k"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "architecture": "gated"}, "of a gated SAE"),
        (
            {"normalize_activations": True},
            "=expected_average_only_in, which is not in the weights",
        ),
        ({"normalize_activations": "expected_average_only_in"}, "is not in the weights"),
        ({"d_sae": None}, "no valid d_sae"),
    ],
)
def test_what_would_open_with_other_numbers_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        formats.load(write(tmp_path, LATER | changes, tensors()))
