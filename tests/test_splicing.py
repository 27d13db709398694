"""SAEs in the place of a model's activations do what they do by hand, with the points of their own inside."""

import logging
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_hooked import HOOK, IDS, WAYS, by_hand, make, opened
from torch import Tensor

from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.saes.base import SAE

WIDTH = small_models.WIDTH
Z = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module", params=WAYS)
def shared(request: pytest.FixtureRequest, folder: Path) -> HookedSAETransformer:
    return opened(request.param, folder)


@pytest.fixture
def model(shared: HookedSAETransformer) -> Any:
    yield shared
    shared.reset_saes()
    shared.reset_hooks()


@pytest.mark.parametrize("name", ["standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_run_with_saes_is_the_reconstruction_spliced_in(model: HookedSAETransformer, name: str) -> None:
    sae = make(name=name)
    out = model.run_with_saes(IDS, saes=[sae])
    torch.testing.assert_close(out, by_hand(model, {HOOK: sae}), atol=1e-5, rtol=1e-5)
    assert (out - model(IDS)).abs().max() > 0.1
    assert model.acts_to_saes == {}


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"])
def test_the_error_term_changes_nothing(model: HookedSAETransformer, hook: str) -> None:
    out, cache = model.run_with_cache_with_saes(IDS, saes=make(hook), use_error_term=True)
    torch.testing.assert_close(out, model(IDS), atol=1e-4, rtol=1e-4)
    recons, error, output = (cache[f"{hook}.hook_sae_{point}"] for point in ("recons", "error", "output"))
    torch.testing.assert_close(recons + error, output)
    torch.testing.assert_close(output, cache[hook], atol=1e-5, rtol=1e-4)


def test_an_sae_s_own_points(model: HookedSAETransformer) -> None:
    sae = make()
    cache = model.run_with_cache_with_saes(IDS, saes=[sae])[1]
    x = cache[HOOK]
    torch.testing.assert_close(x, model.run_with_cache(IDS, names_filter=HOOK)[1][HOOK])
    expected = {
        "hook_sae_input": x,
        "hook_sae_acts_pre": sae.pre_activations(x),
        "hook_sae_acts_post": sae.encode(x),
        "hook_sae_recons": sae(x),
        "hook_sae_output": sae(x),
    }
    assert {name.removeprefix(f"{HOOK}.") for name in cache if "sae" in name} == set(expected)
    for point, value in expected.items():
        torch.testing.assert_close(cache[f"{HOOK}.{point}"], value.detach(), msg=point)
    torch.testing.assert_close(cache["blocks.2.hook_resid_pre"], sae(x).detach())
    assert model.get_sae_hook_name(sae) == f"{HOOK}.hook_sae_acts_post"
    if model.has_all_hooks:  # where a hook has two names, so have the SAE's
        other = "blocks.1.hook_out.hook_sae_acts_post"
        kept: list[Tensor] = []
        hooks = [(other, lambda found, hook: kept.append(found))]
        model.run_with_hooks_with_saes(IDS, saes=[sae], fwd_hooks=hooks)
        torch.testing.assert_close(kept[0], sae.encode(x))


@pytest.mark.parametrize("use_error_term", [False, True])
def test_ablating_a_latent(model: HookedSAETransformer, use_error_term: bool) -> None:
    sae = make()
    latents = model.run_with_cache_with_saes(IDS, saes=[sae])[1][f"{HOOK}.hook_sae_acts_post"]
    which = int(latents.sum((0, 1)).argmax())

    def ablate(found: Tensor, hook: Any) -> Tensor:
        found[:, :, which] = 0
        return found

    def expected(x: Tensor) -> Tensor:
        f = sae.encode(x)
        kept = f.clone()
        kept[:, :, which] = 0
        return sae.decode(kept) + (x - sae.decode(f) if use_error_term else 0)

    hooks = [(f"{HOOK}.hook_sae_acts_post", ablate)]
    keys: dict[str, Any] = {"saes": [sae], "use_error_term": use_error_term}
    out = model.run_with_hooks_with_saes(IDS, fwd_hooks=hooks, **keys)
    torch.testing.assert_close(out, by_hand(model, {HOOK: expected}), atol=1e-4, rtol=1e-4)
    assert (out - model.run_with_saes(IDS, **keys)).abs().max() > 1e-3
    with model.saes(**keys), model.hooks(fwd_hooks=hooks):
        torch.testing.assert_close(model(IDS), out)
        assert model.run_with_cache(IDS)[1][f"{HOOK}.hook_sae_acts_post"][:, :, which].abs().max() == 0


@pytest.mark.parametrize("use_error_term", [False, True])
def test_a_logit_is_differentiated_by_latents(model: HookedSAETransformer, use_error_term: bool) -> None:
    sae = make()
    kept: list[Tensor] = []
    hooks = [(f"{HOOK}.hook_sae_acts_post", lambda found, hook: kept.append(found))]
    logits = model.run_with_hooks_with_saes(IDS, saes=[sae], fwd_hooks=hooks, use_error_term=use_error_term)
    (gradient,) = torch.autograd.grad(logits[0, -1, 7], kept[0])
    assert gradient.abs().max() > 0
    # ... which is what the logit does as a latent moves
    step = torch.zeros_like(kept[0])
    step[0, 3] = 1e-3 * gradient[0, 3] / gradient[0, 3].norm()
    moved = [
        model.run_with_hooks_with_saes(
            IDS,
            saes=[sae],
            use_error_term=use_error_term,
            fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", lambda found, hook, sign=sign: found + sign * step)],
        )[0, -1, 7]
        for sign in (1, -1)
    ]
    slope = (moved[0] - moved[1]) / 2e-3
    torch.testing.assert_close(slope, gradient[0, 3].norm(), atol=2e-2, rtol=2e-2)


def test_the_error_carries_no_gradient_of_its_own(model: HookedSAETransformer) -> None:
    """Else the gradient by an activation would be that of a model without an SAE, whatever the SAE does."""
    sae = make()
    with torch.no_grad():
        sae.W_dec.zero_()
    kept: list[Tensor] = []
    hooks = [(HOOK, lambda found, hook: kept.append(found))]
    logits = model.run_with_hooks_with_saes(IDS, saes=[sae], fwd_hooks=hooks, use_error_term=True)
    torch.testing.assert_close(logits, model(IDS), atol=1e-4, rtol=1e-4)
    assert torch.autograd.grad(logits.sum(), kept[0])[0].abs().max() == 0


def test_several_saes(model: HookedSAETransformer) -> None:
    saes = [make("blocks.0.hook_resid_pre"), make("blocks.1.hook_mlp_out"), make("blocks.2.hook_attn_out")]
    out, cache = model.run_with_cache_with_saes(IDS, saes=saes)
    expected = by_hand(model, {sae.metadata.hook_name: sae for sae in saes})
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert {f"{sae.metadata.hook_name}.hook_sae_acts_post" for sae in saes} <= set(cache)
    out = model.run_with_saes(IDS, saes=saes, use_error_term=True)
    torch.testing.assert_close(out, model(IDS), atol=1e-4, rtol=1e-4)


def test_the_last_at_a_hook_replaces(model: HookedSAETransformer) -> None:
    first, second = make(), make(name="topk")
    model.add_sae(first)
    model.add_sae(second)
    assert model.acts_to_saes == {HOOK: second}
    torch.testing.assert_close(model(IDS), by_hand(model, {HOOK: second}), atol=1e-5, rtol=1e-5)
    with model.saes(first) as same:
        assert same is model
        assert model.acts_to_saes == {HOOK: first}
        assert f"{HOOK}.hook_sae_acts_post" in model.hook_dict
        torch.testing.assert_close(model(IDS), by_hand(model, {HOOK: first}), atol=1e-5, rtol=1e-5)
    assert model.acts_to_saes == {HOOK: second}
    model.run_with_saes(IDS, saes=[first], reset_saes_end=False)
    assert model.acts_to_saes == {HOOK: first}


def test_saes_that_displace_each_other_are_said(model: HookedSAETransformer, caplog: pytest.LogCaptureFixture) -> None:
    first, read = make("blocks.1.hook_resid_pre"), make("blocks.1.hook_resid_pre", d_out=32)
    read.metadata["hook_name_out"] = "blocks.1.hook_mlp_out"
    with model.saes([first, make(), read]):
        assert len(model.acts_to_saes) == 2
    assert "the last is in place; without effect: blocks.1.hook_resid_pre" in caplog.text
    caplog.clear()
    with model.saes([make(), make("blocks.0.hook_mlp_out")]), model.saes(make()):
        assert not caplog.records


def test_resetting(model: HookedSAETransformer, caplog: pytest.LogCaptureFixture) -> None:
    first, second = make(), make("blocks.0.hook_mlp_out")
    model.add_sae(first)
    model.add_sae(second)
    model.reset_saes(HOOK)
    assert model.acts_to_saes == {"blocks.0.hook_mlp_out": second}
    model.reset_saes(["blocks.0.hook_mlp_out"], prev_saes=[first])
    assert model.acts_to_saes == {HOOK: first}
    model.reset_saes("blocks.0.hook_mlp_out")
    assert "no SAE is attached to blocks.0.hook_mlp_out" in caplog.text
    with pytest.raises(UserError, match=r"prev_saes holds 0 SAEs for 1 act_names"):
        model.reset_saes(HOOK, prev_saes=[])
    model.reset_saes()
    assert model.acts_to_saes == {}


def test_everything_is_as_before_after_an_error(model: HookedSAETransformer) -> None:
    with pytest.raises(UserError, match=r"saes holds str, which is no SAE"):
        model.run_with_saes(IDS, saes=[make(), "blocks"])  # type: ignore[list-item]
    assert model.acts_to_saes == {}


def test_the_error_term_that_an_sae_asks_for(model: HookedSAETransformer) -> None:
    sae = make()
    sae.use_error_term = True
    torch.testing.assert_close(model.run_with_saes(IDS, saes=[sae]), model(IDS), atol=1e-4, rtol=1e-4)
    out = model.run_with_saes(IDS, saes=[sae], use_error_term=False)
    assert (out - model(IDS)).abs().max() > 0.1


@pytest.mark.parametrize("read", ["blocks.1.mlp.hook_in", "blocks.0.hook_resid_post"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_one_hook_and_replaces_another(model: HookedSAETransformer, read: str, skip: bool) -> None:
    write = "blocks.1.hook_mlp_out"
    sae = make(read, d_out=WIDTH, hook_name_out=write)
    if skip:
        sae.W_skip = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
    out, cache = model.run_with_cache_with_saes(IDS, saes=[sae])
    x = cache[read]
    expected = by_hand(model, {write: lambda found: sae(x)})
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache[f"{write}.hook_sae_input"], x)
    torch.testing.assert_close(cache[f"{write}.hook_sae_acts_post"], sae.encode(x).detach())
    out = model.run_with_saes(IDS, saes=[sae], use_error_term=True)
    torch.testing.assert_close(out, model(IDS), atol=1e-4, rtol=1e-4)
    assert model.get_sae_hook_name(sae, "hook_sae_input") == f"{write}.hook_sae_input"
    with model.saes([sae, make(write)]):
        assert list(model.acts_to_saes) == [write]  # which replaces what it replaced


def test_a_transcoder_that_reads_too_late(model: HookedSAETransformer) -> None:
    sae = make("blocks.2.hook_resid_post", d_out=WIDTH, hook_name_out="blocks.0.hook_mlp_out")
    with pytest.raises(UserError, match=r"before it has read anything; set metadata\['hook_name'\] to an earlier hook"):
        model.run_with_saes(IDS, saes=[sae])


def test_heads_joined_and_single(model: HookedSAETransformer) -> None:
    whole, heads = make(Z), [make(f"{Z}.head.{head}", WIDTH // 4) for head in (0, 3)]
    joined = by_hand(model, {Z: lambda found: whole(found.flatten(2)).reshape(found.shape)})
    torch.testing.assert_close(model.run_with_saes(IDS, saes=[whole]), joined, atol=1e-5, rtol=1e-5)

    def apart(found: Tensor) -> Tensor:
        changed = found.clone()
        for head, sae in zip((0, 3), heads, strict=True):
            changed[:, :, head] = sae(found[:, :, head])
        return changed

    out, cache = model.run_with_cache_with_saes(IDS, saes=heads)
    torch.testing.assert_close(out, by_hand(model, {Z: apart}), atol=1e-5, rtol=1e-5)
    assert cache[f"{Z}.head.3.hook_sae_input"].shape == (2, 9, WIDTH // 4)
    out = model.run_with_saes(IDS, saes=[whole], use_error_term=True)
    torch.testing.assert_close(out, model(IDS), atol=1e-4, rtol=1e-4)


def test_special_tokens_can_be_left_as_they_are(model: HookedSAETransformer) -> None:
    sae, ids = make(), IDS.clone()
    ids[:, 0], ids[1, 4] = 0, 1

    def expected(found: Tensor) -> Tensor:
        return torch.where((ids < 2)[..., None], found, sae(found))

    out, cache = model.run_with_cache_with_saes(ids, saes=[sae], exclude_special_tokens=True)
    torch.testing.assert_close(out, by_hand(model, {HOOK: expected}, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_output"][:, 0], cache[HOOK][:, 0])
    given = model.run_with_saes(ids, saes=[sae], exclude_special_tokens=[0, 1])
    torch.testing.assert_close(given, out)
    cache = model.run_with_cache_with_saes(ids, saes=[sae], use_error_term=True, exclude_special_tokens=True)[1]
    assert cache[f"{HOOK}.hook_sae_error"][ids < 2].abs().max() == 0


def test_a_function_at_the_hook_itself_changes_what_the_sae_reads(model: HookedSAETransformer) -> None:
    sae = make()
    hooks = [(HOOK, lambda found, hook: found * 2)]
    out = model.run_with_hooks_with_saes(IDS, saes=[sae], fwd_hooks=hooks)
    torch.testing.assert_close(out, by_hand(model, {HOOK: lambda found: sae(found * 2)}), atol=1e-5, rtol=1e-5)


def test_a_normalised_token_and_another_type(model: HookedSAETransformer) -> None:
    sae = make().to(torch.float64)
    sae.token_norm = "layer_norm"
    expected = by_hand(model, {HOOK: lambda found: sae(found).float()})
    torch.testing.assert_close(model.run_with_saes(IDS, saes=[sae]), expected, atol=1e-5, rtol=1e-5)
    out = model.run_with_saes(IDS, saes=[sae], use_error_term=True)
    torch.testing.assert_close(out, model(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (make("blocks.7.hook_resid_post"), r"has no hook blocks.7.hook_resid_post for this SAE: .*did you mean"),
        (make(hook_name_out="blocks.1.mlp_out"), r"has no hook blocks.1.mlp_out for this SAE"),
        (make(d_in=16), r"hook_resid_post is 32 wide in this model, and the SAE's d_in is 16; give the SAE of this"),
        (
            make(d_out=16, hook_name_out="blocks.2.hook_mlp_out"),
            r"hook_mlp_out is 32 wide in this model, and the SAE's d_out is 16",
        ),
        (make(""), r"saes holds an SAE whose metadata names no hook; set sae.metadata\['hook_name'\]"),
        (make(hook_name_out=5), r"saes holds an SAE whose metadata says hook_name_out=5, which is no"),
        (make(hook_name_out=["a"]), r"saes holds an SAE whose metadata says hook_name_out=\['a'\]"),
        (tuple(make()), r"saes holds tuple, which is no SAE; give the first of these three"),
    ],
)
def test_what_is_refused(model: HookedSAETransformer, sae: SAE, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.run_with_saes(IDS, saes=[sae])
    assert model.acts_to_saes == {}


def test_hooks_of_the_bridge_alone(folder: Path) -> None:
    sae = make("blocks.1.attn.hook_q")
    with pytest.raises(UserError, match=r"needs HookedSAETransformer.from_pretrained_no_processing"):
        opened("plain", folder).add_sae(sae)
    model = opened("bridge", folder)
    expected = by_hand(model, {"blocks.1.attn.hook_q": lambda found: sae(found.flatten(2)).reshape(found.shape)})
    torch.testing.assert_close(model.run_with_saes(IDS, saes=[sae]), expected, atol=1e-5, rtol=1e-5)
    mlp_in = make("blocks.1.hook_mlp_in")
    with pytest.raises(UserError, match=r"switch it on with model.set_use_hook_mlp_in\(True\)"):
        model.run_with_saes(IDS, saes=[mlp_in])
    model.set_use_hook_mlp_in(True)
    assert (model.run_with_saes(IDS, saes=[mlp_in]) - model(IDS)).abs().max() > 1e-3


def warned(caplog: pytest.LogCaptureFixture, model: HookedSAETransformer, **metadata: Any) -> str:
    caplog.clear()
    model._told.clear()
    with caplog.at_level(logging.WARNING), model.saes(make(**metadata)):
        return caplog.text


def test_the_sae_of_another_model(model: HookedSAETransformer, caplog: pytest.LogCaptureFixture) -> None:
    name = model.model_name
    assert f"was trained on model_name=gemma-2b, and this is {name}" in warned(caplog, model, model_name="gemma-2b")
    with model.saes(make(model_name="gemma-2b")):
        assert caplog.text.count("was trained on") == 1  # said once
    assert warned(caplog, model, model_name=name) == ""
    model.model_name = "gpt2"
    assert warned(caplog, model, model_name="gpt2-small") == ""
    model.model_name = name


def test_other_numerics_are_said_where_they_matter(
    model: HookedSAETransformer, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    centred = folder.name == "gpt2"
    theirs = {"model_class_name": "HookedTransformer"}
    assert warned(caplog, model, **theirs) == ""  # its weights may be processed or not
    processed = theirs | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    unprocessed = theirs | {"model_from_pretrained_kwargs": {"fold_ln": False, "center_writing_weights": False}}
    plain = {"model_class_name": "AutoModelForCausalLM"}
    ours = {"model_class_name": "HookedTransformer", "compatibility_mode": True}
    for metadata, compatible in ((processed, True), (unprocessed, False), (plain, False), (ours, True)):
        text = warned(caplog, model, **metadata)
        # RMSNorm folds into what comes after it, and leaves the residual stream as it is
        assert ("and this model has others" in text) == (centred and compatible != model.compatibility_mode)
        if text:
            assert (
                "use HookedSAETransformer.from_pretrained, or load_model with compatibility_mode" in text
            ) == compatible
    text = warned(caplog, model, hook=Z, **processed)
    assert bool(text) == (not model.compatibility_mode)
