"""Evaluation over the forward passes that it cannot do without: what SAEs and counting cost beside the model."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from saepipe import saes
from saepipe.bench_figure import Figure, speed
from saepipe.bench_store import random_tokens
from saepipe.config import RunConfig
from saepipe.language_model import LanguageModel
from saepipe.measure import Subject
from saepipe.measure import measure as measured
from saepipe.saes.base import SAE
from saepipe.token_store import Side

PASSES = 4
"""Forward passes of a context: as it is, with the SAE, with zeros, and with the mean."""


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Time the evaluation of an untrained SAE of the user's model, or the demo's, on random tokens, and its passes."""
    hook = config.model.hooks[0]
    model = LanguageModel.open(replace(config.model, hooks=[hook]))
    contexts = max(1, config.bench.tokens // 4 // config.data.context_size)
    side = random_tokens(
        folder / "evaluated", contexts=contexts, context_size=config.data.context_size, vocab_size=model.vocab_size
    ).train
    subject = Subject(untrained(config, model.width(hook)).to(model.device), hook, hook)
    rounds = [pair(config, model, subject, side) for _ in range(1 + config.bench.rounds)][1:]
    tokens = contexts * config.data.context_size
    speeds = {"evaluate_tokens_per_s": tokens / rounds[-1][1], "passes_tokens_per_s": tokens / rounds[-1][0]}
    return [
        Figure(
            f"evaluate, share of its time that {PASSES} plain forward passes take",
            [plain / whole for plain, whole in rounds],
            speeds,
            told=speed(speeds["evaluate_tokens_per_s"]),
        )
    ]


def untrained(config: RunConfig, d_in: int) -> SAE:
    """Make an SAE of the run's architecture."""
    sae = saes.architecture(config.sae.architecture)(config.sae, d_in)
    sae.initialise(torch.Generator().manual_seed(0))
    return sae


def pair(config: RunConfig, model: LanguageModel, subject: Subject, side: Side) -> tuple[float, float]:
    """Time plain forward passes over the contexts of a side, and the evaluation of an SAE on them; in seconds."""
    batch, begin = config.evaluate.batch_prompts, time.perf_counter()
    with torch.inference_mode():
        for ids in torch.from_numpy(side.ids.astype("int64")).split(batch):
            for _ in range(PASSES):
                logits = model.logits(ids.to(model.device), {})
            float(logits[0, 0, 0])  # waits for the device
    plain = time.perf_counter()
    measured(model, [subject], side, side.ids.size, batch_prompts=batch)
    return plain - begin, time.perf_counter() - plain
