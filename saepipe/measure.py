"""What an SAE is worth on held-out tokens: reconstruction, sparsity, and what the language model loses by it.

The model reads every context three times: as it is, with the SAE's reconstruction spliced in, and with zeros there. A
transcoder reads one hook point; what it predicts of another is compared and spliced in there, as are the zeros.
Special tokens and position 0 are left out of every figure: their activations are never replaced, and what is predicted
from them is not counted.
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
    """
    target_hook = target_hook or hook
    seq = side.ids.shape[1]
    contexts = min(len(side), max(1, most_tokens // seq))
    fit = metrics.ReconstructionFit(sae.d_out)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=model.device)
    sums = dict.fromkeys(("ce", "ce_sae", "ce_zero", "kl_sae", "kl_zero"), 0.0)
    predicted = 0
    for ids, counted in _batches(side, contexts, batch_prompts, model.device):
        clean, activations = _logits_and_activations(model, ids, {hook, target_hook})
        x = activations[hook][counted]
        features = sae.encode(x)
        reconstruction = sae.decode(features, x)
        fit.update(activations[target_hook][counted], reconstruction)
        fired += (features > 0).sum(0)
        spliced = model.logits(ids, {target_hook: _replacing(counted, reconstruction)})
        zeroed = model.logits(ids, {target_hook: _replacing(counted, torch.zeros_like(reconstruction))})
        # A prediction counts where the activation that it is made from was replaced; the last token has no target.
        here = counted[:, :-1]
        targets = ids[:, 1:][here]
        predicted += len(targets)
        reference = clean[:, :-1][here].float().log_softmax(-1)
        sums["ce"] += float(functional.nll_loss(reference, targets, reduction="sum"))
        for name, logits in (("sae", spliced), ("zero", zeroed)):
            logprobs = logits[:, :-1][here].float().log_softmax(-1)
            sums[f"ce_{name}"] += float(functional.nll_loss(logprobs, targets, reduction="sum"))
            sums[f"kl_{name}"] += float(functional.kl_div(logprobs, reference, reduction="sum", log_target=True))
    dead = int((fired == 0).sum())
    means = {name: value / predicted for name, value in sums.items()}
    return {
        "tokens": fit.rows,
        "contexts": contexts,
        "documents": len(set(side.documents[:contexts].reshape(-1).tolist())),
        "l0": float(fired.sum() / fit.rows),
        "dead_fraction": dead / sae.d_sae,
        "dead_latents": dead,
        "d_sae": sae.d_sae,
        **fit.compute(),
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
