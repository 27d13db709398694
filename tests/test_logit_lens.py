import pytest
import torch
from torch import nn

from saepipe import HookedSAETransformer, logit_lens
from saepipe.config import ModelConfig
from saepipe.language_model import LanguageModel
from saepipe.logit_lens import logit_effects, missing
from saepipe.saes.base import SAE
from saepipe.saes.topk import TopKConfig, TopKSAE

HOOK = "blocks.2.hook_resid_post"


def make(hook: str = HOOK, d_in: int = 128) -> SAE:
    sae = TopKSAE(TopKConfig(d_sae=40, k=4, normalize_activations="none"), d_in)
    sae.initialise(torch.Generator().manual_seed(0))
    sae.metadata = {"hook_name": hook}
    return sae


@pytest.mark.parametrize("compatibility_mode", [False, True])
def test_effects_are_those_of_the_folded_unembedding(compatibility_mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_lens, "_VOCABULARY", 700)
    monkeypatch.setattr(logit_lens, "_LATENTS", 7)
    model = LanguageModel.open(ModelConfig(hooks=[HOOK], compatibility_mode=compatibility_mode))
    sae = make()
    assert missing(model, sae) is None
    latents = torch.tensor([3, 5, 8, 11, 12, 13, 14, 15, 39])
    found = logit_effects(model, sae, latents, 5)
    folded = HookedSAETransformer.from_pretrained("demo").W_U  # the final norm's weights are in it
    effects = (sae.W_dec[latents] @ folded).detach()
    effects = effects - effects.mean(1, keepdim=True)
    largest, smallest = effects.topk(5), effects.topk(5, largest=False)
    torch.testing.assert_close(found.promoted, largest.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.suppressed, smallest.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(effects.gather(1, found.promoted_ids), largest.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(effects.gather(1, found.suppressed_ids), smallest.values, rtol=1e-4, atol=1e-5)


class OffsetRMSNorm(nn.Module):
    """As Gemma's: the weight counts from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(1)) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), OffsetRMSNorm()])
@torch.no_grad()
def test_a_row_passes_the_norm_as_what_is_added_to_its_input_does(norm: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    norm.get_parameter("weight").uniform_(0.5, 2, generator=generator)
    if isinstance(norm, nn.LayerNorm):
        norm.bias.uniform_(-1, 1, generator=generator)
    x, row = torch.randn(2, 8, generator=generator)
    passed = logit_lens._through_norm(norm, row[None], torch.float32)[0]
    centred = x - x.mean() if isinstance(norm, nn.LayerNorm) else x
    before, after = norm(x), norm(x + row)
    both = centred + (row - row.mean() if isinstance(norm, nn.LayerNorm) else row)
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else 0
    scaled_before = (before - bias) * centred.square().mean().sqrt()
    scaled_after = (after - bias) * both.square().mean().sqrt()
    torch.testing.assert_close(scaled_after - scaled_before, passed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("hook", "d_in", "said"),
    [
        ("blocks.2.attn.hook_z", 128, "not known to be there"),
        ("model.layers.2.mlp", 128, "not known to be there"),
        (HOOK, 64, "reads 128 numbers, and blocks.2.hook_resid_post has 64"),
    ],
)
def test_what_is_not_in_the_residual_stream_is_said(hook: str, d_in: int, said: str) -> None:
    found = missing(LanguageModel.open(ModelConfig(hooks=[HOOK])), make(hook, d_in))
    assert found is not None
    assert said in found


def test_a_model_without_a_known_unembedding_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.open(ModelConfig(hooks=[HOOK]))
    monkeypatch.setattr(type(model.outer.hf_model), "get_decoder", lambda self: nn.Identity())
    assert missing(model, make()) == "no unembedding, or no normalisation before it, is known of demo"
