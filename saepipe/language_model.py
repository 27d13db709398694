"""A language model that is read at its hook points, and run with some of them changed."""

import copy
import hashlib
import json
import logging
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import activations, hub
from saepipe.activations import BridgeHooks, HookFunction, Hooks, HuggingFaceHooks
from saepipe.config import ModelConfig
from saepipe.demo import MODEL_DIR
from saepipe.errors import UserError, explained_memory, unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 4096
_LEAVES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""The last parts of well-known hook names: a near miss of one of them is a typing error."""

Edit = Callable[[Tensor], Tensor]
"""Receives a hook point's activations [batch, seq, d] and returns their replacement."""


class LanguageModel:
    """A causal language model: configuration and tokenizer at once, weights when they are first needed.

    Use `open`. So a mistyped hook or a missing column costs no download and no loading.
    """

    def __init__(self, config: ModelConfig, source: str, device: torch.device) -> None:
        """Read the configuration and the tokenizer from a folder or a hub id."""
        self.config = config
        self.source = source
        """Folder or hub id that everything is loaded from."""
        self.device = device
        self.name = config.name
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        self._config = self._read_config()
        self._refuse_other_kinds()
        self.tokenizer = self._read_tokenizer()
        with self._loading("no readable config.json"):
            self._places = activations.huggingface_places(self._text_config)

    @classmethod
    def open(cls, config: ModelConfig) -> "LanguageModel":
        """Find a model and check that it has the hook points.

        Args:
            config: The model group of the configuration.

        Raises:
            UserError: The model is missing, out of reach, gated or no causal language model, a hook is unknown, or the
                device is not there.
        """
        device = _device(config.device)
        if config.revision is not None and (config.name == "demo" or hub.local(config.name) is not None):
            raise UserError(
                f"model.revision={config.revision} has no meaning for model.name={config.name}, which is not on the "
                "hub; leave model.revision out"
            )
        if config.name == "demo":
            source = str(MODEL_DIR)
        elif (folder := hub.local(config.name)) is not None:
            source = str(folder)
        else:
            source = config.name
            hub.check(source, "model", config.revision, key="model.name")
        model = cls(config, source, device)
        model.check_hooks(config.hooks)
        return model

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return self._text_config.num_hidden_layers

    @property
    def context_limit(self) -> int | None:
        """Most tokens in a context; None where the architecture has no limit."""
        return getattr(self._text_config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows."""
        return self._text_config.vocab_size

    @property
    def capture_path(self) -> str:
        """`huggingface` where hooks on the plain model serve every hook asked for, else `bridge` (slower)."""
        plain = not self.config.compatibility_mode and all(hook in self._places for hook in self.config.hooks)
        return "huggingface" if plain else "bridge"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, for a store's plan: another identity may give other values."""
        folder = Path(self.source)
        with self._loading("damaged weights"):
            weights = _fingerprint(folder) if folder.is_dir() else None
        return {
            "name": self.name if self.name == "demo" else self.source,
            "revision": getattr(self._config, "_commit_hash", None) or self.config.revision,
            "weights": weights,
            "dtype": self.config.dtype,
            "compatibility_mode": self.config.compatibility_mode,
        }

    def hooks(self) -> list[str]:
        """List the hook names that are served on this model's capture path."""
        return list(self._places) if self.capture_path == "huggingface" else self._hooks.names

    def check_hooks(self, names: Sequence[str]) -> None:
        """Refuse hook names that the model does not have, before the weights are loaded where that can be told.

        Raises:
            UserError: Names the close matches.
        """
        blocks = [str(block) for block in range(self.n_layers)]
        for name in names:
            if name in self._places:
                continue
            block = name.split(".")[1] if name.startswith("blocks.") else ""
            if block.isdecimal() and block not in blocks:
                raise UserError(
                    f"model.hooks={name} names block {block} of a model with {self.n_layers}; the last is "
                    f"{name.replace(block, str(self.n_layers - 1), 1)}"
                )
            if (block and block not in blocks) or _near_miss(name.rsplit(".")[-1]):
                raise unknown("model.hooks", name, self._places)
        others = [name for name in names if name not in self._places]
        if others or self.config.compatibility_mode:
            for name in others:
                if name not in self._hooks.names:
                    raise unknown("model.hooks", name, self._hooks.names)

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
        """Return the width of a hook's activations (of all heads together, where it has heads)."""
        if hook in self._places:
            return self._text_config.hidden_size
        # A length unlike the number of heads, so that an attention pattern cannot pass for [batch, seq, d].
        seq = min(self._text_config.num_attention_heads + 1, self.context_limit or 2**31)
        ids = torch.zeros(1, seq, dtype=torch.int64)
        return self.capture(ids, [hook])[hook].shape[-1]

    @torch.inference_mode()
    def capture(self, ids: Int[Tensor, "batch seq"], hooks: Sequence[str]) -> dict[str, Float[Tensor, "batch seq _"]]:
        """Return the activations at hook points, in the model's dtype, running no further than the last of them.

        Args:
            ids: Token ids.
            hooks: Names of hook points; heads are joined where a hook has several.

        Raises:
            UserError: The forward pass does not come by a hook point, or it has no activation per token.
        """
        seen = activations.capture(self._hooks, ids.to(self.device), list(hooks))
        return {hook: _per_token(hook, seen.get(hook), ids) for hook in hooks}

    @torch.inference_mode()
    def logits(
        self, ids: Int[Tensor, "batch seq"], edits: Mapping[str, Edit] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return the next-token logits, with the activations at some hook points replaced.

        Args:
            ids: Token ids.
            edits: Hook name -> function from its activations [batch, seq, d] to their replacement.
        """
        functions: dict[str, HookFunction] = {}
        for hook, edit in (edits or {}).items():
            if hook.endswith(".hook_resid_mid"):
                functions |= _mid_functions(hook, edit)
            else:
                functions[hook] = _joined(hook, edit, ids)
        logits = self._hooks.run(ids.to(self.device), functions)
        assert logits is not None
        return logits

    @property
    def _text_config(self) -> "PretrainedConfig":
        return self._config.get_text_config()

    def _read_config(self) -> "PretrainedConfig":
        from transformers import AutoConfig

        with self._loading("no readable config.json"):
            return AutoConfig.from_pretrained(self.source, **self._options)

    def _refuse_other_kinds(self) -> None:
        """Refuse what transformers would not load as a language model, or would let attend to the tokens ahead."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        config, kind = self._config, type(self._config)
        own_code = self.config.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        decodes = getattr(config, "is_decoder", False) or config.is_encoder_decoder
        encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not decodes
        if not own_code and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING or encoder):
            raise UserError(
                f"model.name={self.name} is no causal language model (its config.json describes "
                f"{'an encoder, ' if encoder else ''}model_type={config.model_type}); give one such as GPT-2 or Llama"
            )

    def _read_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        with self._loading("no readable tokenizer (save one there with save_pretrained)"):
            tokenizer = AutoTokenizer.from_pretrained(self.source, **self._options)
            # transformers makes up an empty one without files
            if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
                raise ValueError("its vocabulary is empty")
        return tokenizer

    @cached_property
    def _hooks(self) -> Hooks:
        """Load the weights."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        if not sys.stderr.isatty():  # its bar over the weights is nothing for a log
            transformers_logging.disable_progress_bar()
        with self._loading("no weights of a causal language model that fit its config.json"):
            model, found = AutoModelForCausalLM.from_pretrained(
                self.source, config=self._config, dtype=self.dtype, output_loading_info=True, **self._options
            )
            if missing := sorted(found["missing_keys"]):  # transformers would make them up at random
                raise UserError(
                    f"model.name={self.name} lacks {len(missing)} of the model's weights, e.g. {missing[0]}; give a "
                    "folder that save_pretrained wrote"
                )
            model = model.to(self.device).eval().requires_grad_(False)
            return HuggingFaceHooks(model) if self.capture_path == "huggingface" else self._bridge(model)

    def _bridge(self, model: Any) -> BridgeHooks:
        from transformer_lens.model_bridge import TransformerBridge

        log.info("model.hooks or model.compatibility_mode need the TransformerLens bridge, the slower capture path")
        tokenizer = copy.deepcopy(self.tokenizer)  # the bridge gives it a padding token
        bridge = TransformerBridge.boot_transformers(
            self.source, hf_model=model, tokenizer=tokenizer, dtype=self.dtype, device=str(self.device)
        )
        if self.config.compatibility_mode:
            bridge.enable_compatibility_mode(disable_warnings=True)
        return BridgeHooks(bridge)

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        """Word whatever transformers, safetensors, torch or a model's own code raise at what they cannot read.

        Args:
            what: What the model has then.
        """
        try:
            with explained_memory(f"loading model.name={self.name}", model__dtype="bfloat16"):
                yield
        except UserError:
            raise
        except Exception as error:
            raise self._unusable(error, what) from error

    def _unusable(self, error: Exception, what: str) -> UserError:
        """Word a loading error."""
        if "trust_remote_code" in str(error) and not self.config.trust_remote_code:
            return UserError(
                f"model.name={self.name} brings its own code; set model.trust_remote_code=true if you trust it"
            )
        if hub.offline() and not Path(self.source).exists():
            return hub.out_of_reach(self.name, "model", hub.fault(error), key="model.name")
        return UserError(f"model.name={self.name} has {what}; give another Hugging Face model ({hub.fault(error)})")


def _device(name: str) -> torch.device:
    """Find the device, or say why it cannot be had."""
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device={name} is no device; give auto, cpu, cuda, cuda:1 or mps") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise UserError(
            f"model.device={name} is not on this machine, which has {there['cuda']} CUDA devices; try model.device=auto"
        )
    return device


def _near_miss(leaf: str) -> bool:
    """Tell a mistyped hook name from one that only the bridge knows."""
    import difflib

    return leaf not in _LEAVES and bool(difflib.get_close_matches(leaf, _LEAVES, n=1, cutoff=0.85))


def _per_token(hook: str, found: Tensor | None, ids: Tensor) -> Tensor:
    """Join heads, and refuse what is not one vector per token."""
    if found is None:
        raise UserError(f"model.hooks={hook} is not passed by this model's forward pass; choose another hook")
    if found.ndim < 3 or found.shape[:2] != ids.shape:
        raise UserError(
            f"model.hooks={hook} has shape {list(found.shape)}, not one vector per token; choose another hook"
        )
    return found.flatten(2)


def _joined(hook: str, edit: Edit, ids: Tensor) -> HookFunction:
    """Show an edit its activations with heads joined, as `capture` does."""
    return lambda found: edit(_per_token(hook, found, ids)).reshape(found.shape)


def _mid_functions(hook: str, edit: Edit) -> dict[str, HookFunction]:
    """Edit the residual stream between attention and MLP.

    The hook point itself is the MLP's input alone (in TransformerLens' bridge too): the stream that goes on beside the
    MLP would keep the old value. So what the attention adds is changed instead.
    """
    block = hook.removesuffix("hook_resid_mid")
    before: list[Tensor] = []
    return {
        f"{block}hook_resid_pre": before.append,
        f"{block}hook_attn_out": lambda added: edit(before[0] + added) - before[0],
    }


def _fingerprint(folder: Path) -> str:
    """Hash a model folder: the configuration, and of every weight its name, shape, first and last 4 KiB.

    Reading all of a large model would take as long as loading it; training a model changes both ends of its weights.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError(f"{path.name} is damaged")
            header = file.read(size)
            digest.update(header)
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    for place in (begin, max(begin, end - _SAMPLE_BYTES)):
                        file.seek(8 + size + place)
                        digest.update(file.read(min(end - place, _SAMPLE_BYTES)))
    for path in sorted(folder.glob("*.bin")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
