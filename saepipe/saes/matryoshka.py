"""Matryoshka: BatchTopK whose first latents reconstruct alone as well, so that they stay general."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saepipe import sparse
from saepipe.errors import UserError
from saepipe.saes.base import SAEConfig
from saepipe.saes.batchtopk import BatchTopKConfig, BatchTopKSAE
from saepipe.saes.ranked import Kept


@dataclass
class MatryoshkaConfig(BatchTopKConfig):
    """Keys of the Matryoshka architecture."""

    architecture: str = "matryoshka"
    """Name of this file."""
    matryoshka_widths: list[int] | None = None
    """Widths of the nested autoencoders, rising, below d_sae; None is a 32nd, 3, 7 and 15 32nds of d_sae."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        widths = self.matryoshka_widths
        if widths is not None and (not widths or widths[0] < 1 or sorted(set(widths)) != widths):
            raise UserError(f"sae.matryoshka_widths={widths} do not rise; give widths such as [256,1024,4096], or null")

    def resolve(self, d_in: int) -> int:
        """Width of the SAE, which must hold the nested ones."""
        d_sae = super().resolve(d_in)
        if self.matryoshka_widths and self.matryoshka_widths[-1] > d_sae:
            raise UserError(
                f"sae.matryoshka_widths={self.matryoshka_widths} go beyond the {d_sae} latents there are; lower them"
            )
        return d_sae


class MatryoshkaSAE(BatchTopKSAE):
    """Matryoshka autoencoder: each inner width adds the error of what its latents reconstruct without the others.

    Source: Bussmann et al. 2025 (arXiv 2503.17547); the widths by default are the paper's.
    """

    config_class: ClassVar[type[SAEConfig]] = MatryoshkaConfig

    @property
    def inner_widths(self) -> list[int]:
        """Widths of the nested autoencoders without the whole one."""
        widths = self.cfg.matryoshka_widths or [self.d_sae * part // 32 for part in (1, 3, 7, 15)]
        return sorted({width for width in widths if 0 < width < self.d_sae})

    def _decoded(self, f: Tensor, kept: Kept, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode once: for each token, the latents of each width without those of the width before are a bag."""
        assert kept.offsets is not None
        widths, tokens = self.inner_widths, len(target)
        per_token = torch.diff(kept.offsets, append=kept.offsets.new_full((1,), len(f)))
        token = torch.repeat_interleave(per_token, output_size=len(f))
        part = torch.bucketize(kept.indices, kept.indices.new_tensor(widths), right=True)
        bags, order = (part * tokens + token).sort(stable=True)
        offsets = torch.searchsorted(bags, torch.arange((len(widths) + 1) * tokens, device=bags.device))
        parts = sparse.decode(f.index_select(0, order), kept.indices[order], self.W_dec, offsets)
        first, *others = parts.unflatten(0, (-1, tokens)).unbind()
        terms, reconstruction = {}, first + self.b_dec
        for width, part_of_it in zip(widths, others, strict=True):
            terms[f"inner_mse_loss_{width}"] = self._mse(target, reconstruction)
            reconstruction = reconstruction + part_of_it
        return reconstruction, terms
