"""Text becomes token ids by TransformerLens' habits, or is refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch

from saepipe.errors import UserError
from saepipe.prompts import Prompts


def made(*, bos: bool = True, eos: bool = True, prepend_bos: bool = True, limit: int | None = 64) -> Prompts:
    return Prompts(
        small_models.tokenizer(bos=bos, eos=eos),
        name="small",
        device=torch.device("cpu"),
        context_limit=limit,
        prepend_bos=prepend_bos,
    )


def test_tokens_begin_with_bos() -> None:
    prompts = made()
    assert prompts.to_tokens("the dog").shape == (1, 3)
    assert prompts.to_tokens("the dog")[0, 0] == 0
    assert prompts.to_tokens("the dog", prepend_bos=False)[0, 0] != 0
    assert prompts.to_tokens("<bos>the dog").tolist() == prompts.to_tokens("the dog").tolist()
    assert made(prepend_bos=False).to_tokens("the dog").shape == (1, 2)
    assert made(bos=False).to_tokens("the dog")[0, 0] != 0
    with pytest.raises(UserError, match=r"prepend_bos=True needs a beginning-of-sequence token"):
        made(bos=False).to_tokens("the dog", prepend_bos=True)


def test_shorter_texts_are_padded() -> None:
    prompts = made()
    texts = ["the brown dog with", "the dog"]
    batch = prompts.read(texts)
    assert batch.lengths == [5, 3]
    assert batch.ids[1, :3].tolist() == prompts.to_tokens("the dog")[0].tolist()
    assert batch.ids[1, 3:].tolist() == [1, 1]
    left = prompts.to_tokens(texts, padding_side="left")
    assert left[1].tolist() == [1, 1, *batch.ids[1, :3].tolist()]
    assert made(eos=False).to_tokens(texts)[1, -1] == 0


def test_back_to_text() -> None:
    prompts = made()
    text = "the brown dog"
    ids = prompts.to_tokens(text, prepend_bos=False)
    assert prompts.to_string(ids) == [text]
    assert prompts.to_string(ids[0]) == prompts.to_string(ids[0].tolist()) == text
    assert prompts.to_str_tokens(text) == ["<bos>", "the", " brown", " dog"]
    assert prompts.to_str_tokens(ids) == ["the", " brown", " dog"]
    assert prompts.to_str_tokens([text, "the"]) == [["<bos>", "the", " brown", " dog"], ["<bos>", "the"]]
    assert prompts.to_single_str_token(prompts.to_single_token(" dog")) == " dog"
    with pytest.raises(UserError, match=r"string=' dog many' is 2 tokens, \[' dog', ' many'\]; give one"):
        prompts.to_single_token(" dog many")


def test_the_context_is_a_limit() -> None:
    prompts = made(limit=4)
    text = "the brown dog was with"
    with pytest.raises(UserError, match=r"input has 6 tokens, more than the 4 that small can read; give fewer"):
        prompts.to_tokens(text)
    assert prompts.to_tokens(text, truncate=True).shape == (1, 4)
    assert made(limit=None).to_tokens("the " * 300).shape[1] > 300


@pytest.mark.parametrize("empty", [[], torch.zeros(1, 0, dtype=torch.int64)])
def test_nothing_to_read(empty: object) -> None:
    with pytest.raises(UserError, match=r"input holds a prompt without a token"):
        made().read(empty)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"input holds a prompt without a token"):
        made(prepend_bos=False).read("")


@pytest.mark.parametrize("ids", [torch.ones(2, 3), torch.ones(1, 2, 3, dtype=torch.int64), torch.ones(3) > 0])
def test_what_is_no_batch_of_ids(ids: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"input is torch.* of shape \[.*; give token ids, \[batch, seq\] or \[seq\]"):
        made().read(ids)


@pytest.mark.parametrize("ids", [[[1, 2], [3]], [1, "a"], [b"a"]])
def test_what_is_neither_text_nor_ids(ids: Any) -> None:
    with pytest.raises(UserError, match="input is neither text nor token ids"):
        made().read(ids)


@pytest.mark.parametrize("id", [-1, small_models.VOCAB])
def test_ids_that_the_model_does_not_know(id: int) -> None:
    prompts = Prompts(
        None, name="small", device=torch.device("cpu"), context_limit=None, prepend_bos=True, vocab_size=320
    )
    with pytest.raises(UserError, match=rf"input has the token id {id}, and small has 320 tokens"):
        prompts.read([[0, 319], [id, 0]])


def test_without_a_tokenizer(tmp_path: Path) -> None:
    prompts = Prompts(None, name="small", device=torch.device("cpu"), context_limit=None, prepend_bos=True)
    assert prompts.read([3, 4]).ids.tolist() == prompts.read([[3, 4]]).ids.tolist() == [[3, 4]]
    with pytest.raises(UserError, match=r"model small has no tokenizer; give token ids"):
        prompts.to_tokens("the dog")
