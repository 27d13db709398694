"""What the feature page says of each latent, put together from its activity, its decoder row and the text."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor

from saepipe import neighbours
from saepipe.feature_page import Band, Excerpt, Latent
from saepipe.kept_contexts import AFTER, BEFORE, Peaks
from saepipe.language_model import LanguageModel
from saepipe.latents import STRATA, Contexts, LatentActivity
from saepipe.logit_lens import LogitEffects, logit_effects, missing
from saepipe.saes.base import SAE
from saepipe.token_text import TokenText

BANDS, PER_BAND = 4, 2
"""Ranges of a latent's activations to show contexts from, and how many of each."""
_TOKENS, _NEIGHBOURS, _WORDS = 8, 6, 3
"""Tokens of the logit lens of either kind, neighbours, and words in a label."""


@dataclass(frozen=True)
class Features:
    """All that is known of the latents of an SAE."""

    contexts: Contexts
    activity: LatentActivity
    text: TokenText
    live: list[int]
    """Latents that fired, by rising number."""
    cosines: Float[Tensor, "live n"]
    """Those of each live latent's nearest neighbours among them."""
    nearest: Int[Tensor, "live n"]
    """Places of those neighbours in `live`."""
    effects: LogitEffects | None
    """What each live latent does to the logits; None where that cannot be told."""
    without_effects: str | None
    """Why not."""

    @classmethod
    def gather(cls, model: LanguageModel, sae: SAE, contexts: Contexts, activity: LatentActivity) -> "Features":
        """Look at the decoder of an SAE too.

        Args:
            model: The language model.
            sae: The SAE.
            contexts: What was read.
            activity: What the latents did there.
        """
        live = activity.fired.nonzero().squeeze(1)
        cosines, nearest = neighbours.nearest(sae.W_dec[live], _NEIGHBOURS)
        why = missing(model, sae)
        effects = None if why else logit_effects(model, sae, live, _TOKENS)
        text = TokenText(model.tokenizer)
        return cls(contexts, activity, text, live.tolist(), cosines.cpu(), nearest.cpu(), effects, why)

    def of(self, latents: list[int], labels: Mapping[int, str]) -> Iterator[Latent]:
        """Go through some latents that fired.

        Args:
            latents: Their numbers.
            labels: Those that somebody has named; the others are called by the tokens on which they are strongest.
        """
        place = {latent: at for at, latent in enumerate(self.live)}
        densities = (self.activity.fired.double() / max(self.activity.tokens, 1)).tolist()
        histogram, tops = self.activity.histogram.cpu(), self.activity.histogram_top.tolist()
        maxima, typical = self.activity.maxima.tolist(), self.activity.typical.tolist()
        kept = [_on_cpu(peaks) for peaks in (self.activity.top, self.activity.strata, self.activity.sampled)]
        for latent in latents:
            top, strata, sampled = (peaks[latent] for peaks in kept)
            excerpts = self._excerpts(top)
            at = place[latent]
            yield Latent(
                index=latent,
                density=densities[latent],
                maximum=maxima[latent],
                typical=typical[latent],
                histogram=histogram[latent].tolist(),
                histogram_top=tops[latent],
                top=excerpts,
                bands=[Band(low, self._excerpts(drawn)) for low, drawn in _bands(strata, tops[latent], maxima[latent])],
                sampled=self._excerpts(sampled),
                label=labels.get(latent) or _label(excerpts),
                promoted=self._tokens(at, maxima[latent], "promoted"),
                suppressed=self._tokens(at, maxima[latent], "suppressed"),
                neighbours=[
                    (self.live[other], cosine)
                    for other, cosine in zip(self.nearest[at].tolist(), self.cosines[at].tolist(), strict=True)
                ],
            )

    def _excerpts(self, peaks: Peaks) -> list[Excerpt]:
        """Cut the texts of kept contexts."""
        columns = (peaks.keys, peaks.contexts, peaks.positions, peaks.windows)
        found = zip(*(column.tolist() for column in columns), strict=True)
        return [self._excerpt(*place) for key, *place in found if key >= 0]

    def _excerpt(self, context: int, position: int, window: list[float]) -> Excerpt:
        ids = self.contexts.ids(context)
        start, stop = max(0, position - BEFORE), min(len(ids), position + AFTER + 1)
        seen = window[start - position + BEFORE : stop - position + BEFORE]
        shown = [(piece, max(seen[piece.start : piece.stop])) for piece in self.text.pieces(ids[start:stop])]
        while shown and shown[0][0].broken and not shown[0][1]:  # the cut went through a character
            shown.pop(0)
        while shown and shown[-1][0].broken and not shown[-1][1]:
            shown.pop()
        return Excerpt([(piece.text, activation) for piece, activation in shown])

    def _tokens(self, at: int, maximum: float, kind: str) -> list[tuple[str, float]]:
        if self.effects is None:
            return []
        effects: Tensor = getattr(self.effects, kind)
        ids: Tensor = getattr(self.effects, f"{kind}_ids")
        found = zip(ids[at].tolist(), effects[at].tolist(), strict=True)
        return [("".join(piece.text for piece in self.text.pieces([id])), maximum * effect) for id, effect in found]


def _on_cpu(peaks: Peaks) -> Peaks:
    return Peaks(**{name: tensor.cpu() for name, tensor in vars(peaks).items()})


def _bands(strata: Peaks, top: float, maximum: float) -> list[tuple[float, Peaks]]:
    """Choose contexts from ranges of a latent's activations, the strongest range first, by their random keys.

    A range is of whole strata, so that contexts are drawn from it wherever it has any.

    Args:
        strata: A context of each stratum.
        top: Upper end of the last stratum.
        maximum: The latent's strongest activation, in the last range.

    Returns:
        Lower end of each range, and its contexts, the strongest first.
    """
    used = min(int(maximum * STRATA / top), STRATA - 1) + 1
    edges = [round(used * band / BANDS) for band in range(BANDS + 1)]
    drawn = []
    for low, high in reversed(list(pairwise(edges))):
        chosen = low + strata.keys[low:high].argsort(descending=True)[:PER_BAND]
        drawn.append((low * top / STRATA, strata[chosen[strata.values[chosen].argsort(descending=True)]]))
    return drawn


def _label(excerpts: list[Excerpt]) -> str:
    """Name a latent by the tokens that it is strongest on in its top contexts, the most frequent ones first."""
    strongest = (excerpt.strongest[0] for excerpt in excerpts)
    counted = Counter(text.strip() or "␣" * len(text) for text in strongest)
    return " · ".join(text for text, _ in counted.most_common(_WORDS))
