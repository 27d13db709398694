"""Rows of chat data in every spelling are the same messages, and what is more than text is refused by row and key."""

import re

import pytest

from saepipe.conversations import Message, canonical, parse
from saepipe.errors import UserError

WHERE = "data.column=messages, row 7 (counted from 0)"
EXPECTED = (Message("system", "Be brief."), Message("user", "What is 2 + 2? é"), Message("assistant", "4"))


@pytest.mark.parametrize(
    "row",
    [
        [{"role": role, "content": content} for role, content in EXPECTED],
        [{"role": role, "content": content, "tool_calls": None, "images": [], "id": 5} for role, content in EXPECTED],
        [
            {"from": role, "value": content}
            for role, content in zip(("system", "human", "gpt"), (text for _, text in EXPECTED), strict=True)
        ],
        [{"from": role, "value": content} for role, content in EXPECTED],
        {"role": [role for role, _ in EXPECTED], "content": [content for _, content in EXPECTED], "id": [None] * 3},
        [
            {"role": role, "content": [{"type": "text", "text": content[:1]}, {"type": "text", "text": content[1:]}]}
            for role, content in EXPECTED
        ],
    ],
)
def test_every_spelling_is_the_same_conversation(row: object) -> None:
    assert parse(row, WHERE) == EXPECTED
    assert canonical(parse(row, WHERE)) == canonical(EXPECTED)


def test_canonical_form_tells_conversations_apart() -> None:
    forms = {
        canonical(conversation)
        for conversation in [EXPECTED, EXPECTED[:2], EXPECTED[::-1], (Message("user", "a"), Message("user", "b"))]
    }
    assert len(forms) == 4
    assert canonical((Message("user", 'a","b'),)) != canonical((Message("user", "a"), Message("b", "")))
    assert canonical((Message("user", "é"),)) == b'[["user","\\u00e9"]]'  # decides sides: it may never change


def test_an_empty_conversation_and_empty_contents() -> None:
    assert parse([], WHERE) == ()
    assert parse([{"role": "user", "content": ""}], WHERE) == (Message("user", ""),)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"role": ["user"], "content": []},
            "holds {'content': [], 'role': ['user']} (dict), which is no list of messages",
        ),
        ("text", "holds 'text' (str), which is no list of messages; give a column with conversations, or leave"),
        ([1, 2], "message 0 is 1; each message needs the keys role and content (or from and value)"),
        ([{"role": "user"}], "message 0 is {'role': 'user'}; each message needs the keys role and content"),
        ([{"from": "human", "content": "a"}], "each message needs the keys role and content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "message 1: content is None"),
        ([{"role": "user", "content": 5}], "message 0: content is 5 (int), which is no text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 0: content[0] is {'type': 'image'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "message 0: content[0].text is None"),
        ([{"role": "user", "content": "\ud800"}], "message 0: content holds half a character"),
        ([{"role": "", "content": "a"}], "message 0 has role=''; give a name such as user"),
        ([{"role": "\ue0001\ue001", "content": "a"}], "message 0 has role='\\ue0001\\ue001'; give a name such as user"),
        ([{"role": "a\ud800", "content": "a"}], "message 0 has role='a\\ud800'; give a name such as user"),
        ([{"role": "template", "content": "a"}], "message 0 has role='template'; give a name"),
        ([{"role": None, "content": "a"}], "message 0 has role=None; give a name"),
        ([{"from": "bing", "value": "a"}], "from='bing'; leave out conversations with others than human, gpt, user"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}],
            "message 0 has tool_calls=[{'id': 1}]; leave",
        ),
        (
            [{"role": "assistant", "content": "a", "reasoning_content": "b"}],
            "message 0 has reasoning_content='b'; leave",
        ),
    ],
)
def test_what_is_no_text_is_refused(row: object, words: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(WHERE)}.*{re.escape(words)}"):
        parse(row, WHERE)
