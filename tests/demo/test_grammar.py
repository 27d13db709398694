"""The template grammar: articles, capitals, memory and topics, with spans that stay on their words."""

from __future__ import annotations

import pytest

from saepipe.demo.grammar import Grammar, Span, Writer


def written(rules: dict[str, str | list[str]], topic: str = "") -> tuple[str, dict[str, str]]:
    """The text of `start`, and what each label is on."""
    writer = Writer("key")
    writer.topic = topic
    Grammar(rules).write(writer, "start")
    return writer.text(), {label: writer.text()[start:end] for start, end, label in writer.spans}


@pytest.mark.parametrize(("word", "article"), [("cat", "A"), ("owl", "An"), ("hour", "An"), ("university", "A")])
def test_an_article_fits_its_word_and_moves_the_spans_behind_it(word: str, article: str) -> None:
    text, labels = written({"start": ["Oh. {^a+thing|role:subject} of mine"], "thing|role:noun": word})
    assert text == f"Oh. {article} {word} of mine"
    assert labels == {
        "role:determiner": article,
        "role:noun": word,
        "role:subject": word,
        "role:preposition": "of",
    }


def test_a_remembered_word_returns_with_its_labels() -> None:
    writer = Writer("key")
    grammar = Grammar({"start": ["{name@hero} {name@hero} {name@hero}"], "name|entity:person": "Ann, Bea, Cleo, Dora"})
    grammar.write(writer, "start")
    first, second, third = writer.text().split()
    assert first == second == third
    assert writer.spans[1] == Span(len(first) + 1, 2 * len(first) + 1, "entity:person")


def test_a_bound_name_is_written_as_it_was_bound() -> None:
    writer = Writer("key")
    writer.remember("hero", "Zoe", "entity:person")
    Grammar({"start": ["{name@hero}"], "name": "Ann"}).write(writer, "start")
    assert (writer.text(), writer.spans) == ("Zoe", [Span(0, 3, "entity:person")])


def test_the_topic_chooses_the_words() -> None:
    rules: dict[str, str | list[str]] = {"start": ["a {.thing}"], "sea_thing": "boat", "farm_thing": "barn"}
    assert written(rules, topic="sea")[0] == "a boat"
    assert written(rules, topic="farm")[0] == "a barn"


def test_a_word_that_its_list_classifies_has_no_closed_class() -> None:
    text, labels = written({"start": ["in {month}, order no. 1 of no use"], "month|entity:date": "May"})
    assert labels["entity:date"] == "May"
    assert "role:auxiliary" not in labels
    assert text.rindex("no ") > text.index("no. ")
    assert labels["role:determiner"] == "no"


def test_an_unknown_symbol_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing"):
        Grammar({"start": ["{nothing}"]})
