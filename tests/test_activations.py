"""Both ways of reading a model give the same numbers, on every architecture whose places are listed."""

from pathlib import Path

import pytest
import small_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from saepipe.activations import BridgeHooks, HuggingFaceHooks, Stop, capture, trace
from saepipe.errors import UserError

IDS = torch.randint(2, small_models.VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
IDS[:, 0], IDS[1, 4] = 0, 1  # special tokens must not be taken for padding


@pytest.fixture(scope="module", params=small_models.CONFIGS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HuggingFaceHooks, BridgeHooks]:
    from transformer_lens.model_bridge import TransformerBridge

    folder = small_models.make(tmp_path_factory.mktemp("model"), request.param)
    bridge = TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device="cpu")
    return HuggingFaceHooks(AutoModelForCausalLM.from_pretrained(folder).eval()), BridgeHooks(bridge)


@torch.inference_mode()
def test_every_place_equals_the_bridge(both: tuple[HuggingFaceHooks, BridgeHooks]) -> None:
    plain = both[0]
    assert {f"blocks.{block}.hook_resid_{at}" for block in range(3) for at in ("pre", "post")} <= set(plain.listed)
    found, expected = (capture(way, IDS, list(plain.listed)) for way in both)
    assert found.keys() == expected.keys() == set(plain.listed)
    for name in plain.listed:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4, msg=name)
    if "blocks.1.hook_attn_out" not in plain.listed:
        return
    parts = [found[name] for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")]
    torch.testing.assert_close(sum(parts), found["blocks.1.hook_resid_post"], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_edits_change_the_logits_alike(both: tuple[HuggingFaceHooks, BridgeHooks]) -> None:
    plain, bridge = both
    clean = plain.run(IDS, {})
    torch.testing.assert_close(clean, bridge.run(IDS, {}), atol=2e-5, rtol=1e-4)
    for name in list(plain.listed)[
        : len(list(plain.listed)) // 3 * 2
    ]:  # the last block's edits reach the logits by fewer ways
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


BLOCKS = {"gpt2": "transformer.h", "falcon": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@torch.inference_mode()
def test_a_modules_path_is_its_output_or_input(both: tuple[HuggingFaceHooks, BridgeHooks]) -> None:
    """The same place by either kind of name: captured together, alone, and edited."""
    plain = both[0]
    model_type = plain.model.config.model_type
    block = f"{BLOCKS.get(model_type, 'model.layers')}.2"
    names = {f"{block}.input": "blocks.2.hook_resid_pre", block: "blocks.2.hook_resid_post"}
    if "blocks.2.hook_mlp_out" in plain.listed and not model_type.startswith(("gemma2", "gemma3")):
        names[f"{block}.mlp"] = "blocks.2.hook_mlp_out"
    assert set(names) <= set(plain.names)
    found = capture(plain, IDS, [*reversed(names), *names.values()])
    for path, name in names.items():
        torch.testing.assert_close(found[path], found[name], atol=0, rtol=0)
        torch.testing.assert_close(capture(plain, IDS, [path])[path], found[name], atol=0, rtol=0)
        edited, expected = (plain.run(IDS, {place: lambda found: found.roll(1, -1)}) for place in (path, name))
        torch.testing.assert_close(edited, expected, atol=0, rtol=0)


@pytest.fixture
def gpt2(tmp_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(small_models.make(tmp_path, "gpt2")).eval()


@torch.inference_mode()
def test_any_module_can_be_read_and_replaced(gpt2: PreTrainedModel) -> None:
    hooks = HuggingFaceHooks(gpt2)
    clean = hooks.run(IDS, {})
    names = ["transformer", "transformer.h.1.attn.c_proj.input", "transformer.h.0.mlp.act", "lm_head"]
    found = capture(hooks, IDS, names)
    torch.testing.assert_close(gpt2.lm_head(found["transformer"]), clean)  # the first of a ModelOutput
    torch.testing.assert_close(found["lm_head"], clean)
    for name in names:
        torch.testing.assert_close(hooks.run(IDS, {name: lambda found: found.clone()}), clean, atol=0, rtol=0)
        assert (hooks.run(IDS, {name: lambda found: found * 2}) - clean).abs().max() > 1e-3, name
    with pytest.raises(UserError, match=r"hook=transformer.h.1.mpl is not known; did you mean transformer.h.1.mlp"):
        hooks.run(IDS, {"transformer.h.1.mpl": torch.zeros_like})


@torch.inference_mode()
def test_what_is_captured_stays_as_it_was(tmp_path: Path) -> None:
    """Falcon's blocks add to the MLP's output in place."""
    hooks = HuggingFaceHooks(AutoModelForCausalLM.from_pretrained(small_models.make(tmp_path, "falcon")).eval())
    names = ["transformer.h.0.mlp", "transformer.h.1"]
    alone, together = (capture(hooks, IDS, wanted)[names[0]] for wanted in (names[:1], names))
    torch.testing.assert_close(together, alone, atol=0, rtol=0)


@torch.inference_mode()
def test_a_module_that_runs_twice_is_read_once(gpt2: PreTrainedModel) -> None:
    hooks = HuggingFaceHooks(gpt2)
    gpt2.transformer.h[2].mlp = gpt2.transformer.h[1].mlp
    names = ["transformer.h.1.mlp", "transformer.h.2"]
    alone, together = (capture(hooks, IDS, wanted)[names[0]] for wanted in (names[:1], names))
    torch.testing.assert_close(together, alone, atol=0, rtol=0)


def test_a_model_without_a_list_of_blocks_is_read_by_paths(gpt2: PreTrainedModel) -> None:
    gpt2.transformer.h.append(gpt2.transformer.h[0])
    hooks = HuggingFaceHooks(gpt2)
    with pytest.raises(UserError, match=r"blocks.1 ... has no place in GPT2LMHeadModel, .* such as lm_head"):
        capture(hooks, IDS, ["blocks.1.hook_resid_post"])
    assert capture(hooks, IDS, ["transformer.h.1"])["transformer.h.1"].shape == (2, 11, small_models.WIDTH)


def test_a_traced_model_has_shapes_and_no_weights() -> None:
    for kind, config in small_models.CONFIGS.items():
        with torch.device("meta"):
            hooks = HuggingFaceHooks(AutoModelForCausalLM.from_config(config()).eval())
        names = ["blocks.2.hook_resid_post", "lm_head"]
        shapes = {name: tuple(found.shape) for name, found in trace(hooks, (2, 5), names).items()}
        assert list(shapes.values()) == [(2, 5, small_models.WIDTH), (2, 5, small_models.VOCAB)], kind
