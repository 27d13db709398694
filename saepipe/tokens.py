"""Text, conversations or token ids, packed into contexts: what the language model will read.

1. A source gives documents: rows of a data set, blank-line separated paragraphs of a txt file, the demo's corpus.
2. A document's own text decides, with the seed, whether it is trained on or held out.
3. Each side's documents are cut into contexts of equal length, until there are enough training contexts.

Every half minute all of it is saved. Killed at any moment and started again, it goes on from there, to the same bytes.
"""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saepipe import packing, progress
from saepipe.config import DataConfig
from saepipe.encoding import Encoder
from saepipe.errors import UserError
from saepipe.packing import Contexts, Packer
from saepipe.sources import Document, Source
from saepipe.token_store import SIDES, Side, TokenStore
from saepipe.token_writer import TokenStoreWriter, discard_partial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_CHUNK_CHARACTERS = 1 << 18
_CHUNK_DOCUMENTS = 1024
_SAVE_EVERY_S = 30.0
"""Work that a killed run loses at most; saving waits for the disk, for some tenths of a second."""


# ---- the token store


def build(
    folder: str | Path,
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tokens: int,
    vocab_size: int,
) -> TokenStore:
    """Make the token store of a source, go on with it, or open the one that is there already.

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
    encoder = Encoder(source.data, tokenizer, vocab_size)
    identity = {**source.identity, **encoder.identity, "store.tokens": tokens}
    if (Path(folder) / "plan.json").exists():
        store = _reuse(TokenStore.open(folder), identity)
        discard_partial(store.folder)
        return store
    special_ids = encoder.special_ids
    reading = Reading(source, encoder)
    context_size = source.data.context_size
    needed = math.ceil(tokens / context_size)
    with TokenStoreWriter(
        folder,
        context_size=context_size,
        source=identity,
        revision=source.commit,
        with_roles=encoder.chat is not None,
    ) as writer:
        done = reading.go_on(writer, tokens)
        saved_s = time.monotonic()
        with progress.bar("tokens", tokens, done) as bar:
            for sides in reading.contexts():
                for side, contexts in sides.items():
                    room = needed - writer.contexts("train") if side == "train" else contexts.shape[1]
                    ids, documents, roles = contexts[:, :room]
                    special = np.isin(ids, special_ids)
                    writer.append(side, ids, documents, special, roles.astype(np.uint8) if encoder.chat else None)
                bar.update(min(writer.contexts("train") * context_size, tokens) - bar.n)
                if writer.contexts("train") == needed:
                    break
                if time.monotonic() - saved_s >= _SAVE_EVERY_S:
                    writer.save(reading.state)
                    saved_s = time.monotonic()
            else:
                writer.forget()
                raise _too_few(source.data, writer.contexts("train"), tokens)
        if source.data.held_out and not writer.contexts("heldout"):
            log.warning("data.held_out=%s left no whole context out: evaluation needs more", source.data.held_out)
        return writer.finish(special_ids=special_ids, roles=encoder.chat.roles if encoder.chat else [])


def held_out(source: Source, tokenizer: "PreTrainedTokenizerBase", *, tokens: int, vocab_size: int) -> Side:
    """Read held-out contexts alone, into memory: the same, in the same order, as `build` leaves in a token store.

    Args:
        source: Where the documents come from.
        tokenizer: Turns text into ids, and says which ids are special.
        tokens: Tokens wanted; fewer where the data ends, whole contexts, at least one.
        vocab_size: How many ids the language model knows.

    Raises:
        UserError: Ids that the model does not know, or a special token that is missing.
    """
    encoder = Encoder(source.data, tokenizer, vocab_size)
    needed = max(1, tokens // source.data.context_size)
    found: list[Contexts] = [np.zeros((3, 0, source.data.context_size), np.int32)]
    contexts = Reading(source, encoder).contexts() if source.data.held_out else iter(())
    with progress.bar("held-out tokens", needed * source.data.context_size) as bar:
        for sides in contexts:
            found.append(sides["heldout"])
            bar.update(sides["heldout"][0].size)
            if bar.n >= needed * source.data.context_size:
                break
    ids, documents, roles = np.concatenate(found, 1)[:, :needed]
    names = tuple(encoder.chat.roles) if encoder.chat else ()
    special = np.isin(ids, encoder.special_ids)
    return Side(ids, documents, special, roles.astype(np.uint8) if names else None, names)


class Reading:
    """The way of the documents into contexts, and how far it has come.

    Args:
        source: Where the documents come from.
        encoder: Turns them into token ids.
    """

    def __init__(self, source: Source, encoder: Encoder) -> None:
        self._source, self._encoder = source, encoder
        # The held-out contexts of a chunk are written before the chunk that completes the training ones ends it all.
        self._packers = {
            side: Packer.of(encoder.tokenizer, source.data, encoder.vocab_size) for side in reversed(SIDES)
        }
        self._row = 0
        """Row of the data to read next."""
        self._number = 0
        """Number of the next document."""

    def go_on(self, writer: TokenStoreWriter, tokens: int) -> int:
        """Take up what an earlier run saved, where it did; says how many training tokens there are."""
        if (state := writer.state) is None:
            return 0
        self._row, self._number = state["row"], state["documents"]
        for side, packer in self._packers.items():
            packer.rest = np.array(state["rest"][side], np.int32)
        if self._encoder.chat:
            self._encoder.chat.roles = state["roles"]
        done = min(writer.contexts("train") * self._source.data.context_size, tokens)
        log.info("resuming at %s of %s tokens", f"{done:,}", f"{tokens:,}")
        return done

    @property
    def state(self) -> dict[str, Any]:
        """What `go_on` needs, as JSON values."""
        rest = {side: packer.rest.tolist() for side, packer in self._packers.items()}
        roles = list(self._encoder.chat.roles) if self._encoder.chat else []
        return {"row": self._row, "documents": self._number, "rest": rest, "roles": roles}

    def contexts(self) -> Iterator[dict[str, Contexts]]:
        """Give each side's contexts (`train`, `heldout`) as documents complete them.

        In between, the state can be saved.
        """
        tokenizer = self._encoder.tokenizer
        if self._source.data.pack and tokenizer.eos_token_id is None:
            joint = "nothing" if tokenizer.bos_token_id is None else "its beginning-of-sequence token"
            log.info("the tokenizer has no end-of-sequence token: documents are joined by %s", joint)
        for chunk in _chunks(self._source.documents(self._row)):
            sides: dict[str, list[packing.Document]] = {side: [] for side in self._packers}
            for (_, document), (ids, roles) in zip(chunk, self._encoder.encode(chunk), strict=True):
                side = "heldout" if self._source.holds_out(document) else "train"
                sides[side].append(np.stack([ids, np.full_like(ids, self._number), roles]))
                self._number += 1
            self._row = chunk[-1][0] + 1
            yield {side: packer.cut(sides[side]) for side, packer in self._packers.items()}


def _reuse(store: TokenStore, identity: dict[str, Any]) -> TokenStore:
    """Refuse a token store that another configuration made."""
    for key, mine in identity.items():
        if (theirs := store.source.get(key)) != mine:
            raise UserError(
                f"store.dir={store.folder.parent} holds the tokens of another plan: {key} is {theirs} there and {mine} "
                "here; give the same, or choose another store.dir"
            )
    return store


def _chunks(documents: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Group documents so that the tokenizer gets enough to do at once, and a few long ones do not fill the memory."""
    chunk: list[tuple[int, Document]] = []
    size = 0
    for row, document in documents:
        chunk.append((row, document))
        size += sum(len(content) for _, content in document) if isinstance(document, tuple) else len(document)
        if size >= _CHUNK_CHARACTERS or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _too_few(data: DataConfig, contexts: int, tokens: int) -> UserError:
    held = contexts * data.context_size
    cure = f"set store.tokens={held} or give more text" if contexts else "give more text or lower data.context_size"
    return UserError(
        f"store.tokens={tokens} is more than the {held} training tokens ({contexts} contexts of {data.context_size}) "
        f"of data.path={data.path}; {cure}{'' if data.pack else ', or set data.pack=true'}"
    )
