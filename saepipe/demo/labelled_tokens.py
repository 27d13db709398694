"""Tokens of the demo's corpus: what the language model makes of them, and what is true of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe.demo import corpus
from saepipe.language_model import LanguageModel


@dataclass(frozen=True)
class LabelledTokens:
    """Activations of a language model at one hook point, and what is true of their tokens."""

    activations: Float[Tensor, "token d"]
    """Without those of special tokens."""
    document: Int[Tensor, " token"]
    """Number of each token's document."""
    concepts: Int[Tensor, " pair"]
    """The concepts of the first token, then those of the second, and so on, as numbers of `names`."""
    n_concepts: Int[Tensor, " token"]
    """How many of them are each token's."""
    names: tuple[str, ...]
    """The labels of the corpus, sorted, then `token:<text>` for each token of the vocabulary."""
    n_labels: int
    """How many of the names are labels."""

    @classmethod
    def read(
        cls,
        model: LanguageModel,
        hook: str,
        documents: Iterable[corpus.Document],
        *,
        context_size: int = 128,
        batch_documents: int = 64,
    ) -> "LabelledTokens":
        """Run the model over documents, each in a context of its own: a BOS token and its first tokens.

        Args:
            model: The demo's language model.
            hook: Hook point whose activations the SAE reads.
            documents: The corpus's documents; those of another seed than training's are new to model and SAE.
            context_size: Tokens of a context, BOS among them; what a document has beyond them is not read.
            batch_documents: Documents of a forward pass.
        """
        labels = corpus.labels()
        vocabulary = [f"token:{text}" for text in model.tokenizer.batch_decode([[i] for i in range(model.vocab_size)])]
        number = {name: index for index, name in enumerate(labels)}
        ids: list[list[int]] = []
        concepts: list[int] = []
        n_concepts: list[int] = []
        for document in documents:
            encoded = model.tokenizer(
                document.text,
                return_offsets_mapping=True,
                add_special_tokens=False,
                truncation=True,
                max_length=context_size - 1,
            )
            of_tokens = corpus.token_labels(document, encoded["offset_mapping"])
            ids.append(encoded["input_ids"])
            for token, found in zip(ids[-1], of_tokens, strict=True):
                concepts += sorted(number[name] for name in found)
                concepts.append(len(labels) + token)
                n_concepts.append(len(found) + 1)
        batches = [ids[start : start + batch_documents] for start in range(0, len(ids), batch_documents)]
        captured = [_activations(model, hook, batch) for batch in batches]
        return cls(
            activations=torch.cat([torch.empty(0, model.width(hook)), *captured]),
            document=torch.repeat_interleave(torch.tensor([len(one) for one in ids], dtype=torch.int64)),
            concepts=torch.tensor(concepts, dtype=torch.int64),
            n_concepts=torch.tensor(n_concepts, dtype=torch.int64),
            names=(*labels, *vocabulary),
            n_labels=len(labels),
        )

    @cached_property
    def judging(self) -> Int[Tensor, " token"]:
        """0 for tokens of documents that choose, 1 for those that judge."""
        return self.document % 2

    @cached_property
    def frequency(self) -> Int[Tensor, "half concept"]:
        """Tokens of each half that each concept is on."""
        half = self.judging.repeat_interleave(self.n_concepts)
        counts = torch.bincount(half * len(self.names) + self.concepts, minlength=2 * len(self.names))
        return counts.view(2, -1)

    def of(self, tokens: Int[Tensor, " firing"]) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Look up the concepts of tokens, of which some may come several times.

        Returns:
            For each pair of one of them and a concept of it, its place among those given, and the concept.
        """
        counts = self.n_concepts[tokens]
        place = torch.repeat_interleave(counts)
        within = torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
        first = self.n_concepts.cumsum(0) - self.n_concepts
        return place, self.concepts[first[tokens[place]] + within]

    def shifted(self) -> "LabelledTokens":
        """Give each token the concepts of another one, half the corpus away: what agrees with these agrees by chance.

        The concepts stay as frequent as they are, and as bunched in documents; activations and documents stay.
        """
        order = (torch.arange(len(self.document)) + len(self.document) // 2) % max(len(self.document), 1)
        _, concepts = self.of(order)
        return LabelledTokens(
            self.activations, self.document, concepts, self.n_concepts[order], self.names, self.n_labels
        )


def _activations(model: LanguageModel, hook: str, documents: Sequence[Sequence[int]]) -> Float[Tensor, "token d"]:
    """Capture what follows the BOS tokens; the padding on the right is seen by no token before it."""
    lengths = torch.tensor([len(document) for document in documents])
    ids = torch.full((len(documents), 1 + int(lengths.max())), int(model.tokenizer.bos_token_id))
    for row, document in zip(ids, documents, strict=True):
        row[1 : 1 + len(document)] = torch.tensor(document, dtype=torch.int64)
    captured = model.capture(ids, [hook])[hook][:, 1:]
    return captured[torch.arange(captured.shape[1]) < lengths[:, None]].float().cpu()
