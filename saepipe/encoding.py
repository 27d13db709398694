"""Documents -> token ids, none outside the model's vocabulary, and the number of each token's role."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from saepipe.chat_template import ChatTemplate
from saepipe.config import DataConfig
from saepipe.errors import UserError
from saepipe.packing import outside
from saepipe.sources import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = Int32[np.ndarray, "2 _"]
"""A document's token ids, and their roles (0 where there are none)."""


class Encoder:
    """A tokenizer, with what else decides the ids of a document."""

    def __init__(self, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
        """Take a tokenizer, and read the chat template where there is one.

        Args:
            data: The data group of the configuration.
            tokenizer: Turns text into ids, and says which ids are special.
            vocab_size: How many ids the language model knows.

        Raises:
            UserError: The chat template is missing, or needs another tokenizer.
        """
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.chat = ChatTemplate(data, tokenizer) if data.chat_template is not None else None
        self._column = data.column

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the ids, besides the documents."""
        return {
            "data.chat_template (hash of its text)": self.chat and self.chat.hash,
            "model.name (tokenizer)": _hash(self.tokenizer),
            "model.name (size of the vocabulary)": self.vocab_size,
        }

    @property
    def special_ids(self) -> list[int]:
        """The special tokens, those without a use (Llama 3's reserved ones) too."""
        added = (token for token, content in self.tokenizer.added_tokens_decoder.items() if content.special)
        return sorted({*self.tokenizer.all_special_ids, *added})

    def encode(self, documents: list[tuple[int, Document]]) -> list[Encoded]:
        """Turn documents, each with the number of its row, into ids and role numbers.

        Raises:
            UserError: An id outside the vocabulary, or a conversation that the chat template cannot write.
        """
        if self.chat:
            encoded = self.chat.encode([(row, document) for row, document in documents if isinstance(document, tuple)])
        else:
            values: Any = [document for _, document in documents]
            if isinstance(values[0], str):
                options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
                values = self.tokenizer(values, **options)["input_ids"]
            encoded = [_without_roles(ids) for ids in values]
        self._check(np.concatenate([ids for ids, _ in encoded]), of_tokenizer=not isinstance(documents[0][1], list))
        return [document.astype(np.int32) for document in encoded]

    def _check(self, ids: np.ndarray, *, of_tokenizer: bool) -> None:
        """Refuse ids that the model does not know."""
        strange = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(strange) and of_tokenizer:
            raise outside(self.tokenizer, int(strange[0]), "for some text", self.vocab_size)
        if len(strange):
            raise UserError(
                f"data.column={self._column} has the token id {strange[0]}, outside the model's vocabulary of "
                f"{self.vocab_size}; give the ids of the model's own tokenizer, or text"
            )


def _without_roles(ids: list[int]) -> np.ndarray:
    """Add roles that say nothing; the ids of data may be too large for 32 bits until they are checked."""
    array = np.asarray(ids, np.int64)
    return np.stack([array, np.zeros_like(array)])


def _hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Identify a tokenizer by its content, wherever it lies."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps([content, tokenizer.special_tokens_map], sort_keys=True).encode()).hexdigest()
