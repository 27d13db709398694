"""TransformerLens' names for the sizes and the outer weights of a Hugging Face model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepipe.activations import embedding_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model."""

    model_name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_vocab: int
    n_ctx: int | None
    """Most tokens in a context; None where there is no limit."""
    device: torch.device
    dtype: torch.dtype


class HuggingFaceView:
    """A Hugging Face model whose sizes and outer weights also have TransformerLens' names; the rest is the model's.

    Args:
        model: A causal language model.
        name: What it is called.
    """

    def __init__(self, model: "PreTrainedModel", name: str) -> None:
        self.hf_model = model
        self._name = name

    @property
    def cfg(self) -> Sizes:
        """The model's sizes."""
        config = self.hf_model.config.get_text_config()
        heads = config.num_attention_heads
        return Sizes(
            model_name=self._name,
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            n_heads=heads,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            d_vocab=config.vocab_size,
            n_ctx=getattr(config, "max_position_embeddings", None),
            device=embedding_device(self.hf_model),
            dtype=self.hf_model.dtype,
        )

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embedding of each token."""
        return self.hf_model.get_input_embeddings().weight

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """What the logits are read off by, behind `ln_final` and without its weights (which are not folded in)."""
        return self.unembed.get_parameter("weight").T

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """Bias of the logits; zeros where the model has none."""
        bias = getattr(self.unembed, "bias", None)
        return torch.zeros(self.W_U.shape[1], device=self.W_U.device, dtype=self.W_U.dtype) if bias is None else bias

    @property
    def unembed(self) -> nn.Module:
        """The module that gives the logits."""
        return self.hf_model.get_output_embeddings()

    @property
    def ln_final(self) -> nn.Module:
        """The normalisation behind the last block."""
        decoder = self.hf_model.get_decoder()
        found = [getattr(decoder, name, None) for name in ("ln_f", "norm", "final_layer_norm", "final_layernorm")]
        return next(module for module in found if isinstance(module, nn.Module))

    def __getattr__(self, name: str) -> Any:
        if name == "hf_model":  # not set yet
            raise AttributeError(name)
        return getattr(self.hf_model, name)
