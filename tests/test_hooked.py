"""A model runs with functions at its hook points and caches what passes them, alike in each way of running it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_hooked import HOOK, IDS, WAYS, by_hand, make, opened
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import saepipe
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer, load_model


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module", params=WAYS)
def model(request: pytest.FixtureRequest, folder: Path) -> HookedSAETransformer:
    return opened(request.param, folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> HookedSAETransformer:
    return opened("plain", folder)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Any:
    yield
    for name in {"model", "plain"} & set(request.fixturenames):
        found = request.getfixturevalue(name)
        assert (found._puts, found._splices) == ([], [])


def logits_of(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits.detach()


def test_logits_are_hugging_faces(model: HookedSAETransformer, folder: Path) -> None:
    expected = logits_of(folder)
    if model.compatibility_mode:  # centred over the vocabulary
        expected = expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(model(IDS), expected, atol=1e-4, rtol=1e-4)
    assert model(IDS, return_type=None) is None
    assert model.forward(IDS[0]).shape == (1, 9, small_models.VOCAB)
    torch.testing.assert_close(model(IDS[0].tolist()), model(IDS)[:1], atol=1e-4, rtol=1e-4)


def test_loss_is_that_of_the_next_token_without_padding(model: HookedSAETransformer) -> None:
    logits, loss = model(IDS, return_type="both")
    each = -logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, each.mean())
    torch.testing.assert_close(model(IDS, return_type="loss", loss_per_token=True), each)
    texts = ["the quick brown fox jumps", "a dog"]
    counts = [len(model.to_str_tokens(text)) - 1 for text in texts]
    alone = [model(text, return_type="loss", prepend_bos=True) for text in texts]
    mean = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(texts, return_type="loss"), mean, atol=1e-5, rtol=1e-5)


def test_a_function_that_returns_no_activations_is_refused(model: HookedSAETransformer) -> None:
    with pytest.raises(UserError, match=rf"the function at {HOOK} returned tuple; let it return activations, or None"):
        model.run_with_hooks(IDS, fwd_hooks=[(HOOK, lambda found, hook: (found,))])


def test_a_function_sees_and_replaces(model: HookedSAETransformer) -> None:
    seen: list[Any] = []

    def double(found: Tensor, hook: Any) -> Tensor:
        seen.append((hook.name, hook.layer(), found.shape))
        return found * 2

    out = model.run_with_hooks(IDS, fwd_hooks=[(HOOK, double)])
    assert seen == [(HOOK, 1, (2, 9, small_models.WIDTH))]
    torch.testing.assert_close(out, by_hand(model, {HOOK: lambda found: found * 2}))
    assert (out - model(IDS)).abs().max() > 0.1

    def double_in_place(found: Tensor, hook: Any) -> None:
        found *= 2

    with model.hooks(fwd_hooks=[(HOOK, double_in_place)]) as same:
        assert same is model
        torch.testing.assert_close(model(IDS), out)
    model.add_hook(HOOK, double)
    torch.testing.assert_close(model(IDS), out)
    model.reset_hooks()


def test_functions_at_one_point_follow_each_other(model: HookedSAETransformer) -> None:
    hooks = [(HOOK, lambda found, hook: found + 1), (HOOK, lambda found, hook: found * 2)]
    expected = by_hand(model, {HOOK: lambda found: (found + 1) * 2})
    torch.testing.assert_close(model.run_with_hooks(IDS, fwd_hooks=hooks), expected)


def test_a_predicate_meets_each_point_once(model: HookedSAETransformer) -> None:
    met: list[str] = []
    model.run_with_hooks(
        IDS, fwd_hooks=[(lambda name: "resid_post" in name, lambda found, hook: met.append(hook.name))]
    )
    assert met == [f"blocks.{block}.hook_resid_post" for block in range(3)]
    if model.has_all_hooks:
        met.clear()
        both = lambda name: name in ("blocks.0.hook_in", "blocks.0.hook_resid_pre")  # noqa: E731
        model.run_with_hooks(IDS, fwd_hooks=[(both, lambda found, hook: met.append(hook.name))])
        assert len(met) == 1


def test_the_stream_between_attention_and_mlp_is_whole(model: HookedSAETransformer) -> None:
    hook = "blocks.2.hook_resid_mid"
    constant = torch.linspace(-1, 1, small_models.WIDTH)
    out, cache = model.run_with_cache(IDS, names_filter=["blocks.2.hook_attn_out", hook])
    torch.testing.assert_close(out, model(IDS), atol=0, rtol=0)  # reading changes nothing
    pre = model.run_with_cache(IDS, names_filter="blocks.2.hook_resid_pre")[1]["resid_pre", 2]
    torch.testing.assert_close(cache["resid_mid", 2], pre + cache["attn_out", 2])
    changed = model.run_with_hooks(IDS, fwd_hooks=[(hook, lambda found, hook: constant.expand_as(found))])
    torch.testing.assert_close(changed, changed[:1, :1].expand_as(changed), atol=1e-5, rtol=1e-5)


def test_one_head(model: HookedSAETransformer) -> None:
    z = "blocks.1.attn.hook_z"

    def without_the_last(found: Tensor) -> Tensor:
        assert found.shape == (2, 9, 4, 8)
        return torch.cat([found[:, :, :3], torch.zeros_like(found[:, :, 3:])], 2)

    out = model.run_with_hooks(IDS, fwd_hooks=[(f"{z}.head.3", lambda found, hook: torch.zeros_like(found))])
    torch.testing.assert_close(out, by_hand(model, {z: without_the_last}))
    cache = model.run_with_cache(IDS, names_filter=[z, f"{z}.head.3"])[1]
    torch.testing.assert_close(cache[f"{z}.head.3"], cache["z", 1][:, :, 3])
    with pytest.raises(UserError, match=r"names head 4 of a hook with 4"):
        model.run_with_cache(IDS, names_filter=f"{z}.head.4")


def test_cache_holds_everything_by_name(model: HookedSAETransformer) -> None:
    out, cache = model.run_with_cache(IDS)
    torch.testing.assert_close(out, model(IDS), atol=0, rtol=0)
    assert {f"blocks.{block}.hook_resid_pre" for block in range(3)} <= set(cache)
    assert cache["resid_pre", 2] is cache["resid_pre", -1] is cache["blocks.2.hook_resid_pre"]
    assert not cache["resid_pre", 2].requires_grad
    torch.testing.assert_close(model.unembed(model.ln_final(cache["resid_post", 2])), out)
    with pytest.raises(KeyError, match=r"did you mean .*blocks.2.hook_resid_p"):
        cache["resid_pots", 2]
    assert set(model.hook_dict) >= set(cache)
    if model.has_all_hooks:
        assert cache["pattern", 0].shape == (2, 4, 9, 9)
        torch.testing.assert_close(cache["blocks.2.hook_in"], cache["resid_pre", 2])
        stack, labels = cache.accumulated_resid(return_labels=True)  # TransformerLens' own
        assert len(stack) == len(labels) == 4


def test_cache_filters(model: HookedSAETransformer) -> None:
    names = ["blocks.0.hook_mlp_out", HOOK]
    assert set(model.run_with_cache(IDS, names_filter=names)[1]) == set(names)
    assert list(model.run_with_cache(IDS, names_filter=HOOK)[1]) == [HOOK]
    assert list(model.run_with_cache(IDS, names_filter=lambda name: name == HOOK)[1]) == [HOOK]
    loss, cache = model.run_with_cache(IDS[0], return_type="loss", names_filter=HOOK, remove_batch_dim=True)
    assert (loss.ndim, cache[HOOK].shape) == (0, (9, small_models.WIDTH))
    found = model.run_with_cache(IDS, names_filter=HOOK, return_cache_object=False)[1]
    assert type(found) is dict


def test_a_cache_is_of_what_functions_made(model: HookedSAETransformer) -> None:
    with model.hooks([(HOOK, lambda found, hook: torch.ones_like(found))]):
        cache = model.run_with_cache(IDS, names_filter=["blocks.2.hook_resid_pre", HOOK])[1]
    assert all(bool((found == 1).all()) for found in cache.values())


@pytest.mark.parametrize(
    ("asked", "places"),
    [
        (-1, 8),
        ((2, 5), slice(2, 5)),
        (slice(0, None, 3), slice(0, None, 3)),
        ([7, 1], [7, 1]),
        (torch.tensor([4]), [4]),
    ],
)
def test_a_cache_of_some_positions(model: HookedSAETransformer, asked: Any, places: Any) -> None:
    names = [HOOK, "blocks.1.attn.hook_z"] + ["blocks.0.attn.hook_pattern"] * model.has_all_hooks
    whole = model.run_with_cache(IDS, names_filter=names)[1]
    some = model.run_with_cache(IDS, names_filter=names, pos_slice=asked)[1]
    for name in names:
        expected = whole[name][:, :, places] if "pattern" in name else whole[name][:, places]
        torch.testing.assert_close(some[name], expected, atol=0, rtol=0)


def test_a_cache_with_gradients(model: HookedSAETransformer) -> None:
    seen: dict[str, Tensor] = {}
    names = [HOOK, "blocks.1.attn.hook_z.head.2"]
    points = [HOOK, "blocks.1.attn.hook_z"]
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: seen.update({hook.name: grad.clone()})) for name in points]):
        model(IDS, return_type="loss").backward()
    seen[names[1]] = seen.pop(points[1]).view(2, 9, 4, -1)[:, :, 2]
    loss, cache = model.run_with_cache(IDS, return_type="loss", names_filter=names, incl_bwd=True, pos_slice=(1, 4))
    assert set(cache) == {*names, *(f"{name}_grad" for name in names)}
    assert loss.ndim == 0
    for name in names:
        assert cache[f"{name}_grad"].shape == cache[name].shape
        torch.testing.assert_close(cache[f"{name}_grad"], seen[name][:, 1:4], atol=1e-7, rtol=1e-4)
        assert seen[name].abs().max() > 0
    with pytest.raises(UserError, match=r'incl_bwd=True differentiates one number; give return_type="loss"'):
        model.run_with_cache(IDS, incl_bwd=True)
    with torch.no_grad(), pytest.raises(UserError, match=r"incl_bwd=True needs gradients, which torch.no_grad"):
        model.run_with_cache(IDS, return_type="loss", incl_bwd=True)


def test_a_device_that_is_not_there(plain: HookedSAETransformer) -> None:
    for given in ("cuda:77", torch.device("cuda:77")):
        with pytest.raises(UserError, match=r"device=cuda:77 is not on this machine .*; give cpu, or a device that is"):
            plain.to(given)
    assert plain.to(torch.float32) is plain.to("cpu")


def test_a_function_that_changes_the_shape_is_refused(model: HookedSAETransformer) -> None:
    with pytest.raises(UserError, match=rf"at {HOOK} returned shape \[1, 9, \d+\] for \[2, 9, \d+\]; let it return"):
        model.run_with_hooks(IDS, fwd_hooks=[(HOOK, lambda found, hook: found[:1])])


def test_a_model_says_what_it_is(plain: HookedSAETransformer) -> None:
    assert re.fullmatch(r"HookedSAETransformer\(.*, 3 blocks, through Hugging Face\)", repr(plain))
    with plain.saes(saes=[make()]):
        assert repr(plain).endswith(f", with SAEs at {HOOK})")


def test_permanent_functions_and_those_in_front(model: HookedSAETransformer) -> None:
    order: list[str] = []
    model.add_hook(HOOK, lambda found, hook: order.append("late"))
    model.add_hook(HOOK, lambda found, hook: order.append("early"), prepend=True)
    model.add_perma_hook(HOOK, lambda found, hook: order.append("always"))
    model.add_hook(HOOK, lambda grad, hook: order.append("gradient"), dir="bwd")
    model(IDS, return_type="loss").backward()
    assert order == ["early", "late", "always", "gradient"]
    model.reset_hooks(direction="fwd")
    order.clear()
    model(IDS, return_type="loss").backward()
    assert order == ["always", "gradient"]
    model.reset_hooks()
    order.clear()
    model(IDS, return_type="loss").backward()
    assert order == ["always"]
    model.reset_hooks(including_permanent=True)
    order.clear()
    model(IDS)
    assert not order
    with pytest.raises(UserError, match=r"direction=forwards is none of hooks; give fwd, bwd or both"):
        model.reset_hooks(direction="forwards")
    with pytest.raises(UserError, match=r"dir=up is no direction of a hook; give fwd or bwd"):
        model.add_hook(HOOK, print, dir="up")


def test_arguments_of_transformer_lens_that_are_not_taken(model: HookedSAETransformer) -> None:
    expected = model(IDS)
    given = {"attention_mask": None, "past_kv_cache": None, "padding_side": "right"}
    torch.testing.assert_close(model(IDS, **given), expected, atol=0, rtol=0)
    with pytest.raises(UserError, match=r"forward: attention_mask is not taken; prompts of unequal length are padded"):
        model(IDS, attention_mask=torch.ones(2, 9))
    with pytest.raises(UserError, match=r"run_with_cache: argument=name_filter is not known; did you mean"):
        model.run_with_cache(IDS, name_filter=HOOK)
    with pytest.raises(UserError, match=r"generate: padding_side=left is not taken"):
        model.generate(IDS, padding_side="left")
    with pytest.raises(UserError, match=r"forward: argument=stop_at_layr is not known; did you mean stop_at_layer"):
        model(IDS, stop_at_layr=1)


@pytest.mark.parametrize("ways", ["from_pretrained", "from_pretrained_no_processing"])
def test_the_bridge_around_a_model_that_is_loaded_already(folder: Path, ways: str) -> None:
    expected = getattr(HookedSAETransformer, ways)(str(folder), device="cpu")(IDS)
    given = {"hf_model": AutoModelForCausalLM.from_pretrained(folder), "default_prepend_bos": False}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, more in (("mine", {"tokenizer": tokenizer}), (str(folder), {})):
        given["hf_model"] = AutoModelForCausalLM.from_pretrained(folder)
        found = getattr(HookedSAETransformer, ways)(name, device="cpu", **given, **more)
        torch.testing.assert_close(found(IDS), expected, atol=1e-5, rtol=1e-5)
        assert (found.model_name, found.default_prepend_bos) == (name, False)
    with pytest.raises(UserError, match=r"from_pretrained: checkpoint_index=3 is not taken; give the revision"):
        getattr(HookedSAETransformer, ways)(str(folder), checkpoint_index=3)
    with pytest.raises(UserError, match=r"from_pretrained: argument=devise is not known; did you mean device"):
        getattr(HookedSAETransformer, ways)(str(folder), devise="cpu")


@pytest.mark.parametrize(("stop", "block"), [(0, 0), (2, 2), (3, 3), (-1, 2)])
def test_stopping_at_a_layer(model: HookedSAETransformer, stop: int, block: int) -> None:
    name = f"blocks.{block}.hook_resid_pre" if block < 3 else "blocks.2.hook_resid_post"
    expected = model.run_with_cache(IDS, names_filter=name)[1][name]
    torch.testing.assert_close(model(IDS, stop_at_layer=stop), expected, atol=0, rtol=0)
    out, cache = model.run_with_cache(IDS, stop_at_layer=stop)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    assert {int(name.split(".")[1]) for name in cache if name.startswith("blocks.")} == set(range(block))
    with pytest.raises(UserError, match=r"stop_at_layer=4 is none of the model's; give 0 to 3"):
        model(IDS, stop_at_layer=4)


def test_gradients_reach_back_to_the_embeddings(model: HookedSAETransformer) -> None:
    gradients: dict[str, Tensor] = {}
    kept: list[Tensor] = []
    hooks = [("blocks.0.hook_resid_pre", lambda found, hook: kept.append(found))]
    backward = [("blocks.0.hook_resid_pre", lambda grad, hook: gradients.update({hook.name: grad}))]
    with model.hooks(fwd_hooks=hooks, bwd_hooks=backward):
        logit = model(IDS)[0, -1, 5]
    logit.backward(retain_graph=True)
    (expected,) = torch.autograd.grad(logit, kept[0])
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradients["blocks.0.hook_resid_pre"], expected)
    assert all(weight.grad is None for weight in model.hf_model.parameters())
    with torch.no_grad():
        assert not model(IDS).requires_grad


def test_prompts_that_cannot_be_read(model: HookedSAETransformer) -> None:
    with pytest.raises(UserError, match=r"input has 65 tokens, more than the 64 that .* can read.*truncate=True"):
        model(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(UserError, match=r"return_type=logit is not known; give logits, loss, both or None"):
        model(IDS, return_type="logit")
    with pytest.raises(UserError, match=r"hook=blocks.1.hook_resid_pots is not known; did you mean"):
        model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_pots", print)])
    with pytest.raises(UserError, match=r"hook=.*hook_sae_acts_post belongs to an SAE, and none is attached"):
        model.run_with_cache(IDS, names_filter=f"{HOOK}.hook_sae_acts_post")


def test_outer_weights_have_transformer_lens_names(model: HookedSAETransformer) -> None:
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_heads, model.cfg.d_head) == (3, small_models.WIDTH, 4, 8)
    assert (model.cfg.d_vocab, model.cfg.n_ctx) == (small_models.VOCAB, small_models.CONTEXT_LIMIT)
    assert model.W_U.shape == (small_models.WIDTH, small_models.VOCAB)
    assert model.W_E.shape == (small_models.VOCAB, small_models.WIDTH)
    assert model.b_U.shape == (small_models.VOCAB,)
    normalised = model.ln_final(model(IDS, stop_at_layer=3))
    torch.testing.assert_close(normalised @ model.W_U + model.b_U, model(IDS), atol=1e-4, rtol=1e-4)
    with pytest.raises(AttributeError, match=r"no_such"):
        model.no_such  # noqa: B018
    assert model.eval() is model.to("cpu") is model


def test_a_modules_path_is_a_hook(plain: HookedSAETransformer, folder: Path) -> None:
    path = {"gpt2": "transformer.h.1", "llama": "model.layers.1"}[folder.name]
    out = plain.run_with_hooks(IDS, fwd_hooks=[(path, lambda found, hook: found * 2)])
    torch.testing.assert_close(out, by_hand(plain, {HOOK: lambda found: found * 2}))


def test_a_model_that_is_loaded_already(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = load_model(theirs)
    torch.testing.assert_close(model(IDS), theirs(IDS).logits)
    with pytest.raises(UserError, match=r"has no tokenizer; give token ids, or load_model\(model, tokenizer="):
        model("the quick brown fox")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.testing.assert_close(load_model(theirs, tokenizer=tokenizer)("a dog"), opened("plain", folder)("a dog"))
    compatible = load_model(theirs, compatibility_mode=True, tokenizer=tokenizer)
    torch.testing.assert_close(compatible(IDS), opened("compatible", folder)(IDS), atol=1e-5, rtol=1e-5)


def test_falcon_adds_in_place_to_nothing_that_a_function_has_kept(tmp_path: Path) -> None:
    model = opened("plain", small_models.make(tmp_path, "falcon"))
    hook = "transformer.h.1.mlp"
    kept: list[Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(IDS, fwd_hooks=[(hook, lambda found, hook: kept.append(found))])
        cached = model.run_with_cache(IDS, names_filter=hook)[1][hook]
    torch.testing.assert_close(kept[0], cached, atol=0, rtol=0)


def test_processing_can_be_left_out(folder: Path) -> None:
    model = HookedSAETransformer.from_pretrained(
        str(folder), device="cpu", dtype="float32", center_unembed=False, revision=None
    )
    torch.testing.assert_close(model(IDS), logits_of(folder), atol=1e-4, rtol=1e-4)
    half = load_model(str(folder), device="cpu", dtype=torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_the_demo_model(way: str) -> None:
    model = opened(way, "demo")
    sae = make("blocks.2.hook_resid_post", model.cfg.d_model, model_name="demo")
    text = "The old man went to the sea"
    clean, loss = model(text, return_type="both")
    assert loss < 10
    spliced, cache = model.run_with_cache_with_saes(text, saes=[sae])
    latents = cache["blocks.2.hook_resid_post.hook_sae_acts_post"]
    assert latents.shape == (1, len(model.to_str_tokens(text)), 24)
    assert (spliced - clean).abs().max() > 0.1
    torch.testing.assert_close(model.run_with_saes(text, saes=sae, use_error_term=True), clean, atol=1e-3, rtol=1e-4)


def test_the_front_door() -> None:
    assert saepipe.HookedSAETransformer is HookedSAETransformer
    assert saepipe.load_model is load_model
    code = "import sys; from saepipe import load_model; sys.exit('transformer_lens' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
