"""Token ids -> the text that each token stands for, fit to be shown: no control characters, no broken ones."""

import json
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PICTURES = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"
"""Format characters that Persian and emoji need; the others (bidirectional overrides ...) would disturb the page."""


class Piece(NamedTuple):
    """Some tokens of a sequence, and the whole characters that they stand for."""

    text: str
    """Ready to be shown."""
    start: int
    """First token in the sequence."""
    stop: int
    """Token after the last; more than one only where a character is cut in several tokens."""
    broken: bool
    """Nothing but bytes that are no character, as where a sequence begins inside one."""


class TokenText:
    """The bytes of a tokenizer's tokens, whatever its kind: byte-level, SentencePiece with byte fallback, WordPiece."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Find out how the tokenizer writes spaces and bytes."""
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._whole: dict[int, str | None] = {}
        self._added = {id: str(token).encode() for id, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = json.loads(backend.to_str()) if backend else {}
        kinds = _types(parts.get("decoder")) | _types(parts.get("pre_tokenizer"))
        self._byte_level = "ByteLevel" in kinds
        self._word_piece = "WordPiece" in kinds
        # A model of whole words has no decoder: it is the spaces between them that its tokens leave out.
        self._words = bool(parts) and not parts.get("decoder") and not self._byte_level

    def bytes_of(self, id: int) -> bytes:
        """Return what a token stands for, which may be part of a character."""
        if id not in self._known:
            self._known[id] = self._added[id] if id in self._added else self._read(id)
        return self._known[id]

    def _read(self, id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(id)
        if piece is None:  # some models have more ids than their tokenizer has tokens
            return f"<{id}>".encode()
        if self._byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if self._word_piece:
            return piece.removeprefix("##").encode() if piece.startswith("##") else f" {piece}".encode()
        return (" " + piece if self._words else piece.replace("▁", " ")).encode()

    def _alone(self, id: int) -> str | None:
        """Return a token's text, ready to be shown; None where it is no whole characters by itself, or none at all."""
        if id not in self._whole:
            try:
                text = self.bytes_of(id).decode()
            except UnicodeDecodeError:
                text = ""
            self._whole[id] = "".join(map(_shown, text)) or None
        return self._whole[id]

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """Cut a sequence in pieces of whole characters, one per token but where a character takes several tokens.

        A character belongs to the token that holds its first byte; a token without such a byte joins the one before.
        """
        whole = [text for id in ids if (text := self._alone(id)) is not None]
        if len(whole) == len(ids):
            return [Piece(text, at, at + 1, False) for at, text in enumerate(whole)]
        parts = [self.bytes_of(id) for id in ids]
        owner = [token for token, part in enumerate(parts) for _ in part]
        texts: list[list[str]] = [[] for _ in ids]
        begins = [False] * len(ids)
        broken = [True] * len(ids)
        at = 0
        for character in b"".join(parts).decode("utf-8", errors="surrogateescape"):
            alone = "\udc80" <= character <= "\udcff"
            token = owner[at]
            texts[token].append(_shown(character))
            begins[token] = True
            broken[token] &= alone
            at += 1 if alone else len(character.encode())
        starts = [token for token in range(len(ids)) if begins[token] or token == 0]
        stops = [*starts[1:], len(ids)]
        return [
            Piece("".join(texts[start]), start, stop, broken[start])
            for start, stop in zip(starts, stops, strict=True)
            if stop > start
        ]


def _shown(character: str) -> str:
    """Make a character visible where it is none by itself."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character in _PICTURES:
        return _PICTURES[character]
    if character < " " or character == "\x7f":
        return chr(0x2400 + ord(character)) if character < " " else "␡"
    if unicodedata.category(character) in _UNSEEN and character not in _JOINERS:
        return f"\\u{{{ord(character):x}}}"
    return character


def _types(part: object) -> set[str]:
    """Collect the types of a tokenizer's component and of those inside it."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*(_types(value) for value in part.values() if isinstance(value, list)))
    return set()


def _byte_alphabet() -> dict[str, int]:
    """Map the characters by which byte-level tokenizers write bytes -> the bytes.

    Source: `bytes_to_unicode` of GPT-2: printable Latin-1 stands for itself, the rest is moved up from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_alphabet()
