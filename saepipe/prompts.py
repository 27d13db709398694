"""Text <-> token ids, by the names and habits of TransformerLens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from saepipe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WITHOUT_BOS = ("gpt_neox", "bloom", "qwen", "qwen2", "qwen3", "phi")
"""Kinds of models before whose prompts HookedTransformer puts no beginning-of-sequence token by itself."""

Input = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor
"""A prompt, several, or token ids: those of one prompt, or of a batch of equally long ones."""


class Batch(NamedTuple):
    """Prompts side by side, padded on the right: what comes behind a prompt changes nothing that is before it."""

    ids: Int[Tensor, "batch seq"]
    lengths: list[int]
    """Tokens of each prompt."""


class Prompts:
    """The part of a model that knows of text.

    Args:
        tokenizer: The tokenizer; None refuses text.
        name: Name of the model.
        device: Where token ids go.
        context_limit: Most tokens in a context; None where there is no limit.
        prepend_bos: Whether text begins with the beginning-of-sequence token where nothing else is asked for.
        vocab_size: Tokens that the model knows; None lets any id pass.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        name: str,
        device: torch.device,
        context_limit: int | None,
        prepend_bos: bool,
        vocab_size: int | None = None,
    ) -> None:
        self._tokenizer, self.model_name = tokenizer, name
        self._vocab_size = vocab_size
        self._device = device
        self.context_limit = context_limit
        """Most tokens in a context; None where there is no limit."""
        self.default_prepend_bos = prepend_bos and getattr(tokenizer, "bos_token_id", None) is not None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer.

        Raises:
            UserError: The model was given none.
        """
        if self._tokenizer is None:
            raise UserError(
                f"model {self.model_name} has no tokenizer; give token ids, or load_model(model, tokenizer=...)"
            )
        return self._tokenizer

    def read(self, prompts: Input, *, prepend_bos: bool | None = None, truncate: bool = False) -> Batch:
        """Turn prompts into token ids.

        Args:
            prompts: Text, several texts, or token ids.
            prepend_bos: Whether texts begin with the beginning-of-sequence token; None is the model's habit.
            truncate: Cut what is longer than the model's context, where it would be refused else.

        Raises:
            UserError: There is nothing to read, it is longer than the context or not of the model's vocabulary, or the
                tokenizer is not there.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, list | tuple) and all(isinstance(prompt, str) for prompt in prompts):
            batch = self._encode(prompts, prepend_bos)
        else:
            ids = self._ids(prompts)
            ids = ids[None] if ids.ndim == 1 else ids
            batch = Batch(ids, [ids.shape[1]] * len(ids))
        if not batch.lengths or min(batch.lengths) == 0:
            raise UserError(
                "input holds a prompt without a token; give at least one, such as the tokenizer's bos token"
            )
        longest, limit = batch.ids.shape[1], self.context_limit
        if limit is None or longest <= limit:
            return batch
        if truncate:
            return Batch(batch.ids[:, :limit], [min(length, limit) for length in batch.lengths])
        raise UserError(
            f"input has {longest} tokens, more than the {limit} that {self.model_name} can read; give fewer, such as "
            "model.to_tokens(text, truncate=True)"
        )

    def _ids(self, given: Any) -> Int[Tensor, " seq"] | Int[Tensor, "batch seq"]:
        """Take token ids as they are, where they are such."""
        try:
            ids = torch.as_tensor(given, device=self._device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"input is neither text nor token ids ({error}); give one text or a list of texts, or token ids, those "
                "of a batch all equally many"
            ) from error
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if not whole or ids.ndim not in (1, 2):
            raise UserError(f"input is {ids.dtype} of shape {list(ids.shape)}; give token ids, [batch, seq] or [seq]")
        if self._vocab_size is not None and ids.numel():
            for id in (int(ids.min()), int(ids.max())):  # a GPU would not come back from it
                if not 0 <= id < self._vocab_size:
                    raise UserError(
                        f"input has the token id {id}, and {self.model_name} has {self._vocab_size} tokens, from 0 on; "
                        "give ids of its own tokenizer"
                    )
        return ids

    def _encode(self, texts: Sequence[str], prepend_bos: bool | None) -> Batch:
        bos = self.default_prepend_bos if prepend_bos is None else prepend_bos
        begin = self.tokenizer.bos_token_id
        if bos and begin is None:
            raise UserError(
                f"prepend_bos=True needs a beginning-of-sequence token, which {self.model_name}'s tokenizer lacks; "
                "set prepend_bos=False"
            )
        rows = [self._encoded(text) for text in texts]
        # A text that says its bos itself gets no second one, as where HookedTransformer's tokenizer puts it there
        rows = [[begin, *row] if bos and row[:1] != [begin] else row for row in rows]
        longest = max((len(row) for row in rows), default=0)
        padded = [[*row, *[self.padding_id] * (longest - len(row))] for row in rows]
        return Batch(torch.tensor(padded, dtype=torch.int64, device=self._device), [len(row) for row in rows])

    def _encoded(self, text: str) -> list[int]:
        """Encode a text; half a character (a lone surrogate, of a shell's or a JSON's wrong bytes) is refused."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{text!r:.60} is no text that has an encoding ({error.reason}); give UTF-8") from None
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def special_ids(self) -> list[int]:
        """Ids of the tokenizer's special tokens."""
        return list(self.tokenizer.all_special_ids)

    @property
    def padding_id(self) -> int:
        """What fills up shorter prompts; it is never looked at."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(id for id in known if id is not None)

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str = "right",
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch seq"]:
        """Turn text into token ids.

        Args:
            input: One text or several.
            prepend_bos: As in `read`.
            padding_side: Where shorter texts are filled up.
            move_to_device: Whether the ids go to the model's device.
            truncate: As in `read`; unlike TransformerLens', this cuts nothing unless asked to.

        Raises:
            UserError: As in `read`.
        """
        ids, lengths = self.read(input, prepend_bos=prepend_bos, truncate=truncate)
        if padding_side == "left":
            rows = zip(ids, lengths, strict=True)
            ids = torch.stack([row.roll(len(row) - length) for row, length in rows])
        return ids if move_to_device else ids.cpu()

    def to_string(self, tokens: Tensor | Sequence[int]) -> str | list[str]:
        """Turn token ids into text; those of a batch into a list."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [self.tokenizer.decode(row) for row in ids.tolist()]
        return self.tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(
        self, input: str | Sequence[str] | Tensor, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Turn text or the ids of one prompt into the text of each token; several texts into a list of these."""
        if not isinstance(input, str | Tensor) and all(isinstance(each, str) for each in input):
            return [self._pieces(text, prepend_bos) for text in input]
        return self._pieces(input, prepend_bos)

    def _pieces(self, input: Input, prepend_bos: bool | None) -> list[str]:
        ids = self.read(input, prepend_bos=prepend_bos, truncate=True).ids if isinstance(input, str) else input
        return [self.tokenizer.decode([id]) for id in torch.as_tensor(ids).reshape(-1).tolist()]

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            UserError: It is several.
        """
        ids = self._encoded(string)
        if len(ids) != 1:
            pieces = [self.tokenizer.decode([id]) for id in ids]
            raise UserError(f"string={string!r} is {len(ids)} tokens, {pieces}; give one that is a single token")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of one token."""
        return self.tokenizer.decode([int_token])
