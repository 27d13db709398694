import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_saes import D_IN, D_SAE, data, make
from torch import Tensor

from saepipe import formats
from saepipe.errors import UserError
from saepipe.saes.base import SAE

FACTOR = 0.4
THEIRS = {"matryoshka": "matryoshka_batchtopk"}


def write(folder: Path, sae: SAE, kind: str, **more: Any) -> Path:
    """A checkpoint as SAELens's training leaves it, of an SAE of ours whose scale is not folded."""
    weights = {name: tensor.detach().contiguous() for name, tensor in sae.named_parameters()}
    name = THEIRS.get(sae.cfg.architecture, sae.cfg.architecture)
    if name.endswith("batchtopk"):
        weights["topk_threshold"] = sae.get_buffer("threshold").double()
    config = {
        "architecture": name,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": kind,
        "reshape_activations": "none",
        "decoder_init_norm": None,
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.0.hook_resid_post"},
        **{key: vars(sae.cfg)[key] for key in ("k", "rescale_acts_by_decoder_norm") if key in vars(sae.cfg)},
        **more,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def scaler(folder: Path, factor: Any) -> None:
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))


def trained(name: str, **values: Any) -> SAE:
    sae = make(name, **values)
    if name in ("batchtopk", "matryoshka"):
        sae.get_buffer("threshold").fill_(0.03)
    return sae


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("name", ["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka"])
def test_the_scale_beside_the_weights_is_folded(name: str, apply_b_dec: bool, tmp_path: Path) -> None:
    sae = trained(name, apply_b_dec_to_input=apply_b_dec)  # whose scale is FACTOR
    scaler(tmp_path, FACTOR)
    loaded = formats.load(write(tmp_path, sae, "expected_average_only_in"))
    f = sae.encode(data())
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(loaded.encode(data()), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(data()), sae(data()), rtol=1e-5, atol=1e-5)
    assert loaded.cfg.normalize_activations == "none"
    assert loaded.metadata["hook_name"] == "blocks.0.hook_resid_post"


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka", "topk"])
def test_a_checkpoint_without_a_scale_keeps_its_architecture(name: str, tmp_path: Path) -> None:
    sae = trained(name, normalize_activations="none")
    scaler(tmp_path, None)  # as it is written then
    loaded = formats.load(write(tmp_path, sae, "none"))
    assert type(loaded) is type(sae)
    assert torch.equal(loaded.encode(data()), sae.encode(data()))


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("name", ["standard", "gated", "topk", "jumprelu", "batchtopk"])
def test_whitening_is_folded(name: str, apply_b_dec: bool, tmp_path: Path) -> None:
    sae = trained(name, normalize_activations="none", apply_b_dec_to_input=apply_b_dec)
    generator = torch.Generator().manual_seed(3)
    matrix = torch.eye(D_IN).double() + 0.2 * torch.randn(D_IN, D_IN, generator=generator).double()
    mean, inverse = data().double().mean(0), torch.linalg.inv(matrix).contiguous()
    save_file(
        {"mean": mean, "matrix": matrix, "inverse_matrix": inverse}, tmp_path / "activation_whitening.safetensors"
    )
    scaler(tmp_path, None)
    loaded = formats.load(write(tmp_path, sae, "covariance_whitening"))
    f = sae.encode(((data().double() - mean) @ matrix).float())
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(loaded.encode(data()), f, rtol=1e-4, atol=1e-5)
    out = sae.decode(f).double() @ inverse + mean
    torch.testing.assert_close(loaded.decode(f), out.float(), rtol=1e-4, atol=1e-4)


def test_a_scale_that_only_the_release_knows_is_given(tmp_path: Path) -> None:
    sae = trained("standard")
    folder = write(tmp_path, sae, "expected_average_only_in")
    loaded = formats.load(folder, norm_scale=FACTOR)
    torch.testing.assert_close(loaded.encode(data()), sae.encode(data()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(data()), sae(data()), rtol=1e-5, atol=1e-5)
    scaler(tmp_path, FACTOR)
    with pytest.raises(UserError, match=r"norm_scale=0\.4 is for an SAE that leaves it open"):
        formats.load(folder, norm_scale=FACTOR)
    with pytest.raises(UserError, match=r"norm_scale=0\.4 is for an SAE that leaves it open"):
        formats.load(write(tmp_path, sae, "none"), norm_scale=FACTOR)
    formats.save(make("topk", k=3), tmp_path / "other", format="sparsify")
    with pytest.raises(UserError, match="format sparsify, which says itself"):
        formats.load(tmp_path / "other", norm_scale=FACTOR)


def damage(whitening: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], str]]:
    nan = whitening | {"mean": torch.full((D_IN,), torch.nan)}
    return [({"mean": whitening["mean"]}, r"no matrix of shape \(16, 16\)"), (nan, "mean of .* NaN")]


def test_what_it_was_normalised_by_must_be_there(tmp_path: Path) -> None:
    sae = make("standard")
    write(tmp_path, sae, "expected_average_only_in")
    for factor in (None, "much"):
        scaler(tmp_path, factor)
        with pytest.raises(UserError, match="_only_in, which is not in the weights, nor in activation_sc"):
            formats.load(tmp_path)
    scaler(tmp_path, -1.0)
    with pytest.raises(UserError, match=r"normalises activations by -1\.0"):
        formats.load(tmp_path)
    scaler(tmp_path, FACTOR)
    with pytest.raises(UserError, match=r"says scaling_factor=0\.4 where cfg\.json says normalize_activations=none"):
        formats.load(write(tmp_path, sae, "none"))
    scaler(tmp_path, None)
    with pytest.raises(UserError, match="covariance_whitening, which is not in the weights"):
        formats.load(write(tmp_path, sae, "covariance_whitening"))
    eye = torch.eye(D_IN)
    for content, words in damage({"mean": torch.zeros(D_IN), "matrix": eye, "inverse_matrix": eye + 0}):
        save_file(content, tmp_path / "activation_whitening.safetensors")
        with pytest.raises(UserError, match=words):
            formats.load(tmp_path)
