"""Small random language models of several architectures, as the Hugging Face folders that users have."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 320
CONTEXT_LIMIT = 64
WIDTH = 32
LAYERS = 3
WORDS = (
    "the quick brown fox jumps over a lazy dog and once upon time there was one small model with many layers".split()
)
TEXTS = [" ".join(WORDS[number % 7 :]) + f" {number}" for number in range(600)]


def _gpt2(**extra: Any) -> PretrainedConfig:
    return GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=CONTEXT_LIMIT, **_ids(), **extra)


def _neox(**extra: Any) -> PretrainedConfig:
    shape = _shape()
    del shape["num_key_value_heads"]
    return GPTNeoXConfig(**shape, **extra)


def _falcon() -> dict[str, Any]:
    return {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, **_ids()}


def _shape() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LIMIT,
        **_ids(),
    }


def _ids() -> dict[str, Any]:
    return {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


CONFIGS = {
    "gpt2": _gpt2,
    "llama": lambda **extra: LlamaConfig(**_shape() | extra),
    "mistral": lambda **extra: MistralConfig(**_shape() | extra),
    "qwen2": lambda **extra: Qwen2Config(**_shape() | extra),
    "qwen3": lambda **extra: Qwen3Config(head_dim=8, **_shape() | extra),
    "gemma": lambda **extra: GemmaConfig(head_dim=8, **_shape() | extra),
    "gemma2": lambda **extra: Gemma2Config(head_dim=8, **_shape() | extra),
    "gemma3_text": lambda **extra: Gemma3TextConfig(head_dim=8, **_shape() | extra),
    "gpt_neox": _neox,
    "falcon": lambda **extra: FalconConfig(**_falcon() | extra),
    "gpt_neox sequential": lambda **extra: _neox(use_parallel_residual=False, **extra),
}


def make(folder: Path, kind: str, *, bos: bool = True, eos: bool = True, **extra: Any) -> Path:
    """Save a random model with a tokenizer; its weights are large enough that every part of a block matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**extra))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(float(weight.mean()) if weight.ndim == 1 else 0, 0.15)
    model.save_pretrained(folder)
    tokenizer(bos=bos, eos=eos).save_pretrained(folder)
    return folder


def tokenizer(*, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on a few words: `<bos>` is 0, `<eos>` is 1."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    roles = {"bos_token": "<bos>"} if bos else {}
    roles |= {"eos_token": "<eos>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=learned, **roles)
