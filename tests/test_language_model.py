"""A model is opened from a folder or the hub, read and changed at its hook points, or refused in one sentence."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch

from saepipe.config import ModelConfig
from saepipe.errors import UserError
from saepipe.language_model import LanguageModel
from saepipe.model_files import ModelFiles
from saepipe.placement import Placement

HOOK = "blocks.1.hook_resid_post"
IDS = torch.randint(2, small_models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / "gpt2", "gpt2")


def opened(folder: Path, *hooks: str, **keys: object) -> LanguageModel:
    return LanguageModel.open(ModelConfig(name=str(folder), hooks=list(hooks or [HOOK]), device="cpu", **keys))


def test_facts_without_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    model = opened(tmp_path / "copy")
    assert (model.n_layers, model.vocab_size) == (small_models.LAYERS, small_models.VOCAB)
    assert (model.context_limit, model.width(HOOK)) == (small_models.CONTEXT_LIMIT, small_models.WIDTH)
    assert (model.capture_path, model.device.type) == ("huggingface", "cpu")
    assert model.tokenizer.bos_token_id == 0
    model.check_context(small_models.CONTEXT_LIMIT)
    with pytest.raises(UserError, match=r"data.context_size=65 is longer than the 64 tokens.*give at most that"):
        model.check_context(small_models.CONTEXT_LIMIT + 1)
    with pytest.raises(UserError, match=r"has no weights"):
        model.capture(IDS, [HOOK])


def test_capture_is_hugging_faces_hidden_state(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    states = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS, output_hidden_states=True).hidden_states
    found = opened(folder).capture(IDS, [HOOK, "blocks.0.hook_resid_pre"])
    assert list(found) == [HOOK, "blocks.0.hook_resid_pre"]
    torch.testing.assert_close(found[HOOK], states[2])
    torch.testing.assert_close(found["blocks.0.hook_resid_pre"], states[0])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_capture_costs_no_more_than_the_model_up_to_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Fused causal attention without a mask, once per block that is read; no later block and no logits."""
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*args: torch.Tensor, **keys: Any) -> torch.Tensor:
        masks.append((keys.get("attn_mask"), keys["is_causal"]))
        return attention(*args, **keys)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = opened(small_models.make(tmp_path, kind))
    head = model._hooks.model.get_output_embeddings()
    head.register_forward_hook(lambda *_: pytest.fail("logits are computed"))
    model.capture(IDS, [HOOK, "blocks.0.hook_resid_pre"])
    assert masks == [(None, True)] * 2


def test_edit_replaces(folder: Path) -> None:
    model = opened(folder)
    clean = model.logits(IDS)
    torch.testing.assert_close(model.logits(IDS, {HOOK: lambda found: found}), clean, atol=0, rtol=0)
    zeroed = model.logits(IDS, {HOOK: torch.zeros_like})
    assert (zeroed - clean).abs().max() > 0.1


@pytest.mark.parametrize("compatibility_mode", [False, True])
def test_edit_between_attention_and_mlp_replaces_the_whole_stream(folder: Path, compatibility_mode: bool) -> None:
    """The bridge's own hook there changes the MLP's input only: what went before would still reach the logits."""
    hook = "blocks.2.hook_resid_mid"
    model = opened(folder, hook, compatibility_mode=compatibility_mode)
    constant = torch.linspace(-1, 1, small_models.WIDTH).expand(2, 9, -1)
    logits = model.logits(IDS, {hook: lambda found: constant})
    torch.testing.assert_close(logits, logits[:1, :1].expand_as(logits), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(IDS, {hook: lambda found: found}), model.logits(IDS), atol=1e-5, rtol=1e-5)


def test_dtype_is_the_models(folder: Path) -> None:
    model = opened(folder, dtype="bfloat16")
    assert model.capture(IDS, [HOOK])[HOOK].dtype == torch.bfloat16


def test_bridge_serves_the_other_hooks_with_heads_joined(folder: Path) -> None:
    hook = "blocks.1.attn.hook_q"
    model = opened(folder, hook, HOOK)
    assert model.capture_path == "bridge"
    assert model.width(hook) == small_models.WIDTH
    assert model.capture(IDS, [hook])[hook].shape == (2, 9, small_models.WIDTH)
    clean = model.logits(IDS)
    assert (model.logits(IDS, {hook: lambda found: found * 2}) - clean).abs().max() > 1e-3
    torch.testing.assert_close(model.capture(IDS, [HOOK])[HOOK], opened(folder).capture(IDS, [HOOK])[HOOK])
    assert model.tokenizer.pad_token_id is None  # the bridge gave its own copy one


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox sequential"])
def test_a_head_is_a_slice_on_either_way(tmp_path: Path, kind: str) -> None:
    z, d_head = "blocks.1.attn.hook_z", small_models.WIDTH // 4
    folder = small_models.make(tmp_path, kind)
    ways = opened(folder, f"{z}.head.3"), opened(folder, f"{z}.head.3", "blocks.0.attn.hook_q.head.2")
    assert [way.capture_path for way in ways] == ["huggingface", "bridge"]
    slices = []
    for way in ways:
        assert way.width(f"{z}.head.3") == d_head
        found = way.capture(IDS, [f"{z}.head.3", z, f"{z}.head.0"])
        assert list(found) == [f"{z}.head.3", z, f"{z}.head.0"]
        torch.testing.assert_close(found[f"{z}.head.3"], found[z][..., 3 * d_head :], atol=0, rtol=0)
        torch.testing.assert_close(found[f"{z}.head.0"], found[z][..., :d_head], atol=0, rtol=0)
        slices.append(found[z])

        def zero_the_last(found: torch.Tensor) -> torch.Tensor:
            return torch.cat([found[..., : 3 * d_head], torch.zeros_like(found[..., 3 * d_head :])], -1)

        edited, expected = (way.logits(IDS, edits) for edits in ({f"{z}.head.3": torch.zeros_like}, {z: zero_the_last}))
        torch.testing.assert_close(edited, expected, atol=0, rtol=0)
        assert (edited - way.logits(IDS)).abs().max() > 1e-3
    torch.testing.assert_close(*slices, atol=1e-5, rtol=1e-5)


def test_heads_of_the_bridge_are_counted_where_they_are(tmp_path: Path) -> None:
    k = "blocks.1.attn.hook_k"
    model = opened(small_models.make(tmp_path, "llama"), f"{k}.head.1")
    assert model.width(f"{k}.head.1") == small_models.WIDTH // 4
    torch.testing.assert_close(model.capture(IDS, [f"{k}.head.1"])[f"{k}.head.1"], model.capture(IDS, [k])[k][..., 8:])
    with pytest.raises(UserError, match=r"hook_k.head.2 names head 2 of a hook with 2; the last is .*hook_k.head.1"):
        model.width(f"{k}.head.2")


def test_compatibility_mode_has_hooked_transformers_numerics(folder: Path) -> None:
    plain, compatible = opened(folder), opened(folder, compatibility_mode=True)
    assert compatible.capture_path == "bridge"
    assert compatible.identity != plain.identity
    found = compatible.capture(IDS, [HOOK])[HOOK]
    expected = plain.capture(IDS, [HOOK])[HOOK]
    # Weights are centred: the residual stream loses its mean over the width, and nothing else.
    torch.testing.assert_close(found, expected - expected.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    counted: list[int] = []
    compatible.logits(IDS, {HOOK: lambda found: counted.append(1) or found})
    assert counted == [1]  # once, however many names the hook point has


def test_a_hook_that_is_no_vector_per_token(folder: Path) -> None:
    with pytest.raises(UserError, match=r"hook_pattern has shape .* not one vector per token"):
        opened(folder, "blocks.0.attn.hook_pattern").width("blocks.0.attn.hook_pattern")


def test_a_hook_that_never_fires(folder: Path) -> None:
    with pytest.raises(UserError, match=r"blocks.0.hook_q_input is not passed"):
        opened(folder, "blocks.0.hook_q_input").width("blocks.0.hook_q_input")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.1.hook_resid_pots", r"did you mean blocks.1.hook_resid_post"),
        ("blocks.9.hook_resid_post", r"names block 9 of a model with 3; the last is blocks.2.hook_resid_post"),
        ("blocks.².hook_resid_post", r"did you mean blocks"),
        ("block.1.hook_resid_post", r"did you mean blocks.1.hook_resid_post"),
        ("blocks.1.attn.hook_zz", r"did you mean blocks.1.attn.hook_z"),
        ("blocks.1.attn.hook_qq", r"did you mean blocks.1.attn.hook_q"),
    ],
)
def test_unknown_hook(folder: Path, hook: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(folder, hook)


def test_mistyped_hook_is_refused_before_the_weights_load(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"did you mean blocks.1.hook_resid_post"):
        opened(tmp_path / "copy", "blocks.1.hook_resid_pots")


PATH = "transformer.h.1.mlp"


@pytest.fixture
def unloadable(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    return tmp_path / "copy"


def test_a_modules_path_is_a_hook(folder: Path) -> None:
    model = opened(folder, f"{PATH}.input", "transformer.h.2", PATH)
    assert model.capture_path == "huggingface"
    by_path = model.capture(IDS, ["transformer.h.2", PATH])
    by_name = model.capture(IDS, ["blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"])
    for found, expected in zip(by_path.values(), by_name.values(), strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for path, name in (("transformer.h.2", "blocks.2.hook_resid_post"), (PATH, "blocks.1.hook_mlp_out")):
        edited, expected = (model.logits(IDS, {place: lambda found: found.roll(1, -1)}) for place in (path, name))
        torch.testing.assert_close(edited, expected, atol=0, rtol=0)


def test_an_edit_may_keep_what_it_is_shown(tmp_path: Path) -> None:
    """Falcon adds the attention's output to the MLP's in place: not to what the edit has kept."""
    hook = "transformer.h.1.mlp"
    model = opened(small_models.make(tmp_path, "falcon"), hook)
    kept: list[torch.Tensor] = []
    model.logits(IDS, {hook: lambda found: kept.append(found) or found})
    torch.testing.assert_close(kept[0], model.capture(IDS, [hook])[hook], atol=0, rtol=0)


def test_widths_at_paths_need_no_weights(unloadable: Path) -> None:
    model = opened(unloadable, f"{PATH}.c_proj.input", PATH, "lm_head")
    assert [model.width(hook) for hook in model.config.hooks] == [128, small_models.WIDTH, small_models.VOCAB]
    assert [model.width(f"blocks.0.{hook}") for hook in ("attn.hook_z.head.3", "mlp.hook_post")] == [8, 128]
    with pytest.raises(UserError, match=r"transformer.wte.input has shape \[2, 5\], not one vector per token"):
        model.width("transformer.wte.input")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (["transformer.h.1.mpl"], r"hooks=transformer.h.1.mpl is not known; did you mean transformer.h.1.mlp, "),
        (["transformer.h.1.mlp.inputs"], r"did you mean transformer.h.1.mlp.input, "),
        (["transformer.h.3"], r"did you mean .*transformer.h.2"),
        (["blocks.1.attn.hook_z.head.4"], r"names head 4 of a hook with 4; the last is blocks.1.attn.hook_z.head.3"),
        (["blocks.1.hook_resid_post.head.0"], r"which has no heads; give blocks.1.hook_resid_post"),
        (["blocks.7.attn.hook_z.head.4"], r"names block 7 of a model with 3; the last is blocks.2.attn.hook_z"),
        (["blocks.1.attn.hook_z.heads.1"], r"did you mean blocks.1.attn.hook_z"),
        (["blocks.1.mlp_out"], r"did you mean blocks.1.hook_mlp_out"),
        ([PATH, "blocks.1.attn.hook_q"], r"hook_q needs the TransformerLens bridge.* into stores of their own"),
    ],
)
def test_unknown_paths_are_refused_without_weights(unloadable: Path, hooks: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(unloadable, *hooks)


def test_listed_names_need_no_skeleton(unloadable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelFiles, "skeleton", property(lambda _: pytest.fail("a skeleton is made")))
    model = opened(unloadable, HOOK, "blocks.0.attn.hook_z.head.1")
    assert (model.capture_path, model.width(HOOK)) == ("huggingface", small_models.WIDTH)


def test_a_path_does_not_go_with_compatibility_mode(unloadable: Path) -> None:
    with pytest.raises(UserError, match=r"is the path of a module, which model.compatibility_mode=true changes; give"):
        opened(unloadable, PATH, compatibility_mode=True)


def test_code_that_needs_its_weights_is_checked_once_they_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFiles, "skeleton", None)
    model = opened(folder, PATH)
    assert (model.capture_path, model.width(PATH)) == ("huggingface", small_models.WIDTH)
    with pytest.raises(UserError, match=r"did you mean blocks.1.attn.hook_q"):
        opened(folder, "blocks.1.attn.hook_qq")
    with pytest.raises(UserError, match=r"did you mean transformer.h.1.mlp"):
        opened(folder, "transformer.h.1.mpl")


def test_a_device_map_changes_no_number(folder: Path) -> None:
    plain = opened(folder)
    for spread in (opened(folder, device_map="auto"), opened(folder, HOOK, "blocks.1.attn.hook_q", device_map="auto")):
        assert spread.device.type == "cpu"
        assert spread.identity == plain.identity
        torch.testing.assert_close(spread.capture(IDS, [HOOK]), plain.capture(IDS, [HOOK]), atol=1e-5, rtol=1e-5)
        edits = {HOOK: lambda found: found * 2}
        torch.testing.assert_close(spread.logits(IDS, edits), plain.logits(IDS, edits), atol=1e-5, rtol=1e-5)
    compatible = opened(folder, compatibility_mode=True, device_map="auto")
    expected = opened(folder, compatibility_mode=True).capture(IDS, [HOOK])
    torch.testing.assert_close(compatible.capture(IDS, [HOOK]), expected)


@pytest.mark.parametrize("other", ["blocks.0.hook_resid_mid", "blocks.0.attn.hook_q"])
def test_layers_in_several_places(tmp_path: Path, other: str) -> None:
    """Two places that a machine without GPUs has: accelerate's hooks then bring weights and activations together."""
    z = "blocks.1.attn.hook_z.head.2"
    folder = small_models.make(tmp_path, "llama")
    plain, spread = opened(folder, z, HOOK, other), opened(folder, z, HOOK, other)
    parts = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu", "norm": "cpu"}
    device_map = {f"model.{part}": place for part, place in parts.items()} | {"model.rotary_emb": "cpu"}
    spread._placement = Placement(torch.device("cpu"), device_map | {"lm_head": "cpu"})
    for _ in range(2):  # what `Stop` leaves half done does no harm
        found, expected = spread.capture(IDS, [z, other, HOOK]), plain.capture(IDS, [z, other, HOOK])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for hook in (z, HOOK, other):
        edited, expected = (model.logits(IDS, {hook: lambda found: found.roll(1, -1)}) for model in (spread, plain))
        torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)


def test_devices_are_checked_before_the_model() -> None:
    with pytest.raises(UserError, match=r"model.n_devices=2 needs as many CUDA GPUs"):
        LanguageModel.open(ModelConfig(name="owner/absent", device="cpu", n_devices=2))
    with pytest.raises(UserError, match=r"model.name=owner/absent"):
        LanguageModel.open(ModelConfig(name="owner/absent", device="cpu"), local_rank=3)
