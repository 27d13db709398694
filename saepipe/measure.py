"""What an SAE is worth on held-out tokens: reconstruction, sparsity, and what the language model loses by it.

The model reads every context three times: as it is, with the SAE's reconstruction spliced in, and with zeros there. A
transcoder reads one hook point; what it predicts of another is compared and spliced in there, as are the zeros.
Special tokens and position 0 are left out of every figure: their activations are never replaced, and what is predicted
from them is not counted. Figures whose names begin with `inclusive_` leave nothing out, as SAELens's do not; they take
two readings more.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from saepipe import metrics, progress
from saepipe.language_model import LanguageModel
from saepipe.saes.base import SAE
from saepipe.token_store import Side

INCLUSIVE = "inclusive_"
_NO_TARGET = -100
"""Stands where a context's last token has none."""


@torch.inference_mode()
def measure(
    model: LanguageModel,
    sae: SAE,
    side: Side,
    hook: str,
    most_tokens: int,
    *,
    batch_prompts: int,
    target_hook: str | None = None,
    inclusive: bool = False,
) -> dict[str, Any]:
    """Measure an SAE at a hook point on the first contexts of one side of a token store.

    Args:
        model: The language model.
        sae: The SAE, on the model's device.
        side: Contexts to read.
        hook: Hook point that the SAE reads.
        most_tokens: Tokens to read at most (whole contexts; at least one).
        batch_prompts: Contexts per forward pass.
        target_hook: Hook point that it reconstructs; None is the one that it reads.
        inclusive: Give the figures that count every token as well.
    """
    target_hook = target_hook or hook
    seq = side.ids.shape[1]
    contexts = min(len(side), max(1, most_tokens // seq))
    counting = _Tally(sae, model, target_hook)
    counting_all = _Tally(sae, model, target_hook, every_token=True) if inclusive else None
    for ids, counted in _batches(side, contexts, batch_prompts, model.device):
        clean, activations = _logits_and_activations(model, ids, {hook, target_hook})
        counting.update(ids, clean, activations[hook], activations[target_hook], counted)
        if counting_all is not None:
            everything = torch.ones_like(counted)
            counting_all.update(ids, clean, activations[hook], activations[target_hook], everything)
    found = counting.compute()
    if counting_all is not None:
        found |= {f"{INCLUSIVE}{name}": value for name, value in counting_all.compute().items() if name != "d_sae"}
    return {
        "contexts": contexts,
        "documents": len(set(side.documents[:contexts].reshape(-1).tolist())),
        **found,
    }


class _Tally:
    """Figures over batches, of the tokens that a mask counts.

    Args:
        sae: The SAE.
        model: The language model.
        target_hook: Hook point that the SAE reconstructs.
        every_token: Count the divergence at the last position too, which has no target, as SAELens does.
    """

    def __init__(self, sae: SAE, model: LanguageModel, target_hook: str, *, every_token: bool = False) -> None:
        self._sae, self._model, self._target_hook, self._every_token = sae, model, target_hook, every_token
        self._fit = metrics.ReconstructionFit(sae.d_out)
        self._fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=model.device)
        self._sums = dict.fromkeys(("ce", "ce_sae", "ce_zero", "kl_sae", "kl_zero"), 0.0)
        self._predicted = 0
        self._compared = 0

    def update(
        self,
        ids: Int[Tensor, "batch seq"],
        clean: Float[Tensor, "batch seq vocab"],
        x: Float[Tensor, "batch seq d_in"],
        y: Float[Tensor, "batch seq d_out"],
        counted: Bool[Tensor, "batch seq"],
    ) -> None:
        """Add a batch.

        Args:
            ids: Token ids.
            clean: The model's logits.
            x: What the SAE reads.
            y: What it is to reconstruct.
            counted: Which tokens count, and are replaced.
        """
        features = self._sae.encode(x[counted])
        reconstruction = self._sae.decode(features, x[counted])
        self._fit.update(y[counted], reconstruction)
        self._fired += (features > 0).sum(0)
        spliced = self._model.logits(ids, {self._target_hook: _replacing(counted, reconstruction)})
        zeroed = self._model.logits(ids, {self._target_hook: _replacing(counted, torch.zeros_like(reconstruction))})
        # A prediction counts where the activation that it is made from was replaced; the last token has no target.
        here = counted.clone()
        here[:, -1] &= self._every_token
        targets = functional.pad(ids[:, 1:], (0, 1), value=_NO_TARGET)[here]
        self._predicted += int((targets != _NO_TARGET).sum())
        self._compared += len(targets)
        reference = clean[here].float().log_softmax(-1)
        self._sums["ce"] += self._ce(reference, targets)
        for name, logits in (("sae", spliced), ("zero", zeroed)):
            logprobs = logits[here].float().log_softmax(-1)
            self._sums[f"ce_{name}"] += self._ce(logprobs, targets)
            self._sums[f"kl_{name}"] += float(functional.kl_div(logprobs, reference, reduction="sum", log_target=True))

    @staticmethod
    def _ce(logprobs: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> float:
        return float(functional.nll_loss(logprobs, targets, reduction="sum", ignore_index=_NO_TARGET))

    def compute(self) -> dict[str, Any]:
        """Return the figures."""
        dead = int((self._fired == 0).sum())
        counts = {name: self._compared if name.startswith("kl") else self._predicted for name in self._sums}
        means = {name: value / counts[name] for name, value in self._sums.items()}
        return {
            "tokens": self._fit.rows,
            "l0": float(self._fired.sum() / self._fit.rows),
            "dead_fraction": dead / self._sae.d_sae,
            "dead_latents": dead,
            "d_sae": self._sae.d_sae,
            **self._fit.compute(),
            "ce_loss_without_sae": means["ce"],
            "ce_loss_with_sae": means["ce_sae"],
            "ce_loss_with_ablation": means["ce_zero"],
            "ce_loss_score": metrics.ce_loss_score(means["ce"], means["ce_sae"], means["ce_zero"]),
            "kl_div_with_sae": means["kl_sae"],
            "kl_div_with_ablation": means["kl_zero"],
            "kl_div_score": metrics.kl_div_score(means["kl_sae"], means["kl_zero"]),
        }


def _batches(
    side: Side, contexts: int, batch_prompts: int, device: torch.device
) -> Iterator[tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]]:
    """Read token ids and the mask of the tokens that count, with a bar."""
    with progress.bar("evaluate", contexts * side.ids.shape[1]) as bar:
        for start in range(0, contexts, batch_prompts):
            stop = min(start + batch_prompts, contexts)
            ids = torch.from_numpy(side.ids[start:stop].astype("int64")).to(device)
            counted = torch.from_numpy(side.ordinary_contexts(start, stop)).to(device)
            yield ids, counted
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
