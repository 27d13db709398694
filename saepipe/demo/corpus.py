"""An endless corpus with ground-truth labels: eighteen registers, each written by its own grammar.

    from saepipe.demo.corpus import document, documents, token_labels
    document(0).text                              # random access: a pure function of (seed, index)
    token_labels(document(0), offsets)            # the labels of every token of a tokenizer

Every label is right by construction (the grammar writes text and spans together), so a feature of a sparse
autoencoder can be scored against the truth. Standard library only.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from saepipe.demo.grammar import Span, Writer
from saepipe.demo.labels import LABELS
from saepipe.demo.registers import REGISTERS

__all__ = ["Document", "Span", "document", "documents", "labels", "token_labels"]

_REGISTER_NAMES = tuple(REGISTERS)

# Labels that follow from the characters alone.
_CHARACTERS = {
    "digit": r"[0-9]+",
    "case:capitalised": r"\b[A-Z][a-z]+",
    "case:upper": r"\b[A-Z]{2,}\b",
    "punctuation:period": r"\.",
    "punctuation:comma": r",",
    "punctuation:colon": r":",
    "punctuation:semicolon": r";",
    "punctuation:question": r"\?",
    "punctuation:exclamation": r"!",
    "punctuation:quote": r'"',
    "punctuation:parenthesis": r"[()]",
    "punctuation:bracket": r"[\[\]{}<>]",
    "punctuation:dash": r"-",
    "punctuation:slash": r"/",
    "punctuation:underscore": r"_",
    "newline": r"\n+",
}
_LABEL_OF_GROUP: dict[int | None, str] = dict(enumerate(_CHARACTERS, start=1))
_CHARACTER_PATTERN = re.compile("|".join(f"({pattern})" for pattern in _CHARACTERS.values()))


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its truth.

    Attributes:
        text: what a tokenizer sees, usually 200 to 1,500 characters.
        register: its kind, the label `register:<register>` of all its tokens.
        spans: the labelled ranges of characters, sorted; they may nest and overlap.
    """

    text: str
    register: str
    spans: tuple[Span, ...]


def document(index: int, seed: int = 0) -> Document:
    """The document at `index` of the corpus `seed`: the same on every machine and Python version."""
    writer = Writer(f"{seed}/{index}")
    register = writer.pick(_REGISTER_NAMES)
    REGISTERS[register](writer)
    text = writer.text()
    spans = writer.spans
    for match in _CHARACTER_PATTERN.finditer(text):
        spans.append(Span(*match.span(), _LABEL_OF_GROUP[match.lastindex]))
    spans.sort()
    return Document(text, register, tuple(spans))


def documents(seed: int = 0, start: int = 0) -> Iterator[Document]:
    """The documents of a corpus from index `start` on, without end."""
    index = start
    while True:
        yield document(index, seed)
        index += 1


@cache
def labels() -> tuple[str, ...]:
    """All names of labels, sorted."""
    return tuple(sorted((*LABELS, *_CHARACTERS, *(f"register:{name}" for name in REGISTERS))))


def token_labels(document: Document, offsets: Sequence[tuple[int, int]]) -> list[frozenset[str]]:
    """The labels of each token.

    Args:
        document: the document that was tokenized.
        offsets: start and end character of each token, in order, as a tokenizer's `offset_mapping`. Tokens of no
            width (special tokens) get no labels. A tokenizer of bytes may cut a character in several tokens: each of
            them carries the whole character's offsets and labels.

    Returns:
        A set per token: `register:<register>` and the label of every span that shares a character with the token.
    """
    tokens = [index for index, (start, end) in enumerate(offsets) if end > start]
    ends = [offsets[index][1] for index in tokens]
    found: list[set[str]] = [set() for _ in offsets]
    for index in tokens:
        found[index].add(f"register:{document.register}")
    for start, end, label in document.spans:
        position = bisect_right(ends, start)
        while position < len(tokens) and offsets[tokens[position]][0] < end:
            found[tokens[position]].add(label)
            position += 1
    return [frozenset(names) for names in found]
