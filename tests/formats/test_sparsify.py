import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_saes import D_IN, D_OUT, D_SAE, data, make, make_transcoder
from torch import Tensor

from saepipe import formats
from saepipe.errors import UserError
from saepipe.formats import sparsify

K = 5
CONFIG = {
    "activation": "topk",
    "expansion_factor": 3,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}


def tensors(dtype: torch.dtype = torch.float32, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return drawn | more


def write(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: item for key, item in (CONFIG | changes).items() if item is not None}
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae.safetensors")
    return folder


def reference(w: dict[str, Tensor], x: Tensor, *, transcode: bool = False) -> tuple[Tensor, Tensor]:
    """Latents and output, as sparsify computes them."""
    centred = x if transcode else x - w["b_dec"]
    pre = torch.relu(torch.nn.functional.linear(centred, w["encoder.weight"], w["encoder.bias"]))
    top = pre.topk(K)
    f = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    out = f @ w["W_dec"] + w["b_dec"]
    return f, out + x @ w["W_skip"].T if "W_skip" in w else out


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_does_what_sparsify_does(transcode: bool, skip: bool, tmp_path: Path) -> None:
    skipped = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1))
    weights = tensors(**({"W_skip": skipped} if skip else {}))
    folder = write(tmp_path / "layers.3", weights, transcode=transcode, skip_connection=skip, multi_topk=True)
    assert formats.detect(folder) == "sparsify"
    sae = formats.load(folder)
    f, out = reference(weights, data(), transcode=transcode)
    exact = transcode or not skip
    torch.testing.assert_close(sae.encode(data()), f, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    torch.testing.assert_close(sae(data()), out, rtol=1e-5, atol=1e-4)
    assert (sae.is_transcoder, sae.cfg.k, sae.d_sae) == (transcode or skip, K, D_SAE)


def test_bfloat16_opens(tmp_path: Path) -> None:
    weights = tensors(torch.bfloat16)
    sae = formats.load(write(tmp_path, weights, num_latents=D_SAE))
    f, out = reference({name: tensor.float() for name, tensor in weights.items()}, data())
    assert torch.equal(sae.encode(data()), f)
    torch.testing.assert_close(sae(data()), out, rtol=1e-5, atol=1e-5)
    assert formats.load(tmp_path, dtype=torch.bfloat16).W_enc.dtype == torch.bfloat16


def test_the_folder_says_what_it_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": "gpt2", "dataset": "text", "ctx_len": 64}))
    for name, hook in {
        "layers.3": "blocks.3.hook_resid_post",
        "h.10.mlp": "blocks.10.hook_mlp_out",
        "gpt_neox.layers.2.attention": "blocks.2.hook_attn_out",
        "embed_tokens": "hook_embed",
    }.items():
        metadata = sparsify.load(write(tmp_path / name, tensors())).metadata
        assert metadata == {"model_name": "gpt2", "dataset_path": "text", "context_size": 64, "hook_name": hook}
    for model, name, hook in (
        ("gpt2", "h.1.mlp", "transformer.h.1.mlp.input"),
        ("EleutherAI/pythia-160m", "layers.1.mlp", "gpt_neox.layers.1.mlp.input"),
        ("meta-llama/Llama-3.2-1B", "layers.1.mlp", "model.layers.1.mlp.input"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model": model}))
        metadata = sparsify.load(write(tmp_path / name, tensors(), transcode=True)).metadata
        assert (metadata["hook_name"], metadata["hook_name_out"]) == (hook, "blocks.1.hook_mlp_out")
    copying = write(tmp_path / "h.2", tensors(W_skip=torch.zeros(D_IN, D_IN)), skip_connection=True)
    metadata = sparsify.load(copying).metadata
    assert metadata["hook_name"] == metadata["hook_name_out"] == "blocks.2.hook_resid_post"
    assert "hook_name" not in sparsify.load(write(tmp_path / "sae", tensors())).metadata


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_written_and_read_it_does_the_same(apply_b_dec: bool, tmp_path: Path) -> None:
    sae = make("topk", k=K, apply_b_dec_to_input=apply_b_dec)
    formats.save(sae, tmp_path, format="sparsify", metadata={"hook_name": "blocks.0.hook_resid_post"})
    loaded = formats.load(tmp_path)
    torch.testing.assert_close(loaded.encode(data()), sae.encode(data()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(data()), sae(data()), rtol=1e-5, atol=1e-5)
    assert loaded.metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert loaded.metadata["training_architecture_details"]["rescale_acts_by_decoder_norm"]
    # Once folded, nothing moves any more.
    formats.save(loaded, tmp_path / "again", format="sparsify")
    for name, tensor in load_file(tmp_path / "sae.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "sae.safetensors")[name], tensor)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_goes_and_comes(skip: bool, tmp_path: Path) -> None:
    sae = make_transcoder("topk", d_out=D_IN, k=K, skip_connection=skip)
    formats.save(sae, tmp_path, format="sparsify")
    loaded = formats.load(tmp_path)
    assert (loaded.is_transcoder, loaded.cfg.skip_connection) == (True, skip)
    torch.testing.assert_close(loaded.encode(data()), sae.encode(data()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(data()), sae(data()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu", "batchtopk", "matryoshka"])
def test_what_sparsify_has_not_is_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"this {name} SAE cannot be written for sparsify, which has TopK alone"):
        formats.save(make(name), tmp_path, format="sparsify")
    assert not list(tmp_path.iterdir())


def test_nor_are_other_widths_and_norms(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"topk transcoder .* as many outputs as inputs"):
        formats.save(make_transcoder("topk", d_out=D_OUT, k=K), tmp_path, format="sparsify")
    sae = make("topk", k=K)
    sae.token_norm = "layer_norm"
    with pytest.raises(UserError, match="has no normalize_activations=layer_norm"):
        formats.save(sae, tmp_path, format="sparsify")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "groupmax"}, "says activation=groupmax, which no architecture here does"),
        ({"signed": True}, "says signed=True"),
        ({"d_in": None}, "no valid d_in"),
        ({"d_in": 8, "num_latents": D_SAE}, r"W_enc of shape \(16, 48\) where cfg\.json asks for \(8, 48\)"),
        ({"k": None}, "no valid k"),
        ({"k": 49}, r"does not describe a topk SAE: sae\.k=49"),
        ({"num_latents": "many"}, "no valid num_latents"),
        ({"skip_connection": True}, "no tensor W_skip"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        sparsify.load(write(tmp_path, tensors(), **changes))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    for weights, words in (
        (tensors(W_skip=torch.zeros(D_IN, D_IN)), "has W_skip, which"),
        (tensors(b_dec=torch.full((D_IN,), torch.nan)), "b_dec of .* NaN"),
        (tensors(b_dec=torch.zeros(3)), r"b_dec of shape \(3,\)"),
        ({"b_dec": torch.zeros(D_IN)}, r"no tensor encoder\.weight"),
    ):
        with pytest.raises(UserError, match=words):
            sparsify.load(write(tmp_path, weights))
    whole = (write(tmp_path, tensors()) / "sae.safetensors").read_bytes()
    (tmp_path / "sae.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="damaged"):
        sparsify.load(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"has no cfg\.json"):
        sparsify.load(tmp_path)
