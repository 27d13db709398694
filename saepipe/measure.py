"""What SAEs are worth on held-out tokens: reconstruction, sparsity, and what the language model loses by them.

The model reads every context once as it is, once with each SAE's reconstruction spliced in, and at each hook point once
with zeros and once with the mean activation there. A transcoder reads one hook point; what it predicts of another is
compared and spliced in there, as are zeros and mean. Special tokens and position 0 are left out of every figure: their
activations are never replaced, and what is predicted from them is not counted. Figures whose names begin with
`inclusive_` leave nothing out, as SAELens's do; they read as often again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from saepipe import progress
from saepipe.language_model import LanguageModel
from saepipe.saes.base import SAE
from saepipe.tally import SAMPLE_TOKENS, Tally
from saepipe.token_store import Side

INCLUSIVE = "inclusive_"
MEAN_TOKENS = 65_536
"""Tokens, at the beginning of those that are read, whose mean is put in the activations' place."""
_NO_TARGET = -100
"""Stands where a context's last token has none."""


@dataclass(frozen=True)
class Subject:
    """An SAE to measure, on the model's device, and where in the model it stands."""

    sae: SAE
    hook: str
    """Hook point that it reads."""
    target_hook: str
    """Hook point that it reconstructs: the same, but for a transcoder."""


@dataclass
class Measured:
    """What was counted of one SAE."""

    contexts: int
    """Contexts that were read."""

    ordinary: Tally
    """Special tokens and position 0 left out."""
    everything: Tally | None
    """Nothing left out; None where that was not asked for."""

    def merge(self, other: "Measured") -> None:
        """Add what another process counted of the same SAE."""
        self.contexts += other.contexts
        self.ordinary.merge(other.ordinary)
        if self.everything is not None and other.everything is not None:
            self.everything.merge(other.everything)

    def cpu(self) -> "Measured":
        """Move all to the CPU."""
        return Measured(self.contexts, self.ordinary.cpu(), self.everything and self.everything.cpu())

    def compute(self, sae: SAE) -> dict[str, Any]:
        """Return all figures of the SAE; see `Tally.compute`."""
        found = self.ordinary.compute(sae.W_dec.detach())
        if self.everything is not None:
            figures = self.everything.figures()
            found |= {f"{INCLUSIVE}{name}": value for name, value in figures.items() if name != "d_sae"}
        return {"contexts": self.contexts, "documents": self.ordinary.documents, **found}


@torch.inference_mode()
def measure(
    model: LanguageModel,
    subjects: Sequence[Subject],
    side: Side,
    most_tokens: int,
    *,
    batch_prompts: int,
    inclusive: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[Measured]:
    """Measure SAEs on the first contexts of one side of a token store, all in one reading.

    Args:
        model: The language model.
        subjects: The SAEs.
        side: Contexts to read.
        most_tokens: Tokens to read at most (whole contexts; at least one).
        batch_prompts: Contexts per forward pass.
        inclusive: Count everything as well.
        share: (i, n): read the i-th of n parts; the n results, merged in their order, are that of one reading.

    Returns:
        What was counted, in the order of the subjects.
    """
    seq = side.ids.shape[1]
    contexts = min(len(side), max(1, most_tokens // seq))
    targets = sorted({subject.target_hook for subject in subjects})
    means = _means(model, side, targets, min(contexts, max(1, MEAN_TOKENS // seq)), batch_prompts)
    part, parts = share
    begin, end = contexts * part // parts, contexts * (part + 1) // parts
    found = []
    for subject in subjects:
        centre = means[subject.target_hook]
        everything = Tally(subject.sae.d_sae, centre) if inclusive else None
        found.append(Measured(end - begin, Tally(subject.sae.d_sae, centre), everything))
    for start, ids, counted in _batches(side, begin, end, batch_prompts, model.device):
        documents = np.asarray(side.documents[start : start + len(ids)])
        hooks = {hook for subject in subjects for hook in (subject.hook, subject.target_hook)}
        clean, activations = _logits_and_activations(model, ids, hooks)
        kinds = [(counted, False)] + [(torch.ones_like(counted), True)] * inclusive
        for mask, is_everything in kinds:
            batch = _Batch(model, ids, documents, clean, mask, everything=is_everything)
            ablated = {hook: batch.ablated(hook, means[hook]) for hook in targets}
            for subject, measured in zip(subjects, found, strict=True):
                tally = measured.everything if is_everything else measured.ordinary
                assert tally is not None
                left = 0 if is_everything else max(0, max(1, SAMPLE_TOKENS // seq) - start)
                batch.count(tally, subject, activations, ablated[subject.target_hook], sample_contexts=left)
    return found


class _Batch:
    """Some contexts, the model's own predictions for them, and the tokens that a mask counts.

    Args:
        model: The language model.
        ids: Token ids.
        documents: Number of each token's document.
        clean: The model's logits.
        counted: Which tokens count, and are replaced.
        everything: Count the divergence at the last position too, which has no target, as SAELens does.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Int[Tensor, "batch seq"],
        documents: Int[np.ndarray, "batch seq"],
        clean: Float[Tensor, "batch seq vocab"],
        counted: Bool[Tensor, "batch seq"],
        *,
        everything: bool,
    ) -> None:
        self._model, self._ids, self._counted = model, ids, counted
        self._documents = documents[counted.cpu().numpy()]
        # A prediction counts where the activation that it is made from was replaced; the last token has no target.
        self._here = counted.clone()
        self._here[:, -1] &= everything
        self._documents_here = documents[self._here.cpu().numpy()]
        self._targets = functional.pad(ids[:, 1:], (0, 1), value=_NO_TARGET)[self._here]
        self._reference = clean[self._here].float().log_softmax(-1)

    def ablated(self, hook: str, mean: Float[Tensor, " d"]) -> dict[str, Float[Tensor, " here"]]:
        """Give the losses with zeros, and with the mean, at a hook point; and those of the model as it is."""
        found = {"predicted": (self._targets != _NO_TARGET).double(), "compared": torch.ones(len(self._targets))}
        found["ce"] = self._ce(self._reference)
        for name, row in (("zero", torch.zeros_like(mean)), ("mean", mean)):
            found |= self._losses(name, hook, row.expand(int(self._counted.sum()), -1))
        return found

    def count(
        self,
        tally: Tally,
        subject: Subject,
        activations: dict[str, Float[Tensor, "batch seq _"]],
        ablated: dict[str, Float[Tensor, " here"]],
        *,
        sample_contexts: int,
    ) -> None:
        """Add the batch to what is counted of an SAE, with the activations of its first contexts as a sample."""
        x, y = (activations[hook][self._counted] for hook in (subject.hook, subject.target_hook))
        f = subject.sae.encode(x)
        reconstruction = subject.sae.decode(f, x)
        tally.update(self._documents, f, y, reconstruction)
        tally.keep(f[: int(self._counted[:sample_contexts].sum())])
        del f  # the largest of all, and the model is still to run
        tally.add_losses(self._documents_here, ablated | self._losses("sae", subject.target_hook, reconstruction))

    def _losses(self, name: str, hook: str, rows: Float[Tensor, "token d"]) -> dict[str, Float[Tensor, " here"]]:
        """Run the model with rows in the place of the counted activations."""
        logits = self._model.logits(self._ids, {hook: _replacing(self._counted, rows)})
        logprobs = logits[self._here].float().log_softmax(-1)
        kl = functional.kl_div(logprobs, self._reference, reduction="none", log_target=True).sum(-1)
        return {f"ce_{name}": self._ce(logprobs), f"kl_{name}": kl}

    def _ce(self, logprobs: Float[Tensor, "here vocab"]) -> Float[Tensor, " here"]:
        return functional.nll_loss(logprobs, self._targets, reduction="none", ignore_index=_NO_TARGET)


def _means(
    model: LanguageModel, side: Side, hooks: list[str], contexts: int, batch_prompts: int
) -> dict[str, Float[Tensor, " d"]]:
    """Take the mean of what counts at hook points over the first contexts."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    for start in range(0, contexts, batch_prompts):
        stop = min(start + batch_prompts, contexts)
        counted = torch.from_numpy(side.ordinary_contexts(start, stop)).to(model.device)
        seen = model.capture(torch.from_numpy(side.ids[start:stop].astype("int64")), hooks)
        for hook in hooks:
            sums[hook] = sums.get(hook, 0) + seen[hook][counted].float().sum(0)
        tokens += int(counted.sum())
    return {hook: total / max(tokens, 1) for hook, total in sums.items()}


def _batches(
    side: Side, begin: int, end: int, batch_prompts: int, device: torch.device
) -> Iterator[tuple[int, Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]]:
    """Read numbers of contexts, token ids and the mask of the tokens that count, with a bar."""
    with progress.bar("evaluate", (end - begin) * side.ids.shape[1]) as bar:
        for start in range(begin, end, batch_prompts):
            stop = min(start + batch_prompts, end)
            ids = torch.from_numpy(side.ids[start:stop].astype("int64")).to(device)
            counted = torch.from_numpy(side.ordinary_contexts(start, stop)).to(device)
            yield start, ids, counted
            bar.update(ids.numel())


def _logits_and_activations(
    model: LanguageModel, ids: Int[Tensor, "batch seq"], hooks: set[str]
) -> tuple[Float[Tensor, "batch seq vocab"], dict[str, Float[Tensor, "batch seq _"]]]:
    """Run the model once as it is, and keep what passes the hook points."""
    kept: dict[str, Tensor] = {}

    def keeping(hook: str) -> Callable[[Tensor], Tensor]:
        def keep(activations: Tensor) -> Tensor:
            kept[hook] = activations
            return activations

        return keep

    return model.logits(ids, {hook: keeping(hook) for hook in hooks}), kept


def _replacing(counted: Bool[Tensor, "batch seq"], rows: Float[Tensor, "token d"]) -> Callable[[Tensor], Tensor]:
    """Put rows in the place of the counted activations; those of special tokens and position 0 stay."""

    def edit(activations: Tensor) -> Tensor:
        replaced = activations.clone()
        replaced[counted] = rows.to(activations.dtype)
        return replaced

    return edit
