"""Opening a language model for its hook points, with TransformerLens' bridge around it or without."""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from saepipe import not_taken, placement
from saepipe.activations import BridgeHooks, Hooks, HuggingFaceHooks
from saepipe.config import ModelConfig
from saepipe.language_model import LanguageModel
from saepipe.model_files import ModelFiles
from saepipe.model_names import hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


T = TypeVar("T", bound="Opens")


class Opens:
    """The part of a model that loads it."""

    _make: Callable[..., Any]
    """Makes the model of its hook points and its tokenizer."""
    default_prepend_bos: bool

    @classmethod
    def from_pretrained(
        cls: type[T],
        model_name: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        hf_model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        default_prepend_bos: bool | None = None,
        **keys: Any,
    ) -> T:
        """Open a model with HookedTransformer numerics, through TransformerLens' bridge.

        Args:
            model_name: Hub id, local folder, `demo`, or a short name of TransformerLens such as `gpt2-small`.
            device: Torch device; None takes an accelerator where there is one.
            dtype: Type that it computes in; None is float32.
            fold_ln: Fold the weights of normalisations into what comes after them.
            center_writing_weights: Centre what is written to the residual stream, where LayerNorm takes off the mean.
            center_unembed: Centre the logits.
            fold_value_biases: Fold the biases of attention's values into its output's.
            hf_model: The model, where it is loaded already; then `model_name` is only what it is called.
            tokenizer: Its tokenizer; None takes that of `model_name`.
            default_prepend_bos: Whether text begins with the beginning-of-sequence token; None is the model's habit.
            **keys: Further keys of the model group: `revision`, `trust_remote_code`, `n_devices`, `device_map`.

        Raises:
            UserError: The model is missing, out of reach, gated, no causal language model, or a device is not there.
        """
        return cls._open(
            _config(model_name, device, dtype, compatibility_mode=True, **keys),
            bridge=True,
            hf_model=hf_model,
            tokenizer=tokenizer,
            prepend_bos=default_prepend_bos,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
        )

    @classmethod
    def from_pretrained_no_processing(
        cls: type[T],
        model_name: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        hf_model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        default_prepend_bos: bool | None = None,
        **keys: Any,
    ) -> T:
        """Open a model with its own numerics, through TransformerLens' bridge; see `from_pretrained`."""
        return cls._open(
            _config(model_name, device, dtype, compatibility_mode=False, **keys),
            bridge=True,
            hf_model=hf_model,
            tokenizer=tokenizer,
            prepend_bos=default_prepend_bos,
        )

    @classmethod
    def load(
        cls: type[T],
        model: "str | PreTrainedModel",
        compatibility_mode: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        **keys: Any,
    ) -> T:
        """Open a model as `saepipe.load_model` does, which see."""
        if isinstance(model, str):
            config = _config(model, device, dtype, compatibility_mode=compatibility_mode, **keys)
            return cls._open(config, bridge=compatibility_mode)
        name = model.config.name_or_path or type(model).__name__
        hooks: Hooks = (
            BridgeHooks.boot(model, tokenizer, name, compatibility_mode=True)
            if compatibility_mode
            else HuggingFaceHooks(model)
        )
        return cls._make(hooks, tokenizer, name=name, compatibility_mode=compatibility_mode)

    @classmethod
    def from_config(cls: type[T], config: ModelConfig) -> T:
        """Open a model as caching its activations does: through the bridge only where its hooks or numerics need that.

        Args:
            config: The model group of a run's configuration.

        Raises:
            UserError: As in `from_pretrained`, or a hook is unknown.
        """
        model = LanguageModel.open(config)
        mode = config.compatibility_mode
        return cls._make(model.hook_points, model.tokenizer, name=config.name, compatibility_mode=mode)

    @classmethod
    def _open(
        cls: type[T],
        config: ModelConfig,
        *,
        bridge: bool,
        hf_model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        prepend_bos: bool | None = None,
        **processing: bool,
    ) -> T:
        mode = config.compatibility_mode
        if hf_model is not None and config.device != "auto":
            hf_model.to(config.device)
        if hf_model is not None and tokenizer is not None:
            hooks: Hooks = BridgeHooks.boot(hf_model, tokenizer, config.name, compatibility_mode=mode, **processing)
        else:
            places = placement.here(config)
            files = ModelFiles.open(config)
            tokenizer = tokenizer or files.tokenizer
            model = files.load(places) if hf_model is None else hf_model
            with files.explained("no architecture that its hooks can read"):
                hooks = (
                    BridgeHooks.boot(model, tokenizer, files.source, compatibility_mode=mode, **processing)
                    if bridge
                    else HuggingFaceHooks(model)
                )
        opened: T = cls._make(hooks, tokenizer, name=config.name, compatibility_mode=mode)
        if prepend_bos is not None:
            opened.default_prepend_bos = prepend_bos
        return opened


def _config(
    name: str,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    *,
    compatibility_mode: bool,
    **keys: Any,
) -> ModelConfig:
    """Say what to load as the command line does; its hooks are not looked at."""
    known = [item.name for item in fields(ModelConfig)]
    others = {key: value for key, value in keys.items() if key not in known}
    not_taken.refuse("from_pretrained", others, not_taken.OPEN, known)
    keys = {key: value for key, value in keys.items() if key in known}
    return ModelConfig(
        name=hub_id(name),
        device="auto" if device is None else str(device),
        dtype=str(dtype or "float32").removeprefix("torch."),
        compatibility_mode=compatibility_mode,
        **keys,
    )
