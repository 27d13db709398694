"""Texts and contexts are read with the same rules of what counts."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from small_finished import HOOK, SEQ, make
from small_hooked import make as make_sae

from saepipe import reading
from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer, load_model
from saepipe.latents import Contexts
from saepipe.reading import Texts
from saepipe.token_store import TokenStore


@pytest.fixture(scope="module")
def model() -> HookedSAETransformer:
    return load_model("demo", device="cpu")


def test_texts_are_padded_and_special_tokens_and_position_0_do_not_count(model: HookedSAETransformer) -> None:
    texts = ["GET /index.html", "Dear Sir", "x"]
    (first, second) = Texts(model, texts).batches(2)
    lengths = [model.to_tokens(text).shape[1] for text in texts]
    assert first.ids.shape == (2, max(lengths[:2]))
    for row, length in zip(range(2), lengths[:2], strict=True):
        assert first.ids[row, :length].tolist() == model.to_tokens(texts[row])[0].tolist()
        assert first.counted[row].tolist() == [0 < place < length for place in range(first.ids.shape[1])]
        assert first.predicting[row].tolist() == [0 < place < length - 1 for place in range(first.ids.shape[1] - 1)]
    assert second.ids.shape == (1, lengths[2])


def test_a_special_token_inside_a_text_does_not_count(model: HookedSAETransformer) -> None:
    end = model.tokenizer.eos_token
    (read,) = Texts(model, [f"one{end}two"]).batches(1)
    where = read.ids[0].tolist().index(model.tokenizer.eos_token_id)
    assert where > 0
    assert not read.counted[0, where]
    assert read.counted[0, where + 1]


def test_contexts_are_read_by_the_same_rules(tmp_path: Path, model: HookedSAETransformer) -> None:
    side = TokenStore.open(make(tmp_path) / "store" / "tokens").heldout
    (read,) = reading.contexts(Contexts(TokenStore.open(tmp_path / "store" / "tokens"), 3 * SEQ), 9)
    assert read.ids.shape == (3, SEQ)
    special = torch.isin(read.ids, torch.tensor(model.special_ids))
    assert np.isin(side.ids, model.special_ids).any()
    assert torch.equal(read.counted, ~special & (torch.arange(SEQ) > 0))
    assert torch.equal(read.predicting, read.counted[:, :-1])


def test_padding_changes_no_activation(model: HookedSAETransformer) -> None:
    sae = make_sae(HOOK, 128)
    texts = ["GET /index.html HTTP/1.1 and more", "Dear Sir"]
    (both,) = Texts(model, texts).batches(2)
    (alone,) = Texts(model, texts[1:]).batches(1)
    f = reading.activations(model, sae, both)
    length = alone.ids.shape[1]
    torch.testing.assert_close(f[1:, :length], reading.activations(model, sae, alone), atol=1e-4, rtol=1e-4)
    assert not f[1, length:].any()
    assert not f[:, 0].any()
    assert f[1].any()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "texts holds no text; give at least one"),
        ("one text", "texts='one text' is one text; give a list"),
        (["fine", ""], "texts: text 2, '' holds no token that counts"),
        (["word " * 300], "texts: text 1, 'word word .* tokens, more than the 256"),
    ],
)
def test_what_cannot_be_read_is_refused(model: HookedSAETransformer, texts: Sequence[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Texts(model, texts)


def test_activations_that_are_no_numbers_are_refused(model: HookedSAETransformer) -> None:
    sae = make_sae(HOOK, 128)
    with torch.no_grad():
        sae.b_dec[0] = torch.inf
    with pytest.raises(UserError, match=f"latents of the SAE at {HOOK} hold NaN or infinity"):
        reading.activations(model, sae, next(Texts(model, ["GET /index.html"]).batches(1)))


def test_what_is_too_long_is_cut_where_that_is_asked_for(model: HookedSAETransformer) -> None:
    assert len(Texts(model, ["word " * 300], truncate=True).rows[0]) == 256


def test_texts_come_from_paragraphs_or_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nmore\n\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"said": "three"}) + "\n")
    for column in ("text", "said"):  # a txt has no columns
        assert reading.texts_of(str(tmp_path / "a.txt"), column, "k") == ["one\nmore", "two"]
    assert reading.texts_of(str(tmp_path / "b.jsonl"), "said", "k") == ["three"]


@pytest.mark.parametrize(
    ("name", "content", "column", "said"),
    [
        ("no.txt", None, "text", r"contrast.a=.*no.txt does not exist"),
        ("a.txt", "\n\n", "text", r"contrast.a=.*a.txt holds no text"),
        ("a.jsonl", '{"text": 5}', "text", r"contrast.a=.*: row 1 of column text is 5, and no text"),
        (
            "a.jsonl",
            '{"text": "x"}',
            "sais",
            r"contrast.a=.*a.jsonl: contrast.column=sais is not known; choose from text",
        ),
        ("a.bin", "x", "text", r"contrast.a=.*a.bin holds no data that is known"),
    ],
)
def test_files_without_texts_are_refused(
    tmp_path: Path, name: str, content: str | None, column: str, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        reading.texts_of(str(tmp_path / name), column, "contrast.a", "contrast.column")
