"""Trains the embedded model: a small Llama on the demo corpus.

    python -m saepipe.demo.train_model --out runs/demo_model --compile

The corpus is endless, so no document is seen twice, and the losses in `training.json` are measured on documents that
are never trained on. One busy CPU core needs about 40 minutes for the default setting, which made the shipped model.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saepipe.demo import MODEL_DIR
from saepipe.demo.bigram import BigramModel
from saepipe.demo.corpus import documents

log = logging.getLogger(__name__)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
HELD_OUT_START = 1_000_000_000
"""The first document of the held-out range: no training run comes that far."""


@dataclass(frozen=True)
class Settings:
    """What decides the model, up to floating point."""

    tokens: int = 10_000_000
    """Training tokens; the cosine schedule ends there."""
    seed: int = 0
    """Seeds the initial weights. The corpus is always corpus 0."""
    tokenizer_documents: int = 10_000
    """Documents that the tokenizer is trained on."""
    vocabulary: int = 2048
    """Tokens of the tokenizer; a multiple of 64 keeps the matrices aligned."""
    context_tokens: int = 256
    """Length of a context, with its `<|bos|>`; also the most positions that the model takes."""
    hidden: int = 128
    """Width of the residual stream."""
    mlp: int = 320
    """Width of the gated MLP."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of hidden / heads channels."""
    batch_contexts: int = 16
    """Contexts per optimizer step."""
    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """On matrices; the gains of the norms have none."""
    warm_up_fraction: float = 0.02
    """Part of the steps in which the learning rate rises."""
    held_out_contexts: int = 400
    """Contexts of unseen documents on which the losses are measured."""


def train_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into digits and adds no special tokens by itself."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in islice(documents(), settings.tokenizer_documents))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=settings.context_tokens,
        clean_up_tokenization_spaces=False,
    )


def contexts(tokenizer: PreTrainedTokenizerFast, context_tokens: int, start: int = 0) -> Iterator[list[int]]:
    """Packed contexts without end: `bos` first, then documents that each end in `eos`, cut where the context ends.

    Args:
        tokenizer: encodes the documents.
        context_tokens: length of a context, with its `bos`.
        start: index of the first document.
    """
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    backend, source = tokenizer.backend_tokenizer, documents(start=start)
    pending: list[int] = []
    while True:
        for encoding in backend.encode_batch_fast([document.text for document in islice(source, 64)]):
            pending += encoding.ids
            pending.append(eos)
        size = context_tokens - 1
        whole = len(pending) // size * size
        for first in range(0, whole, size):
            yield [bos, *pending[first : first + size]]
        del pending[:whole]


def held_out_contexts(tokenizer: PreTrainedTokenizerFast, context_tokens: int, count: int) -> Tensor:
    """Contexts of documents that were never trained on, `[count, context_tokens]`."""
    return torch.tensor(list(islice(contexts(tokenizer, context_tokens, HELD_OUT_START), count)))


@torch.no_grad()
def model_loss(model: torch.nn.Module, tokens: Tensor) -> float:
    """Mean loss in nats per predicted token."""
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in tokens.split(16)]
    return float(sum(losses) / len(tokens))


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context_tokens,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a Hugging Face folder with bfloat16 weights, which halve its size at no measurable loss."""
    shipped = copy.deepcopy(model).to(torch.bfloat16)
    shipped.config.use_cache = True
    shipped.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    shipped.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def _lr(settings: Settings, progress: float) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if progress < settings.warm_up_fraction:
        return settings.lr * progress / settings.warm_up_fraction
    return settings.lr * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def train(settings: Settings, out: Path, compile_model: bool = False) -> dict[str, object]:
    """Trains tokenizer and model, saves them to `out` at every tenth of the run, and measures.

    Args:
        settings: what decides the model.
        out: the folder to write.
        compile_model: whether to train through `torch.compile`, which needs a C++ compiler.

    Returns:
        What `training.json` holds.
    """
    started_s = time.monotonic()
    tokenizer = train_tokenizer(settings)
    model = build_model(settings, tokenizer)
    bigram = BigramModel(settings.vocabulary)
    optimizer = _optimizer(model, settings)
    source = contexts(tokenizer, settings.context_tokens)
    forward = torch.compile(model) if compile_model else model
    steps = max(1, settings.tokens // (settings.batch_contexts * settings.context_tokens))
    progress = tqdm(range(steps), desc="training", unit="step", mininterval=10)
    for step in progress:
        batch = torch.tensor(list(islice(source, settings.batch_contexts)))
        bigram.count(batch)
        loss = forward(input_ids=batch, labels=batch).loss
        _update(optimizer, loss, _lr(settings, (step + 1) / steps))
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % max(1, steps // 10) == 0:
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    record = _measure(settings, tokenizer, bigram, out)
    record |= {
        "trained_tokens": steps * settings.batch_contexts * settings.context_tokens,
        "seconds": round(time.monotonic() - started_s),
        "threads": torch.get_num_threads(),
        "compiled": compile_model,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _measure(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, bigram: BigramModel, out: Path
) -> dict[str, object]:
    """Losses of the model as it was saved, rounded to bfloat16, and of the baselines, on held-out documents."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = held_out_contexts(tokenizer, settings.context_tokens, settings.held_out_contexts)
    loss, bigram_loss = model_loss(model, tokens), bigram.loss(tokens)
    return {
        "command": f"python -m saepipe.demo.train_model --tokens {settings.tokens} --seed {settings.seed}",
        "held_out_loss_nats": round(loss, 4),
        "bigram_loss_nats": round(bigram_loss, 4),
        "unigram_loss_nats": round(bigram.unigram_loss(tokens), 4),
        "loss_over_bigram": round(loss / bigram_loss, 4),
        "held_out_tokens": tokens.numel(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": asdict(settings),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write (default: the shipped model)")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="training tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of the weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: far faster, needs a C++ compiler")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    record = train(Settings(tokens=parsed.tokens, seed=parsed.seed), parsed.out, parsed.compile)
    log.info("held-out loss %s nats, bigram %s", record["held_out_loss_nats"], record["bigram_loss_nats"])


if __name__ == "__main__":
    main()
