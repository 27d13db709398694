"""A template grammar that writes text and its labelled spans together, so that offsets are right by construction.

A grammar maps symbols to what they expand to:

    Grammar({
        "animal|entity:animal": "cat, dog, fox",                     # a string: words, the early ones more frequent
        "meeting": ["{^a+animal} met {the_other}.", "Nobody came."],  # a list: templates, equally likely
        "the_other": ["the {animal@friend|role:object}"],
    })

A slot `{^a+symbol@name|label,label}` expands `symbol`; all but the symbol is optional:
`^` capitalises the first letter; `a+` puts "a" or "an" before it; `@name` remembers what was written and writes the
same again wherever the name returns in the document; the labels are put on the text written. `{.symbol}` expands
`<topic>.symbol` for the document's topic. Labels after a `|` in a grammar's key go on every expansion of the symbol.
Closed-class words (determiners, prepositions ...) in templates and words are labelled by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")

CLOSED_CLASS = {
    "role:determiner": "the a an this these every each some no another any both all such",
    "role:pronoun": "he she it they we you I him them us me who nobody everyone nothing",
    "role:possessive": "his my your our their its",
    "role:preposition": "of in on at by with from under over near into through behind beside between across without "
    "against along until during after before toward towards around above beneath beyond upon",
    "role:conjunction": "and or but because while although if when so nor yet unless as",
    "role:auxiliary": "is are was were be been has have had will would can could may might shall should must do does "
    "did",
    "role:negation": "not never don't didn't can't won't isn't wasn't couldn't",
}

_CLASS_OF_WORD = {word: label for label, words in CLOSED_CLASS.items() for word in words.split()}
_WORD = re.compile(r"\b(?!no\.)[A-Za-z']+")  # "order no. 7" has no determiner
_SLOT = re.compile(r"\{(\^?)(a\+)?(\.?\w+)(?:@(\w+))?(?:\|([^}]+))?\}")
# Words that start with a vowel letter and a consonant sound, and the other way round.
_SOUNDS_LIKE_CONSONANT = ("uni", "use", "eu", "one", "ut")
_SOUNDS_LIKE_VOWEL = ("hour", "honest", "heir")


class Span(NamedTuple):
    """A labelled range of characters: `text[start:end]` is a `label`. A tuple, since millions are built."""

    start: int
    end: int
    label: str


Terminal = tuple[str, tuple[Span, ...]]
"""Text and its spans, relative to its own start."""


class Writer:
    """Builds one document: its text, its spans, and what it has to remember on the way.

    Args:
        key: seeds every choice of the document. `random.Random` of a string, and its `random()`, are the same in all
            Python versions; its other methods are not promised to be, so every choice goes through `random()`.
    """

    def __init__(self, key: str) -> None:
        self.random: Callable[[], float] = Random(key).random
        self.parts: list[str] = []
        self.spans: list[Span] = []
        self.length = 0
        self.memory: dict[str, Terminal] = {}
        self.topic = ""

    def text(self) -> str:
        """What was written so far."""
        return "".join(self.parts)

    def integer(self, low: int, high: int) -> int:
        """A uniform integer in [low, high]."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, uniformly."""
        return items[int(self.random() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Several different items, in random order."""
        pool = list(items)
        return [pool.pop(int(self.random() * len(pool))) for _ in range(min(count, len(pool)))]

    def add(self, text: str, *labels: str) -> None:
        """Writes text, each label over all of it."""
        start = self.length
        self.parts.append(text)
        self.length = end = start + len(text)
        for label in labels:
            self.spans.append(Span(start, end, label))

    def emit(self, terminal: Terminal) -> None:
        """Writes a text that brings its own spans."""
        text, pieces = terminal
        start = self.length
        self.parts.append(text)
        self.length = start + len(text)
        for piece in pieces:
            self.spans.append(Span(start + piece[0], start + piece[1], piece[2]))

    def label_from(self, start: int, *labels: str) -> None:
        """Labels what was written since `start`, a former `length`."""
        for label in labels:
            self.spans.append(Span(start, self.length, label))

    def remember(self, name: str, text: str, *labels: str) -> str:
        """Binds `{...@name}` to a text, without writing it."""
        self.memory[name] = (text, tuple(Span(0, len(text), label) for label in labels))
        return text


Node = Callable[[Writer], None]


class Grammar:
    """Compiled rules; `grammar.write(writer, "symbol")` expands one.

    Args:
        rules: what each symbol expands to (see the module's docstring).
        parent: a grammar whose symbols may be used as well.
        closed_class: label closed-class words.
    """

    def __init__(
        self,
        rules: Mapping[str, str | Sequence[str]],
        parent: Grammar | None = None,
        closed_class: bool = True,
    ) -> None:
        self._nodes: dict[str, Node] = dict(parent._nodes) if parent else {}
        self._words: dict[str, tuple[str, ...]] = dict(parent._words) if parent else {}
        self._closed_class = closed_class
        pending: list[tuple[list[tuple[Node, ...]], Sequence[str]]] = []
        for key, value in rules.items():
            symbol, _, label_text = key.partition("|")
            labels = tuple(label_text.split(",")) if label_text else ()
            if isinstance(value, str):
                words = tuple(" ".join(word.split()) for word in value.split(","))
                self._words[symbol] = words
                self._nodes[symbol] = _words([self._terminal(word, labels) for word in words])
            else:
                alternatives: list[tuple[Node, ...]] = []
                pending.append((alternatives, value))
                self._nodes[symbol] = _labelled(_rule(alternatives), labels)
        for alternatives, templates in pending:  # second pass: a rule may use a symbol that comes after it
            alternatives += [self._compile(template) for template in templates]

    def write(self, writer: Writer, symbol: str, *labels: str) -> None:
        """Expands a symbol at the writer's end, each label over all of it."""
        start = writer.length
        self._nodes[symbol](writer)
        writer.label_from(start, *labels)

    def line(self, writer: Writer, symbol: str) -> None:
        """Expands a symbol and ends the line."""
        self._nodes[symbol](writer)
        writer.add("\n")

    def repeat(self, writer: Writer, symbol: str, low: int, high: int, separator: str = " ") -> None:
        """Expands a symbol `low` to `high` times."""
        node = self._nodes[symbol]
        for position in range(writer.integer(low, high)):
            if position:
                writer.add(separator)
            node(writer)

    def words(self, symbol: str) -> tuple[str, ...]:
        """The words of a word list."""
        return self._words[symbol]

    def _terminal(self, text: str, labels: tuple[str, ...] = ()) -> Terminal:
        pieces = [Span(0, len(text), label) for label in labels]
        # A single word whose list says what it is has no second class: the month May, the adverb "so".
        is_classed = " " not in text and any(label.startswith(("role:", "entity:")) for label in labels)
        if self._closed_class and not is_classed:
            for match in _WORD.finditer(text):
                word = match.group()
                label = _CLASS_OF_WORD.get(word) or _CLASS_OF_WORD.get(word.lower())
                if label:
                    pieces.append(Span(match.start(), match.end(), label))
        return text, tuple(pieces)

    def _compile(self, template: str) -> tuple[Node, ...]:
        nodes: list[Node] = []
        position = 0
        for match in _SLOT.finditer(template):
            if match.start() > position:
                nodes.append(_literal(self._terminal(template[position : match.start()])))
            nodes.append(self._slot(*match.groups()))
            position = match.end()
        if position < len(template):
            nodes.append(_literal(self._terminal(template[position:])))
        return tuple(nodes)

    def _slot(self, capital: str, article: str | None, symbol: str, name: str | None, labels: str | None) -> Node:
        if symbol.startswith("."):
            suffix = "_" + symbol[1:]
            topics = {key.removesuffix(suffix): node for key, node in self._nodes.items() if key.endswith(suffix)}
            node = _by_topic(topics)
        else:
            node = self._nodes[symbol]
        if name:
            node = _remembered(node, name)
        if labels:
            node = _labelled(node, tuple(labels.split(",")))
        if article:
            node = _with_article(node)
        return _capitalised(node) if capital else node


def _literal(terminal: Terminal) -> Node:
    if terminal[1]:
        return lambda writer: writer.emit(terminal)
    text = terminal[0]
    size = len(text)

    def write(writer: Writer) -> None:
        writer.parts.append(text)
        writer.length += size

    return write


def _words(terminals: list[Terminal]) -> Node:
    count = len(terminals)

    def write(writer: Writer) -> None:
        draw = writer.random()
        # The square favours the front of the list: word frequencies in real text are skewed as well.
        text, pieces = terminals[int(draw * draw * count)]
        start = writer.length
        writer.parts.append(text)
        writer.length = start + len(text)
        for piece in pieces:
            writer.spans.append(Span(start + piece[0], start + piece[1], piece[2]))

    return write


def _rule(alternatives: list[tuple[Node, ...]]) -> Node:
    def write(writer: Writer) -> None:
        for node in alternatives[int(writer.random() * len(alternatives))]:
            node(writer)

    return write


def _by_topic(nodes: dict[str, Node]) -> Node:
    return lambda writer: nodes[writer.topic](writer)


def _labelled(node: Node, labels: tuple[str, ...]) -> Node:
    if not labels:
        return node

    def write(writer: Writer) -> None:
        start = writer.length
        node(writer)
        writer.label_from(start, *labels)

    return write


def _remembered(node: Node, name: str) -> Node:
    def write(writer: Writer) -> None:
        known = writer.memory.get(name)
        if known is not None:
            writer.emit(known)
            return
        start, first_part, first_span = writer.length, len(writer.parts), len(writer.spans)
        node(writer)
        pieces = tuple(Span(s - start, e - start, label) for s, e, label in writer.spans[first_span:])
        writer.memory[name] = ("".join(writer.parts[first_part:]), pieces)

    return write


def _capitalised(node: Node) -> Node:
    def write(writer: Writer) -> None:
        first = len(writer.parts)
        node(writer)
        text = writer.parts[first]
        writer.parts[first] = text[0].upper() + text[1:]

    return write


def _with_article(node: Node) -> Node:
    def write(writer: Writer) -> None:
        writer.add("a", "role:determiner")
        writer.add(" ")
        first_part, first_span = len(writer.parts), len(writer.spans)
        node(writer)
        if _takes_an(writer.parts[first_part]):
            writer.parts[first_part - 2] = "an"
            writer.length += 1
            article = writer.spans[first_span - 1]
            writer.spans[first_span - 1] = Span(article.start, article.end + 1, article.label)
            moved = [Span(start + 1, end + 1, label) for start, end, label in writer.spans[first_span:]]
            writer.spans[first_span:] = moved

    return write


def _takes_an(text: str) -> bool:
    word = text.lower()
    if word.startswith(_SOUNDS_LIKE_VOWEL):
        return True
    return word[0] in "aeiou" and not word.startswith(_SOUNDS_LIKE_CONSONANT)
