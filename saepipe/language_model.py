"""A language model that is read at its hook points, and run with some of them changed."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import activations, placement, places
from saepipe.activations import BridgeHooks, Hooks, HuggingFaceHooks
from saepipe.config import ModelConfig
from saepipe.edits import Edit, check_head, functions, per_token
from saepipe.errors import UserError, unknown
from saepipe.hook_names import split_head
from saepipe.model_files import ModelFiles
from saepipe.model_view import HuggingFaceView
from saepipe.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class LanguageModel:
    """A causal language model: configuration and tokenizer at once, weights when they are first needed.

    Use `open`. So a mistyped hook or a missing column costs no download and no loading.
    """

    def __init__(self, config: ModelConfig, files: ModelFiles, placement: Placement) -> None:
        """Take the files of a model, and where to run it."""
        self.config = config
        self.name = config.name
        self.device = placement.device
        """Where results are, and what edits get; layers may be elsewhere."""
        self._placement = placement
        self.tokenizer = files.tokenizer
        self._files = files
        with files.explained("no readable config.json"):
            self._listed = places.listed(files.text_config)

    @classmethod
    def open(cls, config: ModelConfig, *, local_rank: int = 0) -> "LanguageModel":
        """Find a model and check that it has the hook points.

        Args:
            config: The model group of the configuration.
            local_rank: The caller's place among the workers on this machine: each has GPUs of its own.

        Raises:
            UserError: The model is missing, out of reach, gated or no causal language model, a hook is unknown, or a
                device is not there.
        """
        devices = placement.here(config, local_rank=local_rank)
        model = cls(config, ModelFiles.open(config), devices)
        model.check_hooks(config.hooks)
        return model

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return self._files.text_config.num_hidden_layers

    @property
    def context_limit(self) -> int | None:
        """Most tokens in a context; None where the architecture has no limit."""
        return getattr(self._files.text_config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows."""
        return self._files.text_config.vocab_size

    @property
    def capture_path(self) -> str:
        """`huggingface` where hooks on the plain model serve every hook asked for, else `bridge` (slower)."""
        points = [split_head(hook)[0] for hook in self.config.hooks]
        served = all(point in self._listed or self._is_path(point) for point in points)
        return "huggingface" if served and not self.config.compatibility_mode else "bridge"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, for a store's plan: another identity may give other values."""
        return self._files.identity

    def check_hooks(self, names: Sequence[str]) -> None:
        """Refuse hook names that the model does not have, before the weights are loaded where that can be told.

        Raises:
            UserError: Names the close matches, or says which names do not go together.
        """
        for name in names:
            if (place := self._listed.get(split_head(name)[0])) is not None:
                check_head(name, place.heads)
        others = [point for point, _ in map(split_head, names) if point not in self._listed]
        for point in others:
            self._check_name(point)
        paths = [name for name in others if self._is_path(name)]
        bridged = [name for name in others if name not in paths]
        if paths and self.config.compatibility_mode:
            raise UserError(
                f"model.hooks={paths[0]} is the path of a module, which model.compatibility_mode=true changes; "
                "give TransformerLens' name of the place, or model.compatibility_mode=false"
            )
        if paths and bridged:
            raise UserError(
                f"model.hooks={bridged[0]} needs the TransformerLens bridge, where modules have other paths than "
                f"{paths[0]}; cache the two into stores of their own"
            )
        for name in bridged or [path for path in paths if self._files.skeleton is None]:
            if name not in self._hooks.names:
                raise unknown("model.hooks", name, [*self._listed, *self._hooks.names])

    def _check_name(self, name: str) -> None:
        """Refuse what can be told to be a mistake without the weights."""
        blocks = [str(block) for block in range(self.n_layers)]
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        if block.isdecimal() and block not in blocks:
            raise UserError(
                f"model.hooks={name} names block {block} of a model with {self.n_layers}; the last is "
                f"{name.replace(block, str(self.n_layers - 1), 1)}"
            )
        strange = (block and block not in blocks) or places.mistyped(name)
        if strange or not (self._is_path(name) or _is_bridge_name(name)):
            raise unknown("model.hooks", name, [*self._listed, *places.paths(self._modules)])

    def _is_path(self, name: str) -> bool:
        """Say whether a name that is not listed is a module's path, as far as that can be told without the weights."""
        if self._files.skeleton is None:
            return not _is_bridge_name(name)
        return places.find(name, {}, self._modules) is not None

    @cached_property
    def _modules(self) -> dict[str, torch.nn.Module]:
        """The model's modules by path, where they are known without the weights."""
        return dict(self._files.skeleton.named_modules()) if self._files.skeleton is not None else {}

    def check_context(self, context_size: int) -> None:
        """Refuse contexts that are longer than the model can read.

        Raises:
            UserError: Names the longest.
        """
        if self.context_limit is not None and context_size > self.context_limit:
            raise UserError(
                f"data.context_size={context_size} is longer than the {self.context_limit} tokens that "
                f"model.name={self.name} can read; give at most that"
            )

    def width(self, hook: str) -> int:
        """Return the width of a hook's activations (of all heads together, unless its name selects one)."""
        point = split_head(hook)[0]
        if point in self._listed and point.rsplit(".")[-1] in places.RESIDUAL:
            return self._files.text_config.hidden_size
        # A length unlike the number of heads, so that an attention pattern cannot pass for [batch, seq, d].
        heads = getattr(self._files.text_config, "num_attention_heads", 4)
        seq = min(heads + 1, self.context_limit or 2**31)
        ids = torch.zeros(2, seq, dtype=torch.int64)
        if (traced := self._traced(ids, point)) is not None:
            return per_token(hook, traced.get(point), ids.shape).shape[-1]
        return self.capture(ids, [hook])[hook].shape[-1]

    def _traced(self, ids: Int[Tensor, "batch seq"], point: str) -> dict[str, Tensor] | None:
        """Capture shapes without weights; None where that cannot be done."""
        skeleton = self._files.skeleton if self.capture_path == "huggingface" else None
        if skeleton is None:
            return None
        try:
            return activations.trace(HuggingFaceHooks(skeleton), (len(ids), ids.shape[1]), [point])
        except UserError:
            raise
        except Exception as error:
            log.debug("no shape of %s without the weights: %s", point, error)
            return None

    @torch.inference_mode()
    def capture(self, ids: Int[Tensor, "batch seq"], hooks: Sequence[str]) -> dict[str, Float[Tensor, "batch seq _"]]:
        """Return the activations at hook points, in the model's dtype, running no further than the last of them.

        Args:
            ids: Token ids.
            hooks: Names of hook points; heads are joined where a hook has several, unless its name selects one.

        Raises:
            UserError: The forward pass does not come by a hook point, or it has no activation per token.
        """
        points = {hook: split_head(hook)[0] for hook in hooks}
        seen = activations.capture(self._hooks, ids.to(self._hooks.device), list(dict.fromkeys(points.values())))
        return {hook: per_token(hook, seen.get(point), ids.shape).to(self.device) for hook, point in points.items()}

    @torch.inference_mode()
    def logits(
        self, ids: Int[Tensor, "batch seq"], edits: Mapping[str, Edit] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return the next-token logits, with the activations at some hook points replaced.

        Args:
            ids: Token ids.
            edits: Hook name -> function from its activations [batch, seq, d] to their replacement.
        """
        made = functions(edits or {}, ids.shape, self.device)
        logits = self._hooks.run(ids.to(self._hooks.device), made)
        assert logits is not None
        return logits.to(self.device)

    @property
    def hook_points(self) -> Hooks:
        """The loaded model's hook points, for what runs it in other ways than this class does."""
        return self._hooks

    @property
    def outer(self) -> Any:
        """The model's outer weights by TransformerLens' names: `W_E`, `W_U`, `ln_final`."""
        return (
            self._hooks.bridge
            if isinstance(self._hooks, BridgeHooks)
            else HuggingFaceView(self._hooks.model, self.name)
        )

    @cached_property
    def _hooks(self) -> Hooks:
        """Load the weights."""
        model = self._files.load(self._placement)
        with self._files.explained("no architecture that its hooks can read"):
            return HuggingFaceHooks(model) if self.capture_path == "huggingface" else self._bridge(model)

    def _bridge(self, model: "PreTrainedModel") -> BridgeHooks:
        mode = self.config.compatibility_mode
        why = "model.compatibility_mode=true needs" if mode else f"model.hooks={self.config.hooks} need"
        log.info("%s the TransformerLens bridge, the slower capture path", why)
        return BridgeHooks.boot(model, self.tokenizer, self._files.source, compatibility_mode=mode)


def _is_bridge_name(name: str) -> bool:
    """Tell the bridge's names from modules' paths; which of them there are is only known once it is booted."""
    return name.rsplit(".")[-1].startswith("hook_")
