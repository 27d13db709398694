"""Documents of different lengths -> contexts of equal length."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from saepipe.config import DataConfig
from saepipe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = Int32[np.ndarray, "array _"]
"""A document's tokens: their ids, the number of the document, and the numbers of their roles."""
Contexts = Int32[np.ndarray, "array context seq"]
"""The same, cut into contexts."""


class Packer:
    """Cuts the documents of one side into contexts; what does not fill one waits for the next documents."""

    def __init__(self, context_size: int, *, pack: bool, bos: int | None, separator: int | None) -> None:
        """Choose the contexts.

        Args:
            context_size: Tokens per context.
            pack: Fill contexts with several documents.
            bos: What begins every context.
            separator: What stands after every document.
        """
        self.pack, self.bos, self.separator = pack, bos, separator
        self.body = context_size - (bos is not None)
        self.rest: Document = np.empty((3, 0), np.int32)
        """What waits: less than a context."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, vocab_size: int) -> "Packer":
        """Take what begins a context and what stands between documents from a tokenizer.

        Raises:
            UserError: It has no such token, or one that the model does not know.
        """
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if data.prepend_bos and bos is None:
            raise UserError(
                "data.prepend_bos=true needs a beginning-of-sequence token, which the tokenizer lacks; set "
                "data.prepend_bos=false"
            )
        begin, between = bos if data.prepend_bos else None, (bos if eos is None else eos) if data.pack else None
        for token, place in ((begin, "to begin a context"), (between, "to stand between documents")):
            if token is not None and not 0 <= token < vocab_size:
                raise outside(tokenizer, token, place, vocab_size)
        return cls(data.context_size, pack=data.pack, bos=begin, separator=between)

    def cut(self, documents: list[Document]) -> Contexts:
        """Give the contexts that further documents complete."""
        tokens = np.concatenate([self.rest, *map(self._prepared, documents)], axis=1)
        whole = tokens.shape[1] // self.body * self.body
        self.rest = tokens[:, whole:].copy()  # a view would keep the documents in memory
        contexts = tokens[:, :whole].reshape(len(tokens), -1, self.body)
        if self.bos is None:
            return contexts
        begin = contexts[:, :, :1].copy()
        begin[0], begin[2] = self.bos, 0
        return np.concatenate([begin, contexts], axis=2)

    def _prepared(self, document: Document) -> Document:
        """Close a document with the separator, or without packing cut it to whole contexts.

        It may bring either end already: a context that begins with its own bos gets no second one.
        """
        ids = document[0]
        if self.bos is not None and len(ids) and ids[0] == self.bos:
            document = document[:, 1:]
        if not self.pack:
            return document[:, : document.shape[1] // self.body * self.body]
        if self.separator is None or not document.shape[1] or ids[-1] == self.separator:
            return document
        end = document[:, -1:].copy()
        end[0], end[2] = self.separator, 0
        return np.concatenate([document, end], axis=1)


def outside(tokenizer: "PreTrainedTokenizerBase", token: int, place: str, vocab_size: int) -> UserError:
    """Build the error for a tokenizer that knows more ids than the model."""
    return UserError(
        f"model.name has a tokenizer ({tokenizer.name_or_path or 'unnamed'}) that gives the id {token} {place}, "
        f"outside the model's vocabulary of {vocab_size}; give a model with the tokenizer that it was trained with"
    )
