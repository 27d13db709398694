"""Both ways of reading a model give the same numbers, on every architecture whose places are listed."""

import pytest
import small_models
import torch
from torch import Tensor

from saepipe.activations import BridgeHooks, HuggingFaceHooks, Stop, capture, huggingface_places

IDS = torch.randint(2, small_models.VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
IDS[:, 0], IDS[1, 4] = 0, 1  # special tokens must not be taken for padding


@pytest.fixture(scope="module", params=small_models.CONFIGS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HuggingFaceHooks, BridgeHooks]:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    folder = small_models.make(tmp_path_factory.mktemp("model"), request.param)
    bridge = TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device="cpu")
    return HuggingFaceHooks(AutoModelForCausalLM.from_pretrained(folder).eval()), BridgeHooks(bridge)


@torch.inference_mode()
def test_every_place_equals_the_bridge(both: tuple[HuggingFaceHooks, BridgeHooks]) -> None:
    plain = both[0]
    assert {f"blocks.{block}.hook_resid_{at}" for block in range(3) for at in ("pre", "post")} <= set(plain.names)
    found, expected = (capture(way, IDS, plain.names) for way in both)
    assert found.keys() == expected.keys() == set(plain.names)
    for name in plain.names:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4, msg=name)
    if "blocks.1.hook_attn_out" not in plain.names:
        return
    parts = [found[name] for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")]
    torch.testing.assert_close(sum(parts), found["blocks.1.hook_resid_post"], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_edits_change_the_logits_alike(both: tuple[HuggingFaceHooks, BridgeHooks]) -> None:
    plain, bridge = both
    clean = plain.run(IDS, {})
    torch.testing.assert_close(clean, bridge.run(IDS, {}), atol=2e-5, rtol=1e-4)
    for name in plain.names[: len(plain.names) // 3 * 2]:  # the last block's edits reach the logits by fewer ways
        edited, expected = (way.run(IDS, {name: lambda found: found * 0.5 + found.roll(1, -1)}) for way in both)
        assert (edited - clean).abs().max() > 1e-3, name
        torch.testing.assert_close(edited, expected, atol=5e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(plain.run(IDS, {}), clean, atol=0, rtol=0)  # nothing is left behind
    torch.testing.assert_close(bridge.run(IDS, {}), clean, atol=2e-5, rtol=1e-4)


def test_neither_runs_further_than_the_last_hook(both: tuple[HuggingFaceHooks, BridgeHooks]) -> None:
    reached: list[str] = []

    def stop(found: Tensor) -> None:
        raise Stop

    for way in both:
        functions = {
            "blocks.1.hook_resid_pre": stop,
            "blocks.2.hook_resid_pre": lambda found: reached.append("block 2"),
        }
        assert way.run(IDS, functions) is None
    assert not reached
    assert capture(both[0], IDS, ["blocks.0.hook_resid_post"]).keys() == {"blocks.0.hook_resid_post"}


def test_places_need_the_configuration_only() -> None:
    names = huggingface_places(small_models.CONFIGS["gpt_neox"]())
    assert "blocks.2.hook_mlp_out" in names
    assert "blocks.2.hook_resid_mid" not in names  # attention and MLP run side by side
    sequential = small_models.CONFIGS["gpt_neox sequential"]()
    assert {name.split(".")[2] for name in huggingface_places(sequential)} == {"hook_resid_pre", "hook_resid_post"}


def test_listed_architectures_are_all_tested() -> None:
    from saepipe.activations import _IN_BLOCK

    assert _IN_BLOCK.keys() <= {config().model_type for config in small_models.CONFIGS.values()}
