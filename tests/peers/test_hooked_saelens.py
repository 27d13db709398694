"""SAEs run in a model as SAELens runs them, on the same weights (`make peers` runs this beside sae-lens)."""

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from torch import Tensor

from saepipe import saes
from saepipe.hooked import HookedSAETransformer
from saepipe.saes.base import SAE

sae_lens = pytest.importorskip("sae_lens")

# TransformerLens 3's own class, which SAELens's is one of
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

IDS = torch.randint(2, small_models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
Z = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def hooked(folder: Path) -> tuple[HookedSAETransformer, Any]:
    """HookedTransformer's numerics: ours through the bridge, theirs in the class of its own."""
    from transformer_lens.config import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # As its from_pretrained does, which knows no folders
    config = HookedTransformerConfig(
        n_layers=small_models.LAYERS,
        d_model=small_models.WIDTH,
        n_heads=4,
        d_head=small_models.WIDTH // 4,
        d_mlp=4 * small_models.WIDTH,
        n_ctx=small_models.CONTEXT_LIMIT,
        d_vocab=small_models.VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
        device="cpu",
    )
    theirs = sae_lens.HookedSAETransformer(config, AutoTokenizer.from_pretrained(folder))
    theirs.load_and_process_state_dict(convert_gpt2_weights(AutoModelForCausalLM.from_pretrained(folder), config))
    return HookedSAETransformer.from_pretrained(str(folder), device="cpu"), theirs


@pytest.fixture(scope="module")
def bridged(folder: Path) -> tuple[HookedSAETransformer, Any]:
    """The model's own numerics, through the bridge."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    theirs = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    return HookedSAETransformer.from_pretrained_no_processing(str(folder), device="cpu"), theirs


def both(folder: Path, hook: str, name: str, **metadata: Any) -> tuple[SAE, Any]:
    """Make an SAE of ours, export it, and open it with SAELens."""
    cls, is_transcoder = saes.architecture(name), "hook_name_out" in metadata
    values: dict[str, Any] = {"apply_b_dec_to_input": False} if is_transcoder else {}
    values |= {"k": 8} if name in ("topk", "batchtopk", "matryoshka") else {}
    values |= {"matryoshka_widths": [6, 24]} if name == "matryoshka" else {}
    width = small_models.WIDTH
    sae = cls(cls.config_class(d_sae=24, **values), width, width if is_transcoder else None)
    sae.initialise(torch.Generator().manual_seed(0))
    sae.metadata = {"hook_name": hook, "model_name": "gpt2", **metadata}
    sae.save_model(folder)
    theirs = sae_lens.SAE.load_from_disk(str(folder), device="cpu")
    return SAE.load(folder), theirs


def check(ours: Any, theirs: Any, sae: SAE, other: Any, names: list[str], **keys: Any) -> None:
    """Compare logits and all that is cached inside the SAEs."""
    logits, cache = ours.run_with_cache_with_saes(IDS, saes=[sae], **keys)
    expected, their_cache = theirs.run_with_cache_with_saes(IDS, saes=[other], **keys)
    close(logits, expected)
    close(ours.run_with_saes(IDS, saes=[sae], **keys), expected)
    assert bool((expected - theirs(IDS)).abs().max() < 1e-3) == bool(keys.get("use_error_term"))
    points = [name for name in cache if "hook_sae" in name]
    assert len(points) == (6 if keys.get("use_error_term") else 5)
    for point in points:
        name = next(
            name for name in [point, *(f"{name}.{point.rsplit('.')[-1]}" for name in names)] if name in their_cache
        )
        close(cache[point], their_cache[name].reshape(cache[point].shape))
    close(cache["scale", 2, "ln1"], their_cache["scale", 2, "ln1"])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_error_term", [False, True])
@pytest.mark.parametrize("name", ["standard", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_hooked_transformer(
    hooked: tuple[HookedSAETransformer, Any], name: str, use_error_term: bool, tmp_path: Path
) -> None:
    sae, other = both(tmp_path, "blocks.1.hook_resid_post", name)
    close(hooked[0](IDS), hooked[1](IDS))
    check(*hooked, sae, other, [], use_error_term=use_error_term)


@pytest.mark.parametrize("hook", ["blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_mid"])
def test_other_hooks(hooked: tuple[HookedSAETransformer, Any], hook: str, tmp_path: Path) -> None:
    check(*hooked, *both(tmp_path, hook, "jumprelu"), [])


def test_heads_joined(hooked: tuple[HookedSAETransformer, Any], tmp_path: Path) -> None:
    sae, other = both(tmp_path, Z, "standard")
    other.turn_on_forward_pass_hook_z_reshaping()
    logits, cache = hooked[0].run_with_cache_with_saes(IDS, saes=[sae])
    expected, theirs = hooked[1].run_with_cache_with_saes(IDS, saes=[other])
    close(logits, expected)
    close(cache[f"{Z}.hook_sae_acts_post"], theirs[f"{Z}.hook_sae_acts_post"])


@pytest.mark.parametrize("use_error_term", [False, True])
def test_a_transcoder(hooked: tuple[HookedSAETransformer, Any], use_error_term: bool, tmp_path: Path) -> None:
    write = "blocks.1.hook_mlp_out"
    sae, other = both(tmp_path, "blocks.1.ln2.hook_normalized", "jumprelu", hook_name_out=write)
    check(*hooked, sae, other, [], use_error_term=use_error_term)


@pytest.mark.parametrize("use_error_term", [False, True])
def test_the_bridge(bridged: tuple[HookedSAETransformer, Any], use_error_term: bool, tmp_path: Path) -> None:
    sae, other = both(tmp_path, "blocks.1.hook_resid_post", "standard")
    check(*bridged, sae, other, ["blocks.1.hook_out"], use_error_term=use_error_term)


def test_ablation_and_gradients(hooked: tuple[HookedSAETransformer, Any], tmp_path: Path) -> None:
    sae, other = both(tmp_path, "blocks.1.hook_resid_post", "standard")
    point = "blocks.1.hook_resid_post.hook_sae_acts_post"
    found = []
    for model, spliced in zip(hooked, (sae, other), strict=True):
        kept: list[Tensor] = []

        def ablate(latents: Tensor, hook: Any, kept: list[Tensor] = kept) -> Tensor:
            assert hook.name.endswith("hook_sae_acts_post")
            kept.append(latents)
            return latents * (torch.arange(24) != 3)

        logits = model.run_with_hooks_with_saes(IDS, saes=[spliced], fwd_hooks=[(point, ablate)])
        found.append((logits, torch.autograd.grad(logits[0, -1, 7], kept[0])[0]))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


def test_special_tokens(hooked: tuple[HookedSAETransformer, Any], tmp_path: Path) -> None:
    sae, other = both(tmp_path, "blocks.1.hook_resid_post", "standard")
    ids = IDS.clone()
    ids[:, 0] = 0
    keys = {"exclude_special_tokens": [0, 1]}
    close(hooked[0].run_with_saes(ids, saes=[sae], **keys), hooked[1].run_with_saes(ids, saes=[other], **keys))


def test_text_and_losses(hooked: tuple[HookedSAETransformer, Any]) -> None:
    ours, theirs = hooked
    text = "the brown dog was with many layers"
    assert torch.equal(ours.to_tokens(text), theirs.to_tokens(text))
    assert ours.to_str_tokens(text) == theirs.to_str_tokens(text)
    assert ours.to_single_token(" dog") == theirs.to_single_token(" dog")
    assert ours.to_string(ours.to_tokens(text)) == theirs.to_string(theirs.to_tokens(text))
    close(ours(text, return_type="loss"), theirs(text, return_type="loss"))
    close(ours(text, return_type="loss", loss_per_token=True), theirs(text, return_type="loss", loss_per_token=True))
    keys = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False}
    assert torch.equal(ours.generate(IDS, **keys), theirs.generate(IDS, **keys))
    assert ours.generate(text, **keys) == theirs.generate(text, **keys)
