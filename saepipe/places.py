"""Hook names -> places in a Hugging Face model, where forward hooks give what TransformerLens' bridge gives.

There are two kinds of names. TransformerLens' (`blocks.3.hook_mlp_out`) are the same for all architectures; some are
listed here for some architectures, and the bridge knows the others. A module's path (`model.layers.3.mlp`) means its
output, and with `.input` behind it its first input, in any architecture.
"""

import difflib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INPUT = ".input"
"""What follows the path of a module whose input is meant."""


@dataclass(frozen=True)
class Place:
    """A module and a side of it."""

    module: str = ""
    """Path of the module in its decoder block (empty: the block itself), or in the model where `block` is None."""
    is_input: bool = False
    """The module's input, not its output."""
    block: int | None = None
    """Number of the decoder block."""
    heads: int = 0
    """Heads that lie side by side in the activations; 0 where there are none."""


RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Hook points in a block that are as wide as the residual stream."""

_BLOCK = {"hook_resid_pre": Place(is_input=True), "hook_resid_post": Place()}
"""Holds for every architecture with a list of decoder blocks."""

_SEQUENTIAL_NEOX = {
    "mlp.hook_in": Place("mlp", is_input=True),
    "attn.hook_z": Place("attention.dense", is_input=True),
    "mlp.hook_post": Place("mlp.dense_4h_to_h", is_input=True),
}
_PARALLEL_NEOX = {**_SEQUENTIAL_NEOX, "hook_attn_out": Place("attention"), "hook_mlp_out": Place("mlp")}
_GPT2 = {
    "mlp.hook_in": Place("mlp", is_input=True),
    "attn.hook_z": Place("attn.c_proj", is_input=True),
    "hook_attn_out": Place("attn"),
    "hook_resid_mid": Place("ln_2", is_input=True),
    "mlp.hook_post": Place("mlp.c_proj", is_input=True),
    "hook_mlp_out": Place("mlp"),
}
_LLAMA = {
    "mlp.hook_in": Place("mlp", is_input=True),
    "attn.hook_z": Place("self_attn.o_proj", is_input=True),
    "hook_attn_out": Place("self_attn"),
    "hook_resid_mid": Place("post_attention_layernorm", is_input=True),
    "mlp.hook_post": Place("mlp.down_proj", is_input=True),
    "hook_mlp_out": Place("mlp"),
}
# Gemma 2 and 3 normalise what attention and MLP give before they add it; TransformerLens' names mean what is added.
_GEMMA2 = {
    **_LLAMA,
    "hook_attn_out": Place("post_attention_layernorm"),
    "hook_resid_mid": Place("pre_feedforward_layernorm", is_input=True),
    "hook_mlp_out": Place("post_feedforward_layernorm"),
}
IN_BLOCK = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt_neox": _PARALLEL_NEOX,
}
"""`model_type` -> places that equal TransformerLens' beyond the residual stream; a test runs over these."""


def listed(config: "PretrainedConfig") -> dict[str, Place]:
    """List TransformerLens' names that need no bridge -> their places; only the configuration is read."""
    in_block = _BLOCK | IN_BLOCK.get(config.model_type, {})
    if config.model_type == "gpt_neox" and not config.use_parallel_residual:
        in_block = _BLOCK | _SEQUENTIAL_NEOX
    heads = {"attn.hook_z": config.num_attention_heads} if "attn.hook_z" in in_block else {}
    return {
        f"blocks.{block}.{name}": replace(place, block=block, heads=heads.get(name, 0))
        for block in range(config.num_hidden_layers)
        for name, place in sorted(in_block.items())
    }


def find(name: str, known: Mapping[str, Place], modules: Container[str]) -> Place | None:
    """Find the place that a name means.

    Args:
        name: Name of a hook point.
        known: What `listed` gives for the model.
        modules: Paths of the model's modules.
    """
    if name in known:
        return known[name]
    if name and name in modules:
        return Place(name)
    module = name.removesuffix(INPUT)
    return Place(module, is_input=True) if module and module != name and module in modules else None


def paths(modules: Iterable[str]) -> list[str]:
    """List the names that module paths make, for an error to choose from."""
    return [name for module in modules if module for name in (module, module + INPUT)]


def mistyped(name: str) -> bool:
    """Tell a mistyped name that needs no bridge from one that only the bridge knows."""
    leaf, leaves = name.rsplit(".")[-1], (*RESIDUAL, "hook_z", "hook_post")
    return leaf not in leaves and bool(difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.85))
