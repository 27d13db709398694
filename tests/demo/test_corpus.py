"""The corpus: deterministic, and its labels tell the truth about its text."""

from __future__ import annotations

import ast
import builtins
import hashlib
import keyword
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import islice

import pytest

from saepipe.demo.corpus import Document, document, documents, labels, token_labels
from saepipe.demo.grammar import CLOSED_CLASS
from saepipe.demo.registers.network import METHODS, STATUS
from saepipe.demo.registers.opinion import OPINION

SAMPLE = 600
GOLDEN_SHA256 = "71bb2c2be5c08b2331f213642eab4d38148e2e54b29424478849a17cf4250c0c"


@pytest.fixture(scope="module")
def sample() -> list[Document]:
    return list(islice(documents(), SAMPLE))


@pytest.fixture(scope="module")
def labelled(sample: list[Document]) -> dict[str, list[str]]:
    """The texts of every label."""
    texts: dict[str, list[str]] = defaultdict(list)
    for found in sample:
        for start, end, label in found.spans:
            texts[label].append(found.text[start:end])
    return texts


def test_text_and_spans_are_the_ones_that_the_model_was_trained_on(sample: list[Document]) -> None:
    digest = hashlib.sha256()
    for found in sample:
        digest.update(repr((found.text, found.register, [tuple(span) for span in found.spans])).encode())
    assert digest.hexdigest() == GOLDEN_SHA256


def test_access_is_random_and_pure(sample: list[Document]) -> None:
    assert document(17) == sample[17] == next(documents(start=17))
    assert document(17, seed=1) != sample[17]
    assert document(10**12).text


def test_every_label_occurs_and_no_other(sample: list[Document], labelled: dict[str, list[str]]) -> None:
    seen = {*labelled, *(f"register:{found.register}" for found in sample)}
    assert seen == set(labels())
    assert len(labels()) >= 100


def test_documents_differ_and_have_a_usable_length(sample: list[Document]) -> None:
    lengths = sorted(len(found.text) for found in sample)
    assert len({found.text for found in sample}) == SAMPLE
    assert lengths[0] > 100
    assert lengths[SAMPLE // 2] > 300
    assert lengths[-1] < 2500


def test_spans_lie_inside_the_text_and_are_sorted(sample: list[Document]) -> None:
    for found in sample:
        assert list(found.spans) == sorted(found.spans)
        assert all(0 <= start < end <= len(found.text) for start, end, _ in found.spans)


@pytest.mark.parametrize(
    ("label", "is_right"),
    [
        ("http:method", lambda text: text in METHODS),
        ("http:status", lambda text: int(text) in STATUS),
        ("http:header", lambda text: re.fullmatch(r"[A-Z][A-Za-z-]+", text)),
        ("role:determiner", lambda text: text.lower() in CLOSED_CLASS["role:determiner"].split()),
        ("digit", str.isdigit),
        ("case:upper", str.isupper),
        ("hebrew", lambda text: re.search("[א-ת]", text) and not re.search("[A-Za-z]", text)),
        ("dna:gene", lambda text: set(text) <= set("ACGT")),
        ("code:keyword", keyword.iskeyword),
        ("code:string", lambda text: text[0] == text[-1] == '"'),
        ("entity:temperature", lambda text: re.fullmatch(r"-?\d+ °C", text)),
        ("entity:person", lambda text: text[0].isupper() or re.search("[א-ת]", text)),
        ("punctuation:comma", lambda text: text == ","),
    ],
)
def test_labelled_texts_are_what_the_label_says(
    labelled: dict[str, list[str]], label: str, is_right: Callable[[str], object]
) -> None:
    assert labelled[label]
    wrong = [text for text in labelled[label] if not is_right(text)]
    assert not wrong


def test_arithmetic_is_right(sample: list[Document]) -> None:
    checked = 0
    for found in sample:
        for line in found.text.splitlines() if found.register == "arithmetic" else ():
            remainder = re.search(r"(\d+) / (\d+) = (\d+) remainder (\d+)", line)
            if remainder:
                number, divisor, quotient, rest = map(int, remainder.groups())
                assert divmod(number, divisor) == (quotient, rest), line
            elif "=" in line:
                values = {eval(side) for side in line.split(") ", 1)[1].split("=")}  # digits and + - * /
                assert len(values) == 1, line
            checked += "=" in line
    assert checked > 50


def test_code_compiles(sample: list[Document]) -> None:
    modules = [ast.parse(found.text) for found in sample if found.register == "code"]
    assert len(modules) > 20
    for module in modules:
        compile(module, "document", "exec")
        kinds = [type(statement) for statement in module.body]
        functions = kinds.count(ast.FunctionDef)
        assert 1 <= functions <= 3
        assert kinds == [ast.Import] * (len(kinds) - functions) + [ast.FunctionDef] * functions


def test_code_reads_no_name_that_its_function_lacks(sample: list[Document]) -> None:
    functions = 0
    for found in sample:
        for function in ast.parse(found.text).body if found.register == "code" else ():
            if isinstance(function, ast.FunctionDef):
                functions += 1
                parameters = {argument.arg for argument in function.args.args}
                names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
                stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
                read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
                assert read <= parameters | stored | set(dir(builtins)), found.text
    assert functions > 40


def test_judging_words_share_the_mood_of_their_passage(sample: list[Document]) -> None:
    judging = 0
    for found in sample:
        moods = {label.removeprefix("mood:") for _, _, label in found.spans if label.startswith("mood:")}
        sentiments = {label.removeprefix("sentiment:") for _, _, label in found.spans if label.startswith("sentiment:")}
        assert sentiments == moods
        assert len(moods) <= 1
        judging += len(moods)
        for other in {"positive", "negative"} - moods if moods else ():
            words = set(OPINION.words(f"{other}_adjective")) | set(OPINION.words(f"{other}_verb"))
            assert not words & set(re.findall(r"\w+", found.text)), found.text
    assert judging > 40


def test_energy_follows_from_the_nutrition_facts(sample: list[Document]) -> None:
    pattern = re.compile(r"Energy: (\d+) kcal\nFat: (\d+) g\nCarbohydrates: (\d+) g\nProtein: (\d+) g")
    facts = [match for found in sample for match in pattern.finditer(found.text)]
    assert facts
    for match in facts:
        energy, fat, carbohydrates, protein = map(int, match.groups())
        assert energy == 9 * fat + 4 * (carbohydrates + protein)


def test_content_length_is_the_length_of_the_body(sample: list[Document]) -> None:
    bodies = [
        match
        for found in sample
        if found.register == "http"
        for match in re.finditer(r"Content-Length: (\d+)\n\n(.*)\n", found.text)
    ]
    assert bodies
    assert all(int(match[1]) == len(match[2]) for match in bodies)


def test_token_labels_follow_overlap() -> None:
    found = next(found for found in documents() if found.register == "http")
    method = next(span for span in found.spans if span.label == "http:method")
    offsets = [(0, 0), (0, method.end), (method.end, method.end + 2), (method.end + 2, len(found.text)), (0, 0)]
    got = token_labels(found, offsets)
    assert "http:method" in got[1]
    assert "http:path" in got[2]
    assert "http:method" not in got[2]
    assert got[0] == got[4] == frozenset()
    assert all("register:http" in names for names in got[1:4])
