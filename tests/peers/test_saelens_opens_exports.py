"""SAELens opens what saepipe exports, and encodes and decodes the same (`make peers` runs this beside sae-lens)."""

from pathlib import Path

import pytest
import torch

from saepipe import export, saes

sae_lens = pytest.importorskip("sae_lens")

D_IN, D_SAE = 16, 48


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("name", saes.registered())
def test_encodes_and_decodes_the_same(name: str, apply_b_dec: bool, tmp_path: Path) -> None:
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=apply_b_dec), D_IN)
    x = 3 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(5)) + 1
    generator = torch.Generator().manual_seed(0)
    sae.initialise(generator, mean=x.mean(0), norm_scale=0.4)
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.abs() if key == "threshold" else noise)
        for _, buffer in sae.named_buffers():
            if buffer.dtype == torch.float64:  # a threshold
                buffer.fill_(0.3)
    export.save(sae, tmp_path / "sae", metadata={"hook_name": "blocks.0.hook_resid_post", "model_name": "gpt2"})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"), device="cpu")
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    f = sae.encode(x).detach()
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(theirs.encode(x), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.decode(f), sae.decode(f).detach(), rtol=1e-4, atol=1e-4)
