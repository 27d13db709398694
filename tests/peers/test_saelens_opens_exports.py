"""SAELens opens what saepipe exports, and encodes and decodes the same (`make peers` runs this beside sae-lens)."""

from pathlib import Path

import pytest
import torch

from saepipe import saes
from saepipe.formats import saelens
from saepipe.saes.base import SAE

sae_lens = pytest.importorskip("sae_lens")

D_IN, D_OUT, D_SAE = 16, 10, 48


@torch.no_grad()
def trained(sae: SAE, generator: torch.Generator) -> None:
    """Change every weight, as training does."""
    for key, parameter in sae.named_parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.abs() if key == "threshold" else noise)
    for _, buffer in sae.named_buffers():
        if buffer.dtype == torch.float64:  # a threshold
            buffer.fill_(0.3)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("name", saes.registered())
def test_encodes_and_decodes_the_same(name: str, apply_b_dec: bool, tmp_path: Path) -> None:
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=apply_b_dec), D_IN)
    x = 3 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(5)) + 1
    generator = torch.Generator().manual_seed(0)
    sae.initialise(generator, mean=x.mean(0), norm_scale=0.4)
    trained(sae, generator)
    saelens.save(sae, tmp_path / "sae", metadata={"hook_name": "blocks.0.hook_resid_post", "model_name": "gpt2"})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"), device="cpu")
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    f = sae.encode(x).detach()
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(theirs.encode(x), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.decode(f), sae.decode(f).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d_out", [D_OUT, D_IN])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("standard", "Transcoder"),
        ("jumprelu", "JumpReLUTranscoder"),
        ("batchtopk", "JumpReLUTranscoder"),
        ("matryoshka", "JumpReLUTranscoder"),
    ],
)
def test_transcoders_do_the_same(name: str, theirs: str, skip: bool, d_out: int, tmp_path: Path) -> None:
    cls = saes.architecture(name)
    cfg = cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=False, skip_connection=skip)
    sae = cls(cfg, D_IN, d_out)
    x = 3 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(5)) + 1
    generator = torch.Generator().manual_seed(0)
    sae.initialise(generator, mean=torch.ones(d_out), norm_scale=0.4, target_scale=1.7)
    trained(sae, generator)
    metadata = {"hook_name": "blocks.0.hook_mlp_in", "hook_name_out": "blocks.0.hook_mlp_out", "model_name": "gpt2"}
    saelens.save(sae, tmp_path / "sae", metadata=metadata)
    other = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"), device="cpu")
    assert type(other).__name__ == (theirs.replace("Transcoder", "SkipTranscoder") if skip else theirs)
    assert (other.cfg.metadata.hook_name_out, other.d_out) == ("blocks.0.hook_mlp_out", d_out)
    f = sae.encode(x).detach()
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(other.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.decode(f), sae.decode(f).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other(x), sae(x).detach(), rtol=1e-5, atol=1e-5)

    # And the other way: what SAELens writes, without a word of ours.
    other.cfg.metadata = type(other.cfg.metadata)(**metadata)
    other.save_model(str(tmp_path / "theirs"))
    loaded = saelens.load(tmp_path / "theirs")
    assert (loaded.is_transcoder, loaded.cfg.skip_connection) == (True, skip)
    assert loaded.metadata["hook_name_out"] == "blocks.0.hook_mlp_out"
    torch.testing.assert_close(loaded(x), other(x).detach(), rtol=1e-5, atol=1e-5)
