import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_saes import D_IN, D_SAE, data
from torch import Tensor
from torch.nn.functional import linear

from saepipe import formats
from saepipe.errors import UserError
from saepipe.formats import llama_scope

HOOK, TARGET = "blocks.8.hook_resid_post", "blocks.8.hook_mlp_out"
CONFIG = {
    "d_model": D_IN,
    "d_sae": D_SAE,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "apply_decoder_bias_to_pre_encoder": False,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.6,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 11.0, "out": 11.0},
    "sparsity_include_decoder_norm": True,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "top_k": 50,
}


def tensors(**more: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,)}
    shapes |= {"decoder.weight": (D_IN, D_SAE), "decoder.bias": (D_IN,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor for name, tensor in (drawn | more).items() if tensor is not None}


def write(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = {key: item for key, item in (CONFIG | changes).items() if item is not None}
    (folder / "hyperparams.json").write_text(json.dumps(config))
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    return folder


def reference(w: dict[str, Tensor], x: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Latents of the scaled SAE, and output: the gate is that of the SAE whose scales are in its weights."""
    norms = config["dataset_average_activation_norm"]
    scale, target_scale = D_IN**0.5 / norms["in"], D_IN**0.5 / norms["out"]
    if config["norm_activation"] == "inference":
        scale = target_scale = 1.0
    bias = w.get("decoder.bias", torch.zeros(D_IN))
    centred = x * scale - bias if config["apply_decoder_bias_to_pre_encoder"] else x * scale
    pre = linear(centred, w["encoder.weight"], w["encoder.bias"])
    raw, decoder = pre / scale, w["decoder.weight"] * scale / target_scale
    score = raw * decoder.norm(dim=0) if config["sparsity_include_decoder_norm"] else raw
    f = pre * (score > config["jump_relu_threshold"])
    return f, (linear(f, w["decoder.weight"]) + bias) / target_scale


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hook_point_out": TARGET, "dataset_average_activation_norm": {"in": 4.0, "out": 1.3}},
        {"sparsity_include_decoder_norm": False},
        {"apply_decoder_bias_to_pre_encoder": True},
        {"use_decoder_bias": False},
        {"norm_activation": "inference"},
    ],
)
def test_does_what_it_says(changes: dict[str, Any], tmp_path: Path) -> None:
    weights = tensors(**({"decoder.bias": None} if "use_decoder_bias" in changes else {}))
    folder = write(tmp_path / "Llama3_1-8B-Base-L8R-8x", weights, **changes)
    assert formats.detect(folder) == "llama_scope"
    sae = formats.load(folder)
    f, out = reference(weights, data(), CONFIG | changes)
    assert 0.1 < (f > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(data()), out, rtol=1e-5, atol=1e-4)
    assert sae.metadata["model_name"] == "meta-llama/Llama-3.1-8B"
    assert (sae.metadata["hook_name"], sae.metadata.get("hook_name_out")) == (HOOK, changes.get("hook_point_out"))
    assert sae.is_transcoder == ("hook_point_out" in changes)


def test_bfloat16_opens(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    sae = formats.load(write(tmp_path, weights))
    f, _ = reference({name: tensor.float() for name, tensor in weights.items()}, data(), CONFIG)
    torch.testing.assert_close(sae.encode(data()), f, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": "topk"}, "says act_fn=topk, where only jumprelu is read"),
        ({"use_glu_encoder": True}, "says use_glu_encoder=True"),
        ({"norm_activation": "token-wise"}, "says norm_activation=token-wise"),
        ({"dataset_average_activation_norm": None}, "no valid dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 1.0}}, "no valid out"),
        ({"dataset_average_activation_norm": {"in": 0.0, "out": 1.0}}, "no valid dataset_average_activation_norm"),
        ({"jump_relu_threshold": None}, "no valid jump_relu_threshold"),
        ({"d_model": 8}, r"asks for \(8, 48\)"),
        ({"use_decoder_bias": False}, r"has decoder\.bias, which"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        llama_scope.load(write(tmp_path, tensors(), **changes))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"encoder.bias": torch.full((D_SAE,), torch.nan)}, "b_enc of .* NaN"),
        ({"encoder.bias": None}, r"no tensor encoder\.bias"),
        ({"encoder.bias": torch.zeros(3)}, r"b_enc of shape \(3,\)"),
    ):
        with pytest.raises(UserError, match=words):
            llama_scope.load(write(tmp_path, tensors(**changes)))
    path = tmp_path / "checkpoints" / "final.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"final\.safetensors is damaged"):
        llama_scope.load(tmp_path)
