"""A latent of a register steers the demo model into that register, and without it there is less of the register."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saepipe import entry
from saepipe.cache import cache
from saepipe.demo import corpus
from saepipe.demo.corpus import Document
from saepipe.demo.registers import REGISTERS
from saepipe.hooked import HookedSAETransformer, load_model
from saepipe.reading import Texts, activations
from saepipe.saes.base import SAE
from saepipe.steering import Steer
from saepipe.train import train
from saepipe.typical import Typical

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]

NAMES = list(REGISTERS)
CORPUS, JUDGE, JUDGED = 5, 77, 99
"""Seeds of documents: those that the latent is chosen on, those that the judge learns from, those it is tested on."""
WINDOW = 16
"""Tokens that are judged together."""


class Judge:
    """Naive Bayes: the register under whose token frequencies a window of tokens is likeliest. It knows of no SAE."""

    def __init__(self, model: HookedSAETransformer) -> None:
        counts = torch.full((len(NAMES), model.cfg.d_vocab), 0.5)
        for document in islice(corpus.documents(JUDGE), 2000):
            ids = torch.tensor(token_ids(model, document))
            counts[NAMES.index(document.register)] += torch.bincount(ids, minlength=counts.shape[1])
        self._log_share = (counts / counts.sum(1, keepdim=True)).log()

    def share(self, ids: Tensor, register: str) -> float:
        """Share of the windows of some texts [text, seq] that are of a register."""
        n = ids.shape[1] // WINDOW
        scores = self._log_share[:, ids[:, : n * WINDOW]].unflatten(2, (n, WINDOW)).sum(3)
        return float((scores.argmax(0) == NAMES.index(register)).float().mean())


def token_ids(model: HookedSAETransformer, document: Document) -> list[int]:
    return model.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
