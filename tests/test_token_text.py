from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saepipe.demo import MODEL_DIR
from saepipe.token_text import Piece, TokenText


@pytest.fixture(scope="module")
def demo() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def wrapped(model: models.Model, decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def vocabulary(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


@pytest.mark.parametrize(
    "text", ["GET /index HTTP/1.1", "שלום, עולם! מה שלומך?", "naïve — “quotes” €5", "emoji 👩‍🚀 and 漢字", "a  b   c"]
)
def test_pieces_spell_the_text_and_cover_every_token_once(demo: PreTrainedTokenizerFast, text: str) -> None:
    ids = demo(text, add_special_tokens=False)["input_ids"]
    pieces = TokenText(demo).pieces(ids)
    assert "".join(piece.text for piece in pieces) == text
    assert not any(piece.broken for piece in pieces)
    assert [token for piece in pieces for token in range(piece.start, piece.stop)] == list(range(len(ids)))


def test_a_character_in_several_tokens_is_one_piece_at_its_first_byte(demo: PreTrainedTokenizerFast) -> None:
    text = TokenText(demo)
    single = {text.bytes_of(i): i for i in range(len(demo)) if len(text.bytes_of(i)) == 1}
    euro = [single[bytes([byte])] for byte in b"\xe2\x82\xac"]
    a = single[b"a"]
    assert text.pieces([a, *euro, a]) == [
        Piece("a", 0, 1, False),
        Piece("€", 1, 4, False),
        Piece("a", 4, 5, False),
    ]
    cut = text.pieces([*euro[1:], a, euro[0]])
    assert [(piece.text, piece.broken) for piece in cut] == [
        ("\\x82", True),
        ("\\xac", True),
        ("a", False),
        ("\\xe2", True),
    ]


def test_what_cannot_be_seen_is_made_visible(demo: PreTrainedTokenizerFast) -> None:
    text = "a\n\tb\x00\x1b\x7f\x85\u202ec\u2066\ufeff\u2028"
    ids = demo(text, add_special_tokens=False)["input_ids"]
    shown = "".join(piece.text for piece in TokenText(demo).pieces(ids))
    assert shown == "a↵⇥b␀␛␡\\u{85}\\u{202e}c\\u{2066}\\u{feff}\\u{2028}"


def test_special_tokens_and_ids_without_a_token_are_named(demo: PreTrainedTokenizerFast) -> None:
    beyond = len(demo) + 7
    text = "".join(piece.text for piece in TokenText(demo).pieces([demo.bos_token_id, beyond]))
    assert text == f"{demo.bos_token}<{beyond}>"


def test_sentencepiece_with_byte_fallback() -> None:
    words = vocabulary("<unk>", "▁Hi", "▁", "there", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>")
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = TokenText(wrapped(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True), decoder))
    assert [piece.text for piece in text.pieces([1, 2, 3, 4, 5, 6, 7])] == [" Hi", " ", "there", "€", "↵"]


def test_word_pieces_and_whole_words() -> None:
    pieces = wrapped(models.WordPiece(vocabulary("[UNK]", "play", "##ing"), unk_token="[UNK]"), decoders.WordPiece())
    assert [piece.text for piece in TokenText(pieces).pieces([1, 2, 1])] == [" play", "ing", " play"]
    words = wrapped(models.WordLevel(vocabulary("[UNK]", "one", "two"), unk_token="[UNK]"), None)
    assert [piece.text for piece in TokenText(words).pieces([1, 2])] == [" one", " two"]


def test_saved_tokenizers_read_the_same(demo: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    demo.save_pretrained(tmp_path)
    first, again = TokenText(demo), TokenText(AutoTokenizer.from_pretrained(tmp_path))
    assert [again.bytes_of(i) for i in range(len(demo))] == [first.bytes_of(i) for i in range(len(demo))]


def test_a_token_with_a_whole_character_before_a_cut_one_is_not_broken() -> None:
    text = TokenText(wrapped(models.WordLevel(vocabulary("[UNK]", "Ġ×"), unk_token="[UNK]"), decoders.ByteLevel()))
    assert text.pieces([1]) == [Piece(" \\xd7", 0, 1, False)]
