"""The names of the labels that the registers and their grammar write.

Labels that follow from characters alone (`digit`, `punctuation:comma`, ...) stand in `corpus.py` beside their patterns.
"""

from __future__ import annotations

_GROUPS = {
    # Grammar: the closed classes are labelled everywhere in prose, open classes where the grammar knows the role.
    "role": "subject object verb noun adjective adverb determiner pronoun possessive preposition conjunction auxiliary "
    "negation",
    "entity": "person place organisation team animal food profession date time number unit money temperature email",
    # `sentiment` is on the judging words, `mood` on all the passage.
    "sentiment": "positive negative",
    "mood": "positive negative",
    "topic": "sea forest city farm castle desert",
    "quote": "inside",
    "poem": "title rhyme",
    "recipe": "title ingredient action nutrition",
    "legal": "party obligation heading section",
    "letter": "sender recipient subject closing",
    "http": "method path version header value body status reason success error",
    "log": "timestamp level component message problem",
    "dna": "header promoter gene repeat protein",
    "arithmetic": "operand operator step result comparison",
    "code": "keyword identifier definition call type string number operator comment docstring indent",
    "hebrew": "masculine feminine",
    "dialogue": "speaker",
    "review": "topic rating",
    "encyclopedia": "headword capital latin",
    "weather": "condition",
    "sport": "score minute",
    "json": "key string number literal",
    "csv": "header cell number total",
}

LABELS: tuple[str, ...] = (
    "colour",
    "hebrew",
    *(f"{group}:{name}" for group, names in _GROUPS.items() for name in names.split()),
)
