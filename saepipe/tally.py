"""What is counted while an SAE is measured, and the figures that it comes to.

Every figure is made of sums over documents, so that shares of the work that several processes did add up to the same
figures, and each has a confidence interval over documents.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import metrics
from saepipe.document_sums import DocumentSums, Sums
from saepipe.redundancy import redundancy

DENSE = 0.1
"""A latent that fires on more than this share of the tokens is dense."""
SAMPLE_TOKENS = 8192
"""Tokens whose activations are kept for `saepipe.redundancy`."""
_NORM_FLOOR = 1e-4
"""Shorter activations are not divided by, as in SAELens."""
_DENSITY_EDGES = [-7 + quarter / 4 for quarter in range(29)]
_NORM_BINS = 32


class Tally:
    """Counts of one SAE.

    Args:
        d_sae: Number of its latents.
        centre: Roughly the mean of what it reconstructs: sums around it lose no digits.
    """

    def __init__(self, d_sae: int, centre: Float[Tensor, " d_out"]) -> None:
        self._d_sae, self._centre = d_sae, metrics.double(centre)
        self._sums = DocumentSums()
        self._offset = torch.zeros_like(self._centre)
        self._fired = torch.zeros(d_sae, dtype=torch.int64, device=centre.device)
        self._sample: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return self._fired.device

    @property
    def documents(self) -> int:
        """How many documents were counted."""
        return len(self._sums)

    def update(
        self,
        documents: Int[np.ndarray, " token"],
        f: Float[Tensor, "token d_sae"],
        y: Float[Tensor, "token d_out"],
        reconstruction: Float[Tensor, "token d_out"],
    ) -> None:
        """Add tokens.

        Args:
            documents: Number of each token's document.
            f: Activations of the latents.
            y: What is reconstructed.
            reconstruction: The reconstruction.
        """
        y = metrics.double(y)
        fit = metrics.token_fit(y, reconstruction)
        norm_in, norm_out = fit["squared"].sqrt(), fit["squared_reconstruction"].sqrt()
        around = y - self._centre.to(y.device)
        active = f > 0
        fit |= {
            "tokens": torch.ones_like(norm_in),
            "l0": active.sum(-1),
            "spread": around.square().sum(-1),
            "norm_in": norm_in,
            "norm_out": norm_out,
            "norm_ratio": norm_out / torch.where(norm_in < _NORM_FLOOR, 1.0, norm_in),
        }
        self._sums.add(documents, fit)
        self._offset += around.sum(0).to(self._offset.device)
        self._fired += active.sum(0)

    def keep(self, f: Float[Tensor, "token d_sae"]) -> None:
        """Keep the activations of some tokens, for `saepipe.redundancy`."""
        self._sample.append(f.to_sparse().cpu())

    def add_losses(self, documents: Int[np.ndarray, " token"], losses: Mapping[str, Tensor]) -> None:
        """Add what the model lost on tokens.

        Args:
            documents: Number of each token's document.
            losses: predicted and compared (1 where a token has a target, or counts for the divergence), ce, and ce_ and
                kl_ of sae, zero and mean.
        """
        self._sums.add(documents, losses)

    def merge(self, other: "Tally") -> None:
        """Add what another process counted of the same SAE."""
        self._sums.merge(other._sums)
        self._offset = self._offset + other._offset.to(self._offset.device)
        self._fired = self._fired + other._fired.to(self._fired.device)
        self._sample += other._sample

    def cpu(self) -> "Tally":
        """Move all to the CPU."""
        self._centre, self._offset, self._fired = self._centre.cpu(), self._offset.cpu(), self._fired.cpu()
        return self

    def figures(self) -> dict[str, Any]:
        """Return the figures alone."""
        found: dict[str, Any] = {name: float(value[0]) for name, value in self._figures(self._sums.total()).items()}
        dead = int((self._fired == 0).sum())
        dense = int((self._fired > DENSE * found["tokens"]).sum())
        return found | {
            "tokens": int(found["tokens"]),
            "d_sae": self._d_sae,
            "dead_latents": dead,
            "dead_fraction": dead / self._d_sae,
            "dense_latents": dense,
            "dense_fraction": dense / self._d_sae,
        }

    def compute(self, W_dec: Float[Tensor, "d_sae d_out"]) -> dict[str, Any]:
        """Return the figures, `confidence` (name -> [low, high]), `redundancy`'s measures and `histograms`.

        Args:
            W_dec: The SAE's decoder.
        """
        found = self.figures()
        intervals = self._sums.intervals(self._figures)
        intervals.pop("tokens", None)
        density = self._fired.double() / found["tokens"]
        lengths = metrics.double(W_dec).norm(dim=1)
        top = float(lengths.max()) or 1.0
        # The sample lies on the CPU until all is read: an SAE that is dense at the start would fill a GPU.
        sample = torch.cat(self._sample) if self._sample else torch.zeros(0, self._d_sae)
        return (
            found
            | redundancy(W_dec, sample.to(W_dec.device))
            | {
                "confidence": intervals,
                "histograms": {
                    "log10_density": metrics.histogram(density[density > 0].log10(), _DENSITY_EDGES),
                    "decoder_norm": metrics.histogram(lengths, np.linspace(0, top, _NORM_BINS + 1).tolist()),
                },
            }
        )

    def _figures(self, sums: Sums) -> Sums:
        """Compute figures from sums."""
        n = sums["tokens"]
        ce = {name: metrics.ratio(sums[name], sums["predicted"]) for name in ("ce", "ce_sae", "ce_zero", "ce_mean")}
        kl = {name: metrics.ratio(sums[name], sums["compared"]) for name in ("kl_sae", "kl_zero", "kl_mean")}
        # The mean of the draw would be a sum per dimension and document; that of all tokens is as good.
        offset = float((self._offset / float(self._sums.total()["tokens"][0])).square().sum())
        variance = np.maximum(sums["spread"] / n - offset, 0)
        return {
            "tokens": n,
            "l0": sums["l0"] / n,
            "mse": sums["error"] / n,
            "explained_variance": metrics.ratio(variance - sums["error"] / n, variance),
            "cosine_similarity": sums["cosine"] / n,
            "l2_norm_in": sums["norm_in"] / n,
            "l2_norm_out": sums["norm_out"] / n,
            "l2_ratio": sums["norm_ratio"] / n,
            "relative_reconstruction_bias": metrics.ratio(sums["squared_reconstruction"], sums["dot"]),
            "ce_loss_without_sae": ce["ce"],
            "ce_loss_with_sae": ce["ce_sae"],
            "ce_loss_with_ablation": ce["ce_zero"],
            "ce_loss_with_mean_ablation": ce["ce_mean"],
            "ce_loss_score": metrics.ce_loss_score(ce["ce"], ce["ce_sae"], ce["ce_zero"]),
            "ce_loss_score_mean_ablation": metrics.ce_loss_score(ce["ce"], ce["ce_sae"], ce["ce_mean"]),
            "kl_div_with_sae": kl["kl_sae"],
            "kl_div_with_ablation": kl["kl_zero"],
            "kl_div_with_mean_ablation": kl["kl_mean"],
            "kl_div_score": metrics.kl_div_score(kl["kl_sae"], kl["kl_zero"]),
            "kl_div_score_mean_ablation": metrics.kl_div_score(kl["kl_sae"], kl["kl_mean"]),
        }
