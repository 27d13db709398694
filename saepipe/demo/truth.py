"""What the latents of an SAE detect, against the labels of the demo's corpus.

    tokens = LabelledTokens.read(model, hook, islice(documents(seed=777), 4000))
    truth = Truth(Firings.of(sae, tokens.activations), tokens)
    found = truth.judge(0.5)
    found.share, found.concept_of(17), truth.best_latents()

A concept is a label of the corpus or, where wanted, the identity of the token. Documents of even number choose (a
latent's maximum, its concept, a label's latent), those of odd number judge, so no figure is of the documents that chose
what it is about. `docs/acceptance.md` says why it is measured so, and what it does not show.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepipe.demo.labelled_tokens import LabelledTokens
from saepipe.saes.base import SAE

PRECISION = 0.8
"""Least precision for its concept at which a latent is monosemantic."""
DOCUMENTS = 5
"""Documents of each half in which a latent has to be active to be judged. All tokens of a document share its register
and topic, so a latent that is active in one document alone agrees with them whatever it detects."""
THRESHOLDS = (0.0, 0.25, 0.5)
"""Shares of a latent's maximum above which its activations count; 0 is every firing."""
LABEL_TOKENS = 20
"""Tokens of each half that a label has to be on for `Truth.best_latents` to look for its latent."""
_CHUNK = 1 << 20  # firings whose concepts are counted at once: about 100 MB


@dataclass(frozen=True)
class Firings:
    """Every activation of an SAE's latents that is above 0: which latent, on which token, how strongly."""

    token: Int[Tensor, " firing"]
    latent: Int[Tensor, " firing"]
    value: Float[Tensor, " firing"]
    d_sae: int

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SAE, activations: Float[Tensor, "token d"], *, batch_tokens: int = 4096) -> "Firings":
        """Encode activations, some tokens at a time. A firing takes 20 bytes, so a token L0 times as many."""
        tokens, latents, values = [], [], []
        for start in range(0, len(activations), batch_tokens):
            f = sae.encode(activations[start : start + batch_tokens].to(sae.W_dec.device)).cpu()
            token, latent = (f > 0).nonzero(as_tuple=True)
            tokens.append(token + start)
            latents.append(latent)
            values.append(f[token, latent])
        none = torch.empty(0, dtype=torch.int64)
        return cls(
            torch.cat([none, *tokens]), torch.cat([none, *latents]), torch.cat([none.float(), *values]), sae.d_sae
        )

    def only(self, chosen: Bool[Tensor, " firing"]) -> "Firings":
        """Keep some of them."""
        return Firings(self.token[chosen], self.latent[chosen], self.value[chosen], self.d_sae)


@dataclass(frozen=True)
class Concepts:
    """The concept of each latent, chosen by one half of the documents, and how well it fits in the other half."""

    names: tuple[str, ...]
    chosen: Int[Tensor, " d_sae"]
    """Number of the concept in `names`; meaningless where a latent is not judged."""
    precision: Float[Tensor, " d_sae"]
    """Share of a latent's activations that are on its concept."""
    recall: Float[Tensor, " d_sae"]
    """Share of its concept's tokens on which the latent is active."""
    live: Bool[Tensor, " d_sae"]
    """Latents that fired at all, in either half."""
    judged: Bool[Tensor, " d_sae"]
    """Latents that are active in enough documents of both halves."""
    counted: float
    """Share of all firings that are above the threshold."""

    @property
    def monosemantic(self) -> Bool[Tensor, " d_sae"]:
        """Latents of a precision of at least `PRECISION`; a live one that cannot be judged is none."""
        return self.judged & (self.precision >= PRECISION)

    @property
    def share(self) -> float:
        """Share of the live latents that are monosemantic; NaN without any."""
        return float(self.monosemantic.sum() / self.live.sum())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share, for latents drawn from many such SAEs (Wilson 1927)."""
        n, z = int(self.live.sum()), 1.96
        if not n:
            return 0.0, 1.0
        middle = (self.share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * (self.share * (1 - self.share) / n + z**2 / (4 * n**2)) ** 0.5
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def concept_of(self, latent: int) -> str | None:
        """Name what a latent detects; None where it is not monosemantic."""
        return self.names[int(self.chosen[latent])] if self.monosemantic[latent] else None


@dataclass(frozen=True)
class LabelLatent:
    """The latent that tells best where a label is."""

    label: str
    latent: int
    threshold: float
    """Share of the latent's maximum above which it counts as active; also chosen."""
    f1: float
    """On the half of the documents that did not choose."""
    frequency: float
    """Share of the tokens that the label is on."""


class Truth:
    """Compares firings with what is true of their tokens."""

    def __init__(self, firings: Firings, tokens: LabelledTokens) -> None:
        """Find each latent's maximum in the half that chooses.

        Args:
            firings: Of the activations of `tokens`.
            tokens: What is true of them.
        """
        self._firings, self._tokens = firings, tokens
        self._counted: dict[float, _Counts] = {}
        choosing = firings.only(tokens.judging[firings.token] == 0)
        self._maxima = torch.zeros(firings.d_sae).scatter_reduce_(0, choosing.latent, choosing.value, "amax")
        self.live = torch.bincount(firings.latent, minlength=firings.d_sae) > 0
        """Latents that fired at all."""

    def judge(self, threshold: float, *, identity: bool = False) -> Concepts:
        """Choose each latent's concept, that of the highest precision in one half, and measure it in the other half.

        Args:
            threshold: Share of a latent's maximum above which its activations count.
            identity: Whether the identity of the token is a concept, too, beside the labels.
        """
        counts = self._counts(threshold)
        together = counts.together if identity else counts.together[..., : self._tokens.n_labels]
        frequency = self._tokens.frequency[:, : together.shape[-1]]
        precision = together / counts.fired[..., None].clamp(min=1)
        recall = together / frequency[:, None].clamp(min=1)
        chosen = (precision[0] + 1e-4 * recall[0]).argmax(1, keepdim=True)  # of equal ones, that of the higher recall
        return Concepts(
            names=self._tokens.names,
            chosen=chosen[:, 0],
            precision=precision[1].gather(1, chosen)[:, 0],
            recall=recall[1].gather(1, chosen)[:, 0],
            live=self.live,
            judged=(counts.documents >= DOCUMENTS).all(0),
            counted=int(counts.fired.sum()) / max(len(self._firings.token), 1),
        )

    def best_latents(self) -> list[LabelLatent]:
        """For each label that is frequent enough, find the latent and the threshold of the highest F1."""
        n_labels = self._tokens.n_labels
        frequency = self._tokens.frequency[:, :n_labels]
        scores = []
        for threshold in THRESHOLDS:
            counts = self._counts(threshold)
            on_either = counts.fired[..., None] + frequency[:, None]
            scores.append(2 * counts.together[..., :n_labels] / on_either.clamp(min=1))
        f1 = torch.stack(scores, 1)  # half, threshold, latent, label
        best = f1[0].flatten(0, 1).argmax(0)
        held = f1[1].flatten(0, 1).gather(0, best[None])[0]
        shares = (frequency.sum(0) / max(len(self._tokens.document), 1)).tolist()
        return [
            LabelLatent(
                self._tokens.names[label],
                int(best[label]) % self._firings.d_sae,
                THRESHOLDS[int(best[label]) // self._firings.d_sae],
                float(held[label]),
                shares[label],
            )
            for label in (frequency >= LABEL_TOKENS).all(0).nonzero().squeeze(1).tolist()
        ]

    def _counts(self, threshold: float) -> "_Counts":
        if threshold not in self._counted:
            self._counted[threshold] = self._count(threshold)
        return self._counted[threshold]

    def _count(self, threshold: float) -> "_Counts":
        firings, tokens = self._firings, self._tokens
        active = firings.only(firings.value > threshold * self._maxima[firings.latent])
        n, d_sae = len(tokens.names), firings.d_sae
        row = tokens.judging[active.token] * d_sae + active.latent
        together = torch.zeros(2 * d_sae * n, dtype=torch.int32)
        for some, token in zip(row.split(_CHUNK), active.token.split(_CHUNK), strict=True):
            place, concept = tokens.of(token)
            together.index_add_(0, some[place] * n + concept, torch.ones_like(concept, dtype=torch.int32))
        in_documents = (tokens.document[active.token] * d_sae + active.latent).unique()
        place = in_documents // d_sae % 2 * d_sae + in_documents % d_sae
        fired, documents = (torch.bincount(one, minlength=2 * d_sae).view(2, d_sae) for one in (row, place))
        return _Counts(together.view(2, d_sae, n), fired, documents)


@dataclass(frozen=True)
class _Counts:
    """What is counted of each half's activations above a threshold."""

    together: Int[Tensor, "half d_sae concept"]
    """Activations of a latent on tokens of a concept."""
    fired: Int[Tensor, "half d_sae"]
    """Activations of a latent."""
    documents: Int[Tensor, "half d_sae"]
    """Documents that hold any of them."""
