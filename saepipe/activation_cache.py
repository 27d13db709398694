"""What passed a language model's hook points in one forward pass, under TransformerLens' names."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from saepipe.errors import unknown

_IN_ATTENTION = ("q", "k", "v", "z", "pattern", "attn_scores", "result", "rot_q", "rot_k")
_IN_MLP = ("pre", "post", "mid", "pre_linear")
_IN_MODEL = ("embed", "pos_embed", "token_type_embed")
_ALSO = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v"}
_ALSO |= {"mlp_pre": "pre", "mlp_mid": "mid", "mlp_post": "post"}
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_SHORT = re.compile(r"([a-z]+)(\d+)([a-z]?.*)")


def hook_name(name: str, layer: int | None = None, part: str | None = None) -> str:
    """Write a hook point's name out, as TransformerLens' `get_act_name` does.

    Args:
        name: Short name, such as `resid_pre`, `z` or `mlp_out`, also with layer and part in it, such as `scale4ln1`; or
            the whole name, which stays as it is.
        layer: Number of the decoder block, where it is in one.
        part: Part of the block, where that does not follow from the name: `attn`, `mlp`, `ln1`, `ln2`.
    """
    if "." in name or name.startswith("hook_"):
        return name
    if short := _SHORT.fullmatch(name):
        name, layer, part = short[1], int(short[2]), short[3] or None
    name, part = _ALSO.get(name, name), _PARTS.get(part, part) if part else part
    if layer is None:
        return f"hook_{name}" if name in _IN_MODEL else f"ln_final.hook_{name}"
    if part is None:
        part = "attn" if name in _IN_ATTENTION else "mlp" if name in _IN_MLP else ""
    return ".".join(["blocks", str(layer), *([part] if part else []), f"hook_{name}"])


class ActivationCache(Mapping[str, Tensor]):
    """Hook name -> activations. `cache["resid_pre", 8]` is short for `cache["blocks.8.hook_resid_pre"]`.

    Negative layers count from the end. What TransformerLens' own cache computes from these (`accumulated_resid`,
    `stack_head_results` ...) is there by the same names, where the model runs through TransformerLens' bridge.

    Args:
        activations: Hook name -> activations.
        model: The model that they are of.
    """

    def __init__(self, activations: dict[str, Tensor], model: Any) -> None:
        self.cache_dict = activations
        self.model = model
        self.has_batch_dim = True

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        if isinstance(key, tuple):
            short, *place = key
            if place and place[0] is not None and place[0] < 0:
                place[0] += self.model.cfg.n_layers
            key = hook_name(short, *place)
        found = self.cache_dict.get(key, self.cache_dict.get(hook_name(key)))
        if found is None:
            error = unknown("hook", key, self.cache_dict, "Nothing else was cached: see names_filter.")
            raise KeyError(str(error))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "cache_dict" not in vars(self):
            raise AttributeError(name)
        from transformer_lens.ActivationCache import ActivationCache as Theirs

        return getattr(Theirs(self.cache_dict, self.model, has_batch_dim=self.has_batch_dim), name)

    def remove_batch_dim(self) -> "ActivationCache":
        """Drop the batch's axis of each, where the batch is of one prompt; changes this cache and returns it."""
        if self.has_batch_dim:
            self._change(lambda found: found[0] if len(found) == 1 else found)
            self.has_batch_dim = False
        return self

    def to(self, device: str | torch.device) -> "ActivationCache":
        """Move all activations; changes this cache and returns it."""
        self._change(lambda found: found.to(device))
        return self

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, found in self.cache_dict.items():
            self.cache_dict[name] = change(found)
