"""Hook names -> places in a language model, and running the model with functions at those places.

Two ways give the same numbers (a test equates them). `HuggingFaceHooks` puts forward hooks on the Hugging Face model
in its own attention: fast, for the residual stream and what the attention and the MLP add to it. `BridgeHooks` goes
through TransformerLens' bridge, which has every hook point but computes attention the slow, inspectable way: 0.6 to
0.7 of the speed up to the same layer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PretrainedConfig, PreTrainedModel

HookFunction = Callable[[Tensor], Tensor | None]
"""Sees a hook point's activations; what it returns replaces them, None leaves them."""


class Stop(Exception):  # noqa: N818 - no error: a hook function raises it to end the forward pass there
    """Raised by a hook function that needs nothing of what comes after its hook point."""


@dataclass(frozen=True)
class _Place:
    """A module inside a decoder block (empty: the block itself), and whether the hook point is its input."""

    module: str = ""
    is_input: bool = False


_BLOCK = {"hook_resid_pre": _Place(is_input=True), "hook_resid_post": _Place()}
"""Holds for every architecture with a list of decoder blocks."""

_PARALLEL_NEOX = {"hook_attn_out": _Place("attention"), "hook_mlp_out": _Place("mlp")}
_GPT2 = {
    "hook_attn_out": _Place("attn"),
    "hook_resid_mid": _Place("ln_2", is_input=True),
    "hook_mlp_out": _Place("mlp"),
}
_LLAMA = {
    "hook_attn_out": _Place("self_attn"),
    "hook_resid_mid": _Place("post_attention_layernorm", is_input=True),
    "hook_mlp_out": _Place("mlp"),
}
# Gemma 2 and 3 normalise what attention and MLP give before they add it; TransformerLens' names mean what is added.
_GEMMA2 = {
    "hook_attn_out": _Place("post_attention_layernorm"),
    "hook_resid_mid": _Place("pre_feedforward_layernorm", is_input=True),
    "hook_mlp_out": _Place("post_feedforward_layernorm"),
}
_IN_BLOCK = {
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
"""`model_type` -> places that equal TransformerLens' beyond the residual stream; the test runs over these."""


def huggingface_places(config: "PretrainedConfig") -> dict[str, tuple[int, _Place]]:
    """List the hook names that need no bridge -> (block, place in it); only the configuration is read."""
    places = dict(_BLOCK)
    if config.model_type != "gpt_neox" or config.use_parallel_residual:
        places |= _IN_BLOCK.get(config.model_type, {})
    return {
        f"blocks.{block}.{name}": (block, place)
        for block in range(config.num_hidden_layers)
        for name, place in sorted(places.items())
    }


class HuggingFaceHooks:
    """Hook points as forward hooks on a Hugging Face model."""

    def __init__(self, model: "PreTrainedModel") -> None:
        """Find the decoder blocks of a causal language model."""
        config = model.config.get_text_config()
        lists = [child for child in model.get_decoder().modules() if isinstance(child, nn.ModuleList)]
        self.blocks = next(blocks for blocks in lists if len(blocks) == config.num_hidden_layers)
        self.places = huggingface_places(config)
        self.model = model

    @property
    def names(self) -> list[str]:
        """The hook points that this way serves."""
        return list(self.places)

    def run(
        self, ids: Int[Tensor, "batch seq"], functions: Mapping[str, HookFunction]
    ) -> Float[Tensor, "batch seq vocab"] | None:
        """Run the model with a function at each hook point; None where one of them raised `Stop`."""
        with ExitStack() as hooks:
            for name, function in functions.items():
                hooks.enter_context(self._hooked(name, function))
            try:
                return self.model(input_ids=ids, use_cache=False).logits
            except Stop:
                return None

    @contextmanager
    def _hooked(self, name: str, function: HookFunction) -> Iterator[None]:
        block, place = self.places[name]
        module = self.blocks[block].get_submodule(place.module)
        if place.is_input:
            handle = module.register_forward_pre_hook(_on_input(function), with_kwargs=True)
        else:
            handle = module.register_forward_hook(_on_output(function))
        try:
            yield
        finally:
            handle.remove()


def _on_input(function: HookFunction) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """Hand a module's first argument, by position or as `hidden_states`, to the function."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replaced = function(args[0] if args else kwargs["hidden_states"])
        if replaced is None:
            return None
        return ((replaced, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": replaced})

    return hook


def _on_output(function: HookFunction) -> Callable[[nn.Module, Any, Any], Any]:
    """Hand a module's output, or the first of several, to the function."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple)
        replaced = function(output[0] if several else output)
        return (replaced, *output[1:]) if several and replaced is not None else replaced

    return hook


class BridgeHooks:
    """Hook points of TransformerLens' bridge, by its own names."""

    def __init__(self, bridge: "TransformerBridge") -> None:
        """Take the hook points of a booted bridge."""
        self.bridge = bridge
        self.points = bridge.hook_dict

    @property
    def names(self) -> list[str]:
        """The hook points that this way serves."""
        return list(self.points)

    def run(
        self, ids: Int[Tensor, "batch seq"], functions: Mapping[str, HookFunction]
    ) -> Float[Tensor, "batch seq vocab"] | None:
        """Run the model with a function at each hook point; None where one of them raised `Stop`."""
        # The functions are set on the hook points themselves: in compatibility mode `bridge.hooks` calls a function
        # once per alias of the name, which would splice an SAE in twice.
        for name, function in functions.items():
            self.points[name].add_hook(_without_point(function))
        try:
            return self.bridge(ids, return_type="logits")
        except Stop:
            return None
        finally:
            for name in functions:  # TransformerLens 3.9 returns no handle; nobody else adds hooks meanwhile
                self.points[name].fwd_hooks.pop().hook.remove()


def _without_point(function: HookFunction) -> Callable[..., Tensor | None]:
    return lambda activations, hook: function(activations)


Hooks = HuggingFaceHooks | BridgeHooks


def capture(hooks: Hooks, ids: Int[Tensor, "batch seq"], names: list[str]) -> dict[str, Tensor]:
    """Run the model as far as the last of the hook points and return what passed them.

    A hook point that the model passed by is absent from the result.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> HookFunction:
        def function(activations: Tensor) -> None:
            seen[name] = activations
            if len(seen) == len(names):
                raise Stop

        return function

    hooks.run(ids, {name: watch(name) for name in names})
    return seen
