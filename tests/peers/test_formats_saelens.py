"""Checkpoints of SAELens's own training, its old layouts, and the releases that it converts: saepipe opens the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_saes import D_IN, D_SAE, data, make
from torch import Tensor

from saepipe import formats

pytest.importorskip("sae_lens")

import sae_lens
from sae_lens.config import SAETrainerConfig
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer

KEYS: dict[str, dict[str, Any]] = {
    "Standard": {},
    "Gated": {},
    "TopK": {"k": 5},
    "JumpReLU": {"jumprelu_init_threshold": 0.1},
    "BatchTopK": {"k": 5},
    "MatryoshkaBatchTopK": {"k": 5, "matryoshka_widths": [12, D_SAE]},
}
NORMS = ("none", "expected_average_only_in", "covariance_whitening", "layer_norm", "constant_norm_rescale")


def same(ours: Any, f: Tensor, out: Tensor) -> None:
    """Compare with their latents and outputs of `data(256)`, and print the largest differences."""
    with torch.no_grad():
        latents, reconstruction = ours.encode(data(256)), ours.decode(f, data(256))
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(latents, f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstruction, out, rtol=1e-5, atol=2e-5)
    print(f"{float((latents - f).abs().max()):.1e} {float((reconstruction - out).abs().max()):.1e}")


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(D_IN) + 0.3 * torch.randn(D_IN, D_IN, generator=generator)
    while True:
        yield 3 * torch.randn(64, D_IN, generator=generator) @ mixing + 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(
    ("name", "norm"),
    # Its nested training decodes more than once, which its norms of tokens do not survive.
    [(name, norm) for name in KEYS for norm in NORMS if not ("Matryoshka" in name and norm in NORMS[3:])],
)
@torch.no_grad()
def test_checkpoints_of_its_training(name: str, norm: str, apply_b_dec: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=D_IN, d_sae=D_SAE, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec, **KEYS[name]
    )
    settings = SAETrainerConfig(
        64 * 40,
        64,
        lr=1e-2,
        lr_end=1e-3,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path),
        n_batches_for_norm_estimate=20,
    )
    with torch.enable_grad():
        SAETrainer(settings, getattr(sae_lens, f"{name}TrainingSAE")(cfg), batches()).fit()
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]

    scaler = ActivationScaler()
    scaler.load(folder / "activation_scaler.json")
    assert (scaler.scaling_factor is not None, scaler.whitening is not None) == (norm == NORMS[1], norm == NORMS[2])
    TrainingSAE.load_from_disk(folder).save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    f = theirs.encode(scaler.scale(data(256)))
    out = scaler.unscale(theirs.decode(f))
    same(formats.load(folder), f, out)


@pytest.mark.parametrize("norm", NORMS[3:])
@torch.no_grad()
def test_it_opens_an_sae_that_normalises_each_token(norm: str, tmp_path: Path) -> None:
    sae = make("topk", k=5)
    sae.token_norm = norm
    formats.save(sae, tmp_path, metadata={})
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    f = theirs.encode(data(256))
    out = theirs.decode(f)
    same(sae, f, out)
    same(formats.load(tmp_path), f, out)


OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "context_size": 128,
}


@pytest.mark.parametrize("norm", [None, False, "layer_norm"])
@pytest.mark.parametrize("name", ["standard", "topk", "gated", "jumprelu"])
@torch.no_grad()
def test_layouts_from_before_version_6(name: str, norm: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    vectors = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(name, ("b_enc",))
    shapes |= dict.fromkeys(vectors, (D_SAE,))
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(weights, tmp_path / "sae_weights.safetensors")
    config = OLD | {"normalize_activations": norm, "architecture": name if name != "topk" else "standard"}
    if name == "topk":
        config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    theirs, sae = sae_lens.SAE.load_from_disk(tmp_path), formats.load(tmp_path)
    f = theirs.encode(data(256))
    same(sae, f, theirs.decode(f))
    for key in ("model_name", "hook_name", "context_size", "prepend_bos"):
        assert sae.metadata[key] == theirs.cfg.metadata[key]


def converted(
    monkeypatch: pytest.MonkeyPatch, loader: Any, folder: Path, repo_id: str, name: str, **overrides: Any
) -> Any:
    """Let SAELens convert a release that lies in a local folder instead of the hub."""

    def local(repo_id: str, filename: str, subfolder: str = "", **options: Any) -> str:
        return str(
            folder / filename.removeprefix(f"{name}/")
            if not subfolder
            else folder / subfolder[len(name) + 1 :] / filename
        )

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    cfg, state, _ = loader(repo_id, name, "cpu", False, {"dtype": "float32", **overrides})
    cfg = loaders.handle_config_defaulting(cfg)
    kind = sae_lens.SAE.get_sae_config_class_for_architecture(cfg["architecture"])
    sae = sae_lens.SAE.get_sae_class_for_architecture(cfg["architecture"])(kind.from_dict(cfg))
    sae.load_state_dict(state)
    return sae


def jumprelu(**more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "w_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "w_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
        "threshold": (D_SAE,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | more


@pytest.mark.parametrize("kind", ["res", "transcoders"])
@torch.no_grad()
def test_gemma_scope(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, name = f"google/gemma-scope-2b-pt-{kind}", "layer_12/width_16k/average_l0_82"
    folder = tmp_path / repo / name
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{key.replace("w_", "W_"): tensor.numpy() for key, tensor in jumprelu().items()})
    transcoder = kind == "transcoders"
    loader = loaders.gemma_2_transcoder_huggingface_loader if transcoder else loaders.gemma_2_sae_huggingface_loader
    sizes = {"d_in": D_IN, "d_sae": D_SAE, **({"d_out": D_IN} if transcoder else {})}
    theirs = converted(monkeypatch, loader, folder, repo, name, **sizes)
    sae = formats.load(folder)
    f = theirs.encode(data(256))
    same(sae, f, theirs.decode(f))
    assert sae.is_transcoder == transcoder
    for key in ("model_name", "hook_name", *(["hook_name_out"] if transcoder else [])):
        assert sae.metadata[key] == theirs.cfg.metadata[key]


@pytest.mark.parametrize("kind", ["resid_post", "transcoder", "transcoder_affine"])
@torch.no_grad()
def test_gemma_scope_2(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = kind == "transcoder_affine"
    weights = jumprelu(**({"affine_skip_connection": torch.randn(D_IN, D_IN)} if affine else {}))
    side = "output" if kind == "resid_post" else "pre_feedforward_layernorm.output"
    config = {"architecture": "jump_relu", "model_name": "gemma-3-1b", "hf_hook_point_in": f"model.layers.7.{side}"}
    if kind != "resid_post":
        config["hf_hook_point_out"] = "model.layers.7.post_feedforward_layernorm.output"
    (tmp_path / "config.json").write_text(json.dumps(config | {"affine_connection": affine}))
    save_file(weights, tmp_path / "params.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "params.safetensors").items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    name = f"{kind}/layer_7_width_16k_l0_small"
    theirs = converted(monkeypatch, loaders.gemma_3_sae_huggingface_loader, tmp_path, "google/gemma-scope-2-1b", name)
    sae = formats.load(tmp_path)
    f = theirs.encode(data(256))
    if affine:  # theirs takes the matrix for its transpose, which Google's own code does not
        theirs.W_skip.copy_(weights["affine_skip_connection"].T)
        torch.testing.assert_close(sae(data(256)), theirs(data(256)), rtol=1e-5, atol=1e-4)
    else:
        same(sae, f, theirs.decode(f))


@torch.no_grad()
def test_llama_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
    weights = {
        key: torch.randn(shape, generator=generator) for key, shape in (shapes | {"decoder.bias": (D_IN,)}).items()
    }
    weights["decoder.weight"] /= weights["decoder.weight"].norm(dim=0)
    hook = "blocks.8.hook_resid_post"
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.6,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 11.0, "out": 11.0},
        "hook_point_in": hook,
        "hook_point_out": hook,
    }
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints").mkdir()
    save_file(weights, tmp_path / "checkpoints" / "final.safetensors")
    theirs = converted(monkeypatch, loaders.llama_scope_sae_huggingface_loader, tmp_path, "fnlp/x", "L8R")
    theirs.fold_activation_norm_scaling_factor(D_IN**0.5 / 11.0)  # what its from_pretrained does with this release
    f = theirs.encode(data(256))
    same(formats.load(tmp_path), f, theirs.decode(f))
