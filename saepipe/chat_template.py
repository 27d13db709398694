"""A conversation -> token ids, and whose words each token holds.

1. The tokenizer's chat template (or the user's) writes the conversation as one text.
2. The contents are found in that text. The template also writes the conversation with a mark in the place of each
   content, which tells its own markup from a content that reads like it ("user" says "user").
3. A token has the role of the content that it shares a character with, else the role `template`.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int32

from saepipe import hub
from saepipe.config import DataConfig
from saepipe.conversations import TEMPLATE, Conversation, Message
from saepipe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_ROLES = 256
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000([0-9]+)\ue001")
# Templates that write today's date would write other tokens tomorrow; it is the one that Llama's write without a clock.
_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(
        f" | replace('%{letter}', '{value}')"
        for letter, value in {
            "d": "26",
            "b": "Jul",
            "B": "July",
            "m": "07",
            "Y": "2024",
            "y": "24",
            "A": "Friday",
        }.items()
    )
    + " }}{% endmacro +%}"
)


class Span(NamedTuple):
    """Where a message's content stands in the rendered text."""

    start: int
    stop: int
    role: int


class Markup(NamedTuple):
    """What a template writes around the contents, for conversations with the same roles."""

    pieces: list[str]
    """Before, between and after the contents."""
    messages: list[int]
    """Which message's content stands between two pieces."""


class ChatTemplate:
    """A chat template and the tokenizer that reads what it writes."""

    def __init__(self, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Read the template.

        Args:
            data: Names the template in `chat_template`.
            tokenizer: Has a template for `default`, and tells which characters a token is made of.

        Raises:
            UserError: There is no such template, or the tokenizer is a slow one.
        """
        self._key = f"data.chat_template={data.chat_template}"
        self._column = data.column
        if not tokenizer.is_fast:
            raise UserError(
                f"{self._key} needs a fast tokenizer, to know whose words each token holds, and model.name has a slow "
                f"one ({type(tokenizer).__name__}); give a model with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        text = self._own() if data.chat_template == "default" else _file(self._key, Path(str(data.chat_template)))
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        """Identity of the template's text."""
        self._template = _DATE + text if "strftime_now" in text else text
        self._markup = lru_cache(4096)(self._find_markup)
        self.roles = [TEMPLATE]
        """Names of the roles so far, in the order in which they were met."""

    def _own(self) -> str:
        """Return the tokenizer's template."""
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError:
            raise UserError(
                f"{self._key} means the tokenizer's own chat template, and model.name has none; give the path of a "
                "jinja file in data.chat_template, or a chat model in model.name"
            ) from None

    def encode(self, conversations: list[tuple[int, Conversation]]) -> list[Int32[np.ndarray, "2 _"]]:
        """Turn conversations, each with the number of its row, into ids and role numbers.

        Raises:
            UserError: A conversation that the template refuses, or a content that it drops or changes.
        """
        texts, spans = zip(*(self._rendered(row, conversation) for row, conversation in conversations), strict=True)
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            np.stack([np.array(ids, np.int32), _roles(offsets, found)])
            for ids, offsets, found in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
        ]

    # ---- text and contents

    def _rendered(self, row: int, conversation: Conversation) -> tuple[str, list[Span]]:
        """Write a conversation, and find the contents."""
        where = f"data.column={self._column}, row {row} (counted from 0)"
        roles = [self._number(message.role, where) for message in conversation]
        try:
            text = self._render(conversation)
        except MemoryError:
            raise
        except Exception as error:  # jinja's own, and whatever an expression of a template raises
            raise UserError(
                f"{where}: {self._key} cannot write the conversation ({hub.fault(error)}); leave such conversations "
                "out, or give the path of another template"
            ) from error
        found = self._between_markup(text, conversation)
        if found is None:
            found = list(_in_order(text, conversation))
        written = {n for n, _, _ in found}
        missing = [n for n, message in enumerate(conversation) if message.content.strip() and n not in written]
        if missing:
            raise UserError(
                f"{where}: {self._key} drops or changes the content of message {missing[0]}; give the path of a "
                "template that writes every content as it is"
            )
        return text, [Span(start, stop, roles[n]) for n, start, stop in found]

    def _render(self, conversation: Conversation) -> str:
        messages = [message._asdict() for message in conversation]
        return str(self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False))

    def _number(self, role: str, where: str) -> int:
        if role not in self.roles:
            if len(self.roles) == _MOST_ROLES:
                raise UserError(f"{where} has the role {role!r}, one more than the {_MOST_ROLES - 1} that are possible")
            self.roles.append(role)
        return self.roles.index(role)

    def _between_markup(self, text: str, conversation: Conversation) -> list[tuple[int, int, int]] | None:
        """Find (message, start, stop) of the contents between the markup; None where the markup is not the same."""
        # A content of white space stays: templates ask whether there is a content, and it has no words to find.
        marked = (
            Message(message.role, _MARK.format(n) if message.content.strip() else message.content)
            for n, message in enumerate(conversation)
        )
        markup = self._markup(tuple(marked))
        if markup is None or not text.startswith(markup.pieces[0]):
            return None
        found, at = [], len(markup.pieces[0])
        for message, piece in zip(markup.messages, markup.pieces[1:], strict=True):
            for written in _ways(conversation[message].content):
                if text.startswith(written, at) and text.startswith(piece, at + len(written)):
                    found.append((message, at, at + len(written)))
                    at += len(written) + len(piece)
                    break
            else:
                return None
        return found if at == len(text) else None

    def _find_markup(self, marked: Conversation) -> Markup | None:
        """Write a conversation of marks; None where the template refuses what it did not refuse with the contents."""
        try:
            parts = _MARKS.split(self._render(marked))
        except MemoryError:
            raise
        except Exception:
            return None
        return Markup(parts[::2], [int(n) for n in parts[1::2]])


def _ways(content: str) -> list[str]:
    """List what templates make of a content: they may strip it, and of several that they join the outermost ends."""
    return [content, content.strip(), content.rstrip(), content.lstrip()]


def _in_order(text: str, conversation: Conversation) -> Iterator[tuple[int, int, int]]:
    """Find (message, start, stop) of the contents one after the other, for markup that depends on what they say."""
    at = 0
    for message, (_, content) in enumerate(conversation):
        starts = ((text.find(written, at), len(written)) for written in _ways(content) if content.strip())
        start, length = next((found for found in starts if found[0] >= 0), (-1, 0))
        if start >= 0:
            at = start + length
            yield message, start, at


def _roles(offsets: list[tuple[int, int]], spans: list[Span]) -> Int32[np.ndarray, " token"]:
    """Return each token's role: that of the first content that it shares a character with."""
    starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
    last = Span(np.iinfo(np.int64).max, np.iinfo(np.int64).max, 0)
    span_starts, span_stops, roles = np.array([*spans, last], np.int64).T
    nearest = np.searchsorted(span_stops, starts, side="right")
    return np.where(span_starts[nearest] < stops, roles[nearest], 0).astype(np.int32)


def _file(key: str, path: Path) -> str:
    """Read a template from a file."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key} cannot be read ({hub.fault(error)}); give `default` or the path of a file with a jinja template"
        ) from None
