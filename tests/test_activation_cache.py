"""Activations go by TransformerLens' names, long or short."""

import pytest
import torch

from saepipe.activation_cache import ActivationCache, hook_name

NAMES = [
    ("resid_pre", 8),
    ("resid_mid", 1),
    ("mlp_out", 3),
    ("q", 2),
    ("pattern", 2),
    ("post", 5),
    ("embed",),
    ("pos_embed",),
    ("scale",),
    ("normalized", 3, "ln1"),
    ("blocks.1.hook_resid_post",),
    ("k", 6, "a"),
    ("resid_mid", 1, "b"),
    ("attn", 0),
    ("attn_logits", 2),
    ("mlp_post", 2),
    ("k6",),
    ("scale4ln1",),
]


@pytest.mark.parametrize("key", NAMES, ids=str)
def test_short_names_are_transformer_lens(key: tuple[str, ...]) -> None:
    from transformer_lens.utilities import get_act_name

    assert hook_name(*key) == get_act_name(*key)


def test_it_is_a_mapping() -> None:
    held = {"blocks.0.hook_resid_pre": torch.ones(1, 3, 4), "hook_embed": torch.zeros(1, 3, 4)}
    cache = ActivationCache(dict(held), model=None)
    assert (len(cache), list(cache), "hook_embed" in cache) == (2, list(held), True)
    assert cache["embed"] is cache["hook_embed"]
    assert cache["resid_pre", 0] is held["blocks.0.hook_resid_pre"]
    assert cache[("embed",)] is cache["hook_embed"]
    assert "blocks.0.hook_resid_pre" in repr(cache)
    with pytest.raises(KeyError, match=r"hook=blocks.1.hook_resid_pre is not known; did you mean blocks.0"):
        cache["resid_pre", 1]
    assert cache.to(torch.device("cpu")).remove_batch_dim() is cache
    assert cache["embed"].shape == (3, 4)
    assert cache.remove_batch_dim()["embed"].shape == (3, 4)
