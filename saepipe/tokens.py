"""Text, or token ids, packed into contexts: what the language model will read.

1. A source gives documents: rows of a data set, blank-line separated paragraphs of a txt file, the demo's corpus.
2. A document's own text decides, with the seed, whether it is trained on or held out.
3. Each side's documents are cut into contexts of equal length, until there are enough training contexts.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from saepipe import progress
from saepipe.config import DataConfig
from saepipe.errors import UserError
from saepipe.sources import Document, Source
from saepipe.token_store import TokenStore, TokenStoreWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_CHUNK_CHARACTERS = 1 << 18
_CHUNK_DOCUMENTS = 1024

Contexts = tuple[Int32[np.ndarray, "context seq"], Int32[np.ndarray, "context seq"]]
"""Token ids, and the number of the document that each comes from."""


# ---- the token store


def build(
    folder: str | Path,
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tokens: int,
    vocab_size: int,
) -> TokenStore:
    """Make the token store of a source, or open the one that is there already.

    Args:
        folder: Folder of the token store.
        source: Where the documents come from.
        tokenizer: Turns text into ids, and says which ids are special.
        tokens: Training tokens wanted; rounded up to whole contexts.
        vocab_size: How many ids the language model knows.

    Raises:
        UserError: Too few tokens, ids that the model does not know, a special token that is missing, or a token store
            of other data in the folder.
    """
    identity = {
        **source.identity,
        "store.tokens": tokens,
        "model.name (tokenizer)": _tokenizer_hash(tokenizer),
        "model.name (size of the vocabulary)": vocab_size,
    }
    if (Path(folder) / "plan.json").exists():
        return _reuse(TokenStore.open(folder), identity)
    special_ids = _special_ids(tokenizer)
    packers = {side: _Packer.of(tokenizer, source.data, vocab_size) for side in ("heldout", "train")}
    needed = math.ceil(tokens / source.data.context_size)
    with (
        TokenStoreWriter(folder, context_size=source.data.context_size) as writer,
        progress.bar("tokens", tokens) as bar,
    ):
        for side, (ids, documents) in _contexts(source, tokenizer, vocab_size, packers):
            room = needed - writer.contexts("train") if side == "train" else len(ids)
            writer.append(side, ids[:room], documents[:room], np.isin(ids[:room], special_ids))
            bar.update(min(writer.contexts("train") * source.data.context_size, tokens) - bar.n)
            if writer.contexts("train") == needed:
                break
        else:
            raise _too_few(source.data, writer.contexts("train"), tokens)
        if source.data.held_out and not writer.contexts("heldout"):
            log.warning("data.held_out=%s left no whole context out: evaluation needs more", source.data.held_out)
        return writer.finish(source=identity, special_ids=special_ids)


def _contexts(
    source: Source, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, packers: dict[str, "_Packer"]
) -> Iterator[tuple[str, Contexts]]:
    """Give each side's contexts as documents complete them, the held-out ones of some documents first."""
    if source.data.pack and tokenizer.eos_token_id is None:
        joint = "nothing" if tokenizer.bos_token_id is None else "its beginning-of-sequence token"
        log.info("the tokenizer has no end-of-sequence token: documents are joined by %s", joint)
    first = 0
    for chunk in _chunks(source.documents()):
        numbered = enumerate(_ids(chunk, source.data, tokenizer, vocab_size), first)
        sides: dict[str, list[tuple[int, np.ndarray]]] = {side: [] for side in packers}
        for document, item in zip(chunk, numbered, strict=True):
            sides["heldout" if source.holds_out(document) else "train"].append(item)
        first += len(chunk)
        for side, packer in packers.items():
            yield side, packer.cut(sides[side])


def _reuse(store: TokenStore, identity: dict[str, Any]) -> TokenStore:
    """Refuse a token store that another configuration made."""
    for key, mine in identity.items():
        if (theirs := store.source.get(key)) != mine:
            raise UserError(
                f"store.dir={store.folder.parent} holds the tokens of another plan: {key} is {theirs} there and {mine} "
                "here; give the same, or choose another store.dir"
            )
    return store


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents so that the tokenizer gets enough to do at once, and a few long ones do not fill the memory."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK_CHARACTERS or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _ids(
    chunk: list[Document], data: DataConfig, tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> list[Int32[np.ndarray, " token"]]:
    """Turn documents into ids; none outside the vocabulary."""
    lists: Any = chunk
    text = isinstance(chunk[0], str)
    if text:
        lists = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    documents = [np.asarray(ids, np.int64) for ids in lists]
    every = np.concatenate(documents)
    strange = every[(every < 0) | (every >= vocab_size)]
    if len(strange) and text:
        raise _outside(tokenizer, int(strange[0]), "for some text", vocab_size)
    if len(strange):
        raise UserError(
            f"data.column={data.column} has the token id {strange[0]}, outside the model's vocabulary of {vocab_size}; "
            "give the ids of the model's own tokenizer, or text"
        )
    return [ids.astype(np.int32) for ids in documents]


def _outside(tokenizer: "PreTrainedTokenizerBase", token: int, role: str, vocab_size: int) -> UserError:
    return UserError(
        f"model.name has a tokenizer ({tokenizer.name_or_path or 'unnamed'}) that gives the id {token} {role}, outside "
        f"the model's vocabulary of {vocab_size}; give a model with the tokenizer that it was trained with"
    )


def _too_few(data: DataConfig, contexts: int, tokens: int) -> UserError:
    held = contexts * data.context_size
    cure = f"set store.tokens={held} or give more text" if contexts else "give more text or lower data.context_size"
    return UserError(
        f"store.tokens={tokens} is more than the {held} training tokens ({contexts} contexts of {data.context_size}) "
        f"of data.path={data.path}; {cure}{'' if data.pack else ', or set data.pack=true'}"
    )


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """List the special tokens, those without a role (Llama 3's reserved ones) too."""
    added = (token for token, content in tokenizer.added_tokens_decoder.items() if content.special)
    return sorted({*tokenizer.all_special_ids, *added})


def _tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Identify a tokenizer by its content, wherever it lies."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps([content, tokenizer.special_tokens_map], sort_keys=True).encode()).hexdigest()


# ---- documents -> contexts


class _Packer:
    """Cuts the documents of one side into contexts; what does not fill one waits for the next documents."""

    def __init__(self, context_size: int, *, pack: bool, bos: int | None, separator: int | None) -> None:
        self.pack, self.bos, self.separator = pack, bos, separator
        self.body = context_size - (bos is not None)
        self.ids = self.numbers = np.empty(0, np.int32)

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, vocab_size: int) -> "_Packer":
        """Choose what begins a context and what stands between documents."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if data.prepend_bos and bos is None:
            raise UserError(
                "data.prepend_bos=true needs a beginning-of-sequence token, which the tokenizer lacks; set "
                "data.prepend_bos=false"
            )
        begin, between = bos if data.prepend_bos else None, (bos if eos is None else eos) if data.pack else None
        for token, role in ((begin, "to begin a context"), (between, "to stand between documents")):
            if token is not None and not 0 <= token < vocab_size:
                raise _outside(tokenizer, token, role, vocab_size)
        return cls(data.context_size, pack=data.pack, bos=begin, separator=between)

    def cut(self, documents: list[tuple[int, np.ndarray]]) -> Contexts:
        """Give the contexts that (number, ids) of further documents complete."""
        parts, numbers = [self.ids], [self.numbers]
        for number, document in documents:
            prepared = self._prepared(document)
            parts.append(prepared)
            numbers.append(np.full(len(prepared), number, np.int32))
        ids, of_document = np.concatenate(parts), np.concatenate(numbers)
        whole = len(ids) // self.body * self.body
        self.ids, self.numbers = ids[whole:], of_document[whole:]
        ids, of_document = ids[:whole].reshape(-1, self.body), of_document[:whole].reshape(-1, self.body)
        if self.bos is None:
            return ids, of_document
        return np.insert(ids, 0, self.bos, axis=1), np.insert(of_document, 0, of_document[:, 0], axis=1)

    def _prepared(self, document: np.ndarray) -> np.ndarray:
        """Close a document with the separator, or without packing cut it to whole contexts.

        Token ids may bring either end already: a context that begins with its own bos gets no second one.
        """
        if self.bos is not None and len(document) and document[0] == self.bos:
            document = document[1:]
        if not self.pack:
            return document[: len(document) // self.body * self.body]
        if self.separator is None or (len(document) and document[-1] == self.separator):
            return document
        return np.append(document, np.int32(self.separator))
