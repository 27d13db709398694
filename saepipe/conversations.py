"""A row of chat data -> a conversation: messages of a role and a text.

Rows are lists of `{role, content}` (as OpenAI's and most data sets') or of `{from, value}` (as ShareGPT's).
"""

import json
import reprlib
from typing import Any, NamedTuple

from saepipe.errors import UserError

TEMPLATE = "template"
"""Role of what a chat template writes around the contents; no message can have it."""
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_SHAREGPT_AS_IS = ("user", "assistant", "system", "tool")
_NO_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio", "video")
"""Keys with content of other kinds, which some templates would write and others leave out."""


class Message(NamedTuple):
    """What one side says at once."""

    role: str
    content: str


Conversation = tuple[Message, ...]
"""The messages of a document."""


def parse(row: Any, where: str) -> Conversation:
    """Read a row of chat data.

    Args:
        row: What the column holds.
        where: Names the column and the row, for errors.

    Raises:
        UserError: The row is no conversation, or holds more than text.
    """
    if _is_by_key(row):
        row = [dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)]
    if not isinstance(row, list):
        raise UserError(
            f"{where} holds {reprlib.repr(row)} ({type(row).__name__}), which is no list of messages; give a column "
            "with conversations, or leave data.chat_template out"
        )
    return tuple(_message(message, f"{where}, message {number}") for number, message in enumerate(row))


def canonical(conversation: Conversation) -> bytes:
    """Return the same bytes for the same roles and texts, however the data wrote them."""
    return json.dumps(conversation, separators=(",", ":")).encode()


def _is_by_key(row: Any) -> bool:
    """Tell whether a row has a list for each key of its messages, as `datasets` gives a Sequence of them."""
    if not isinstance(row, dict) or not all(isinstance(values, list) for values in row.values()):
        return False
    return len({*map(len, row.values())}) == 1


def _message(message: Any, where: str) -> Message:
    keys = message.keys() if isinstance(message, dict) else ()
    role_key, content_key = ("from", "value") if "from" in keys else ("role", "content")
    if role_key not in keys or content_key not in keys:
        raise UserError(
            f"{where} is {reprlib.repr(message)}; each message needs the keys role and content (or from and value)"
        )
    for key in _NO_TEXT:
        if message.get(key):
            raise UserError(
                f"{where} has {key}={reprlib.repr(message[key])}; leave out conversations with more than text"
            )
    return Message(_role(message[role_key], role_key, where), _text(message[content_key], f"{where}: {content_key}"))


def _role(role: Any, key: str, where: str) -> str:
    if not isinstance(role, str) or not role.strip() or not role.isprintable() or role == TEMPLATE:
        raise UserError(f"{where} has {key}={reprlib.repr(role)}; give a name such as user or assistant")
    if key == "role":
        return role
    if role not in (*_SHAREGPT, *_SHAREGPT_AS_IS):
        known = ", ".join((*_SHAREGPT, *_SHAREGPT_AS_IS))
        raise UserError(f"{where} has from={reprlib.repr(role)}; leave out conversations with others than {known}")
    return _SHAREGPT.get(role, role)


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):
        return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise UserError(
            f"{where} is {reprlib.repr(content)} ({type(content).__name__}), which is no text; leave such "
            "conversations out"
        )
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError:  # JSON can hold half a surrogate pair, which is no text
            raise UserError(f"{where} holds half a character; leave such conversations out") from None
    return content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise UserError(f"{where} is {reprlib.repr(part)}; leave out conversations with more than text")
    return _text(part.get("text"), f"{where}.text")
