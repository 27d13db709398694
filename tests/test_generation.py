"""Generating is what a loop of whole forward passes does, with every function and SAE in place at every step."""

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_hooked import HOOK, IDS, WAYS, make, opened
from torch import Tensor

from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.hooking import FunctionsAt


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module", params=WAYS)
def model(request: pytest.FixtureRequest, folder: Path) -> HookedSAETransformer:
    return opened(request.param, folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> HookedSAETransformer:
    return opened("plain", folder)


def loop(model: HookedSAETransformer, ids: Tensor, n: int, hooks: FunctionsAt = ()) -> Tensor:
    for _ in range(n):
        with torch.no_grad():
            logits = model.run_with_hooks(ids, fwd_hooks=hooks)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def steer(found: Tensor, hook: Any) -> Tensor:
    """Change the last position, and the third, by what only their places in the whole text say."""
    found[:, -1] += torch.linspace(-6, 6, found.shape[-1])
    found[:, 2] -= 5
    return found * (1 + found.shape[1] / 50)


GREEDY = {"do_sample": False, "stop_at_eos": False, "max_new_tokens": 12}


def test_greedy_is_the_loop_of_whole_forward_passes(model: HookedSAETransformer) -> None:
    clean = model.generate(IDS, **GREEDY)
    assert torch.equal(clean, loop(model, IDS, 12))
    hooks = [(HOOK, steer)]
    steered = model.generate(IDS, fwd_hooks=hooks, **GREEDY)
    assert torch.equal(steered, loop(model, IDS, 12, hooks))
    assert not torch.equal(steered, clean)
    with model.hooks(fwd_hooks=hooks):
        assert torch.equal(model.generate(IDS, **GREEDY), steered)
    assert torch.equal(model.generate(IDS, **GREEDY), clean)
    assert not steered.requires_grad


def test_saes_are_in_place_at_every_step(model: HookedSAETransformer) -> None:
    clean = model.generate(IDS, **GREEDY)
    hooks = [(f"{HOOK}.hook_sae_acts_post", lambda found, hook: found + 3)]
    with model.saes(make()):
        spliced, hooked = model.generate(IDS, **GREEDY), model.generate(IDS, fwd_hooks=hooks, **GREEDY)
        assert torch.equal(spliced, loop(model, IDS, 12))
        assert torch.equal(hooked, loop(model, IDS, 12, hooks))
    with model.saes(make(), use_error_term=True):
        assert torch.equal(model.generate(IDS, **GREEDY), clean)
    assert not torch.equal(spliced, clean)
    assert not torch.equal(hooked, spliced)


def test_prompts_of_unequal_length_are_as_if_alone(model: HookedSAETransformer) -> None:
    texts = ["the quick brown fox", "a dog", "the small model"]
    hooks = [(HOOK, steer)]
    found = model.generate(texts, fwd_hooks=hooks, **GREEDY)
    assert found == [model.generate(text, fwd_hooks=hooks, **GREEDY) for text in texts]
    assert all(new.startswith(text) and len(new) > len(text) for new, text in zip(found, texts, strict=True))
    ids = model.generate(texts, return_type="tokens", **GREEDY)
    longest = model.to_tokens(texts).shape[1] + 12
    assert ids.shape == (3, longest)
    alone = loop(model, model.to_tokens("a dog"), 12)
    assert torch.equal(ids[1, -alone.shape[1] :], alone[0])
    assert model.generate("a dog", return_type="tokens", **GREEDY).shape == alone.shape
    assert model.generate(IDS[:1], return_type="str", **GREEDY) == model.to_string(loop(model, IDS[:1], 12)[0])


def test_keys_and_values_are_kept_where_that_is_exact(
    plain: HookedSAETransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, read = plain.generate(IDS, use_past_kv_cache=False, **GREEDY), []
    embed = plain.hf_model.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    assert torch.equal(plain.generate(IDS, **GREEDY), whole)
    assert read == [9] + [1] * 11
    read.clear()
    same = plain.generate(IDS, fwd_hooks=[(HOOK, lambda found, hook: None)], **GREEDY)
    handle.remove()
    assert torch.equal(same, whole)
    assert read == list(range(9, 21))


def test_kept_keys_and_values_show_functions_the_new_positions(plain: HookedSAETransformer) -> None:
    shown: list[int] = []

    def scale(found: Tensor, hook: Any) -> Tensor:
        shown.append(found.shape[1])
        return found * 1.5

    hooks = [(HOOK, scale)]
    found = plain.generate(IDS, use_past_kv_cache=True, fwd_hooks=hooks, **GREEDY)
    assert shown == [9] + [1] * 11
    # What asks nothing of other positions is the same either way
    assert torch.equal(found, plain.generate(IDS, fwd_hooks=hooks, **GREEDY))


def test_the_bridge_keeps_none(folder: Path) -> None:
    with pytest.raises(UserError, match=r"use_past_kv_cache=True is not for a model that runs through.*bridge"):
        opened("bridge", folder).generate(IDS, use_past_kv_cache=True)


def test_it_ends_at_the_end(plain: HookedSAETransformer) -> None:
    whole = plain.generate(IDS, **GREEDY)
    ends = whole[:, 9 + 3].tolist()  # each row ends at its fourth new token, or before
    found = plain.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=ends)
    assert found.shape[1] <= 9 + 4
    for row, full in zip(found, whole, strict=True):
        stop = next(place for place in range(9, 13) if full[place] in ends)
        assert torch.equal(row[: stop + 1], full[: stop + 1])
        assert set(row[stop + 1 :].tolist()) <= {int(full[stop])}
    text = plain.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=ends, return_type="str")
    assert len(text) == 2
    plain.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"stop_at_eos=True needs an end-of-sequence token.*give eos_token_id, or"):
        plain.generate(IDS)
    plain.tokenizer.eos_token = "<eos>"


def test_sampling(plain: HookedSAETransformer) -> None:
    keys: dict[str, Any] = {"stop_at_eos": False, "max_new_tokens": 12}
    seeded = plain.generate(IDS, seed=3, **keys)
    assert torch.equal(plain.generate(IDS, seed=3, use_past_kv_cache=False, **keys), seeded)
    assert not torch.equal(plain.generate(IDS, seed=4, **keys), seeded)
    greedy = plain.generate(IDS, **GREEDY)
    for likeliest in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(plain.generate(IDS, **likeliest, **keys), greedy), likeliest
    penalised = plain.generate(IDS, freq_penalty=1e4, **GREEDY)
    assert all(len(set(row.tolist())) == len(set(ids.tolist())) + 12 for row, ids in zip(penalised, IDS, strict=True))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_new_tokens": 56}, r"max_new_tokens=56 after a prompt of 9 tokens is more than the 64 .* at most 55"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1 is negative"),
        ({"temperature": float("nan")}, r"temperature=nan is negative or no number"),
        ({"freq_penalty": float("inf")}, r"freq_penalty=inf leaves no logit that can be compared"),
        ({"temperature": -1.0}, r"temperature=-1.0 is negative"),
        ({"top_k": 0}, r"top_k=0 leaves no token"),
        ({"top_p": 1.5}, r"top_p=1.5 is no probability"),
        ({"return_type": "text"}, r"return_type=text is not known; give input, str or tokens"),
    ],
)
def test_what_has_no_meaning(plain: HookedSAETransformer, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plain.generate(IDS, **keys)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_said(plain: HookedSAETransformer, factor: float, do_sample: bool) -> None:
    broken = [(HOOK, lambda found, hook: found * factor)]
    with pytest.raises(UserError, match=r"logits hold NaN or infinity.*functions and SAEs in place"):
        plain.generate(IDS, 2, do_sample=do_sample, fwd_hooks=broken)


def test_a_bar_is_shown(plain: HookedSAETransformer, capsys: pytest.CaptureFixture[str]) -> None:
    plain.generate(IDS, verbose=True, **GREEDY)
    assert "generate" in capsys.readouterr().err
