"""A language model with SAEs spliced in, by the names that users of SAELens and TransformerLens know.

    model = HookedSAETransformer.from_pretrained("gpt2-small")
    logits, cache = model.run_with_cache_with_saes("The cat", saes=[sae])
    cache["blocks.8.hook_resid_pre.hook_sae_acts_post"]

One class over two ways of running a model (see `saepipe.activations`). `HookedSAETransformer.from_pretrained` runs it
through TransformerLens' bridge: every hook point, and the numerics that most published SAEs were trained on.
`load_model` runs the Hugging Face model itself: fast, for the hook points that `saepipe.places` lists and for modules'
paths.

The weights are frozen (but those of a model that was loaded elsewhere), and unless gradients are switched off
(`torch.no_grad()`) all activations carry them, from the embeddings on, so that a logit can be differentiated by what
passed any hook point, or by an SAE's latents.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import not_taken, outputs
from saepipe.activations import BridgeHooks, Hooks, embedding_device
from saepipe.attached import AttachedSAEs
from saepipe.caching import Caches
from saepipe.errors import UserError
from saepipe.formats import check_device
from saepipe.generation import Generates
from saepipe.hooking import ForwardPass, FunctionsAt, Hook, Put, Where
from saepipe.model_view import HuggingFaceView
from saepipe.opening import Opens
from saepipe.outputs import Output
from saepipe.prompts import WITHOUT_BOS, Input, Prompts
from saepipe.splicing import Splice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HookedSAETransformer(AttachedSAEs, Caches, Generates, Opens):
    """A language model with functions and SAEs at its hook points.

    Use `from_pretrained`, `from_pretrained_no_processing` or `load_model`. Attributes that are not here are those of
    TransformerLens' bridge, or of the Hugging Face model.

    Not for several threads at once: what is attached in one, for a while too, is in place in all of them.

    Args:
        hooks: The model's hook points.
        tokenizer: Its tokenizer; None refuses text.
        name: What it is called.
        compatibility_mode: Whether it has HookedTransformer numerics.
    """

    def __init__(
        self,
        hooks: Hooks,
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        name: str,
        compatibility_mode: bool = False,
    ) -> None:
        self.model: Any = hooks.bridge if isinstance(hooks, BridgeHooks) else HuggingFaceView(hooks.model, name)
        """The bridge, or the Hugging Face model under TransformerLens' names."""
        self.hf_model = _hf_model(hooks)
        if isinstance(hooks, BridgeHooks):
            for weight in (*self.model.parameters(), *self.hf_model.parameters()):  # it makes some anew, to be trained
                weight.requires_grad_(False)
        config = self.hf_model.config.get_text_config()
        Prompts.__init__(
            self,
            tokenizer,
            name=name,
            device=hooks.device,
            context_limit=getattr(config, "max_position_embeddings", None),
            prepend_bos=config.model_type not in WITHOUT_BOS,
            vocab_size=getattr(config, "vocab_size", None),
        )
        self.compatibility_mode = compatibility_mode
        self._hooks = hooks
        self._centred = not hasattr(config, "rms_norm_eps")  # RMSNorm needs no centred weights, and gets none
        self._n_layers = config.num_hidden_layers
        self._splices: list[Splice] = []
        self._told: set[str] = set()
        self._puts: list[Put] = []
        self._points: dict[str, Hook] = {}

    @classmethod
    def _make(cls, hooks: Hooks, tokenizer: "PreTrainedTokenizerBase | None", **keys: Any) -> "HookedSAETransformer":
        return cls(hooks, tokenizer, **keys)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        way = "TransformerLens' bridge" if self.has_all_hooks else "Hugging Face"
        saes = f", with SAEs at {', '.join(self.acts_to_saes)}" if self._splices else ""
        return f"HookedSAETransformer({self.model_name}, {self._n_layers} blocks, through {way}{saes})"

    @property
    def hook_dict(self) -> dict[str, Hook]:
        """The hook points, with those of attached SAEs, by their names; modules' paths are not listed."""
        names = [*self._hooks.listed, *(name for splice in self._splices for name in splice.points)]
        return {name: self._hook(name) for name in names}

    @property
    def takes_off_mean(self) -> bool:
        """Whether its normalisations take off the mean (LayerNorm), or only scale (RMSNorm)."""
        return self._centred

    def _hook(self, name: str) -> Hook:
        return self._points.setdefault(name, Hook(name))

    def eval(self) -> "HookedSAETransformer":
        """Return the model, which is always as for inference."""
        return self

    def to(self, *args: Any, **keys: Any) -> "HookedSAETransformer":
        """Move the model to a device or a type, as torch's modules are moved.

        Raises:
            UserError: The device is not on this machine.
        """
        for given in (*args, *keys.values()):
            if isinstance(given, str | torch.device):
                check_device(given)
        self.model.to(*args, **keys)
        self._device = self._hooks.device = embedding_device(self.hf_model)
        return self

    # ---- running

    def __call__(self, input: Input, return_type: str | None = "logits", **keys: Any) -> Any:
        """Do as `forward`."""
        return self.forward(input, return_type, **keys)

    def forward(
        self,
        input: Input,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
        **others: Any,
    ) -> Tensor | Output | None:
        """Run the model, with everything that is attached to it.

        Args:
            input: A prompt, several, or token ids. Shorter prompts are padded on the right, where padding changes
                nothing, and left out of the loss.
            return_type: `logits`, `loss` (of the next token), `both`, or None for nothing.
            loss_per_token: Give the loss of each token but the first, not the mean; 0 where it is padding.
            prepend_bos: Whether text begins with the beginning-of-sequence token; None is the model's habit.
            stop_at_layer: Run the blocks before this one only, counted from the end if negative, and return the
                residual stream there.
            **others: Arguments of TransformerLens' that have no meaning here, which say what to do instead.

        Raises:
            UserError: The input is empty or too long, a hook or SAE does not fit, or a value has no meaning.
        """
        not_taken.refuse("forward", others, not_taken.FORWARD, _OWN)
        outputs.check(return_type)
        batch = self.read(input, prepend_bos=prepend_bos)
        out = self._run(batch.ids, stop_at_layer)
        if stop_at_layer is not None:
            return out
        return outputs.output(out, batch, return_type, loss_per_token=loss_per_token)

    def _run(
        self,
        ids: Int[Tensor, "batch seq"],
        stop_at_layer: int | None = None,
        record: Callable[[ForwardPass], None] = lambda _: None,
    ) -> Float[Tensor, "batch seq _"]:
        """Run the model once; logits, or the residual stream where it stops."""
        passing = self._passing(ids, record)
        if stop_at_layer is not None:
            layer = stop_at_layer + (self._n_layers if stop_at_layer < 0 else 0)
            if not 0 <= layer <= self._n_layers:
                raise UserError(f"stop_at_layer={stop_at_layer} is none of the model's; give 0 to {self._n_layers}")
            passing.stop(layer, self._n_layers)
        with self._gradients():
            logits = self._hooks.run(ids.to(self._hooks.device), passing.functions())
        if passing.residual is not None:
            return passing.residual
        assert logits is not None
        passing.check_reached()
        return logits.to(self._hooks.device)

    def _passing(
        self, ids: Int[Tensor, "batch seq"], record: Callable[[ForwardPass], None] = lambda _: None
    ) -> ForwardPass:
        """Put together what happens in a forward pass."""
        passing = ForwardPass(self._hooks, self._splices, ids)
        for put in sorted(self._puts, key=lambda put: put.backward):  # gradients are those of what functions return
            passing.put(put, self._hook)
        record(passing)
        passing.splice()
        return passing

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Have the embeddings carry gradients, and so all activations, while the weights carry none."""

        def carry(module: Any, args: Any, embedded: Tensor) -> Tensor | None:
            return embedded.requires_grad_() if torch.is_grad_enabled() else None

        handle = self.hf_model.get_input_embeddings().register_forward_hook(carry)
        try:
            yield
        finally:
            handle.remove()

    # ---- functions at hook points

    @contextmanager
    def hooks(
        self, fwd_hooks: FunctionsAt = (), bwd_hooks: FunctionsAt = (), reset_hooks_end: bool = True
    ) -> Iterator["HookedSAETransformer"]:
        """Keep functions at hook points for a while.

        Args:
            fwd_hooks: Pairs of a name, or what says of a name whether it is meant, and `function(activations, hook)`,
                which returns what replaces them, or None.
            bwd_hooks: The same for the gradients of activations.
            reset_hooks_end: Whether to take them off afterwards.

        Raises:
            UserError: There is no such hook point; said when the model runs.
        """
        before = self._puts
        self._puts = [*before, *(Put(*pair) for pair in fwd_hooks), *(Put(*pair, backward=True) for pair in bwd_hooks)]
        try:
            yield self
        finally:
            if reset_hooks_end:
                self._puts = before

    def add_hook(
        self,
        name: Where,
        hook: Callable[..., Any],
        dir: str = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Put a function at a hook point until `reset_hooks`.

        Args:
            name: As in `hooks`.
            hook: As in `hooks`.
            dir: `fwd`, or `bwd` for a function that sees gradients.
            is_permanent: Leave it there in `reset_hooks`.
            prepend: Call it before the functions that are there already.

        Raises:
            UserError: No such direction; that there is no such hook point is said when the model runs.
        """
        if dir not in ("fwd", "bwd"):
            raise UserError(f"dir={dir} is no direction of a hook; give fwd or bwd")
        put = Put(name, hook, backward=dir == "bwd", permanent=is_permanent)
        self._puts = [put, *self._puts] if prepend else [*self._puts, put]

    def add_perma_hook(self, name: Where, hook: Callable[..., Any], dir: str = "fwd") -> None:
        """Put a function at a hook point that stays in `reset_hooks`; see `add_hook`."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self, clear_contexts: bool = True, direction: str | None = "both", including_permanent: bool = False
    ) -> None:
        """Take off functions; SAEs stay.

        Args:
            clear_contexts: Forget what functions kept in `hook.ctx`.
            direction: `fwd`, `bwd` or `both`.
            including_permanent: Take off those of `add_perma_hook` too.

        Raises:
            UserError: No such direction.
        """
        if direction not in ("fwd", "bwd", "both", None):
            raise UserError(f"direction={direction} is none of hooks; give fwd, bwd or both")
        others = {"fwd": True, "bwd": False}.get(direction or "both")
        self._puts = [
            put for put in self._puts if (put.permanent and not including_permanent) or put.backward is others
        ]
        if clear_contexts:
            self._points = {}

    def run_with_hooks(
        self,
        input: Input,
        return_type: str | None = "logits",
        fwd_hooks: FunctionsAt = (),
        bwd_hooks: FunctionsAt = (),
        reset_hooks_end: bool = True,
        **keys: Any,
    ) -> Any:
        """Run the model with functions at hook points; see `hooks` and `forward`."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end):
            return self.forward(input, return_type, **keys)


_OWN = [name for name in HookedSAETransformer.forward.__annotations__ if name not in ("others", "return")]


def _hf_model(hooks: Hooks) -> Any:
    return hooks.bridge.original_model if isinstance(hooks, BridgeHooks) else hooks.model


def load_model(
    model: "str | PreTrainedModel",
    compatibility_mode: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    **keys: Any,
) -> HookedSAETransformer:
    """Open a Hugging Face model for functions and SAEs at its hook points.

    Args:
        model: Hub id, local folder, `demo` or a short name of TransformerLens; or a model that is loaded already, which
            stays where and as it is.
        compatibility_mode: HookedTransformer numerics, through TransformerLens' bridge.
        device: Torch device; None takes an accelerator where there is one.
        dtype: Type that it computes in; None is float32.
        tokenizer: Tokenizer of a model that is loaded already; None refuses text.
        **keys: Further keys of the model group: `revision`, `trust_remote_code`, `n_devices`, `device_map`.

    Raises:
        UserError: The model is missing, out of reach, gated, no causal language model, or a device is not there.
    """
    return HookedSAETransformer.load(model, compatibility_mode, device, dtype, tokenizer=tokenizer, **keys)
