"""What latents are found to detect, where that was planted."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from saepipe import saes
from saepipe.config import ModelConfig
from saepipe.demo import corpus
from saepipe.demo.labelled_tokens import LabelledTokens
from saepipe.demo.truth import DOCUMENTS, Firings, Truth
from saepipe.language_model import LanguageModel

HOOK = "blocks.0.hook_resid_post"
D_SAE = 8


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(ModelConfig(name="demo", hooks=[HOOK], device="cpu"))


def read(model: LanguageModel, n: int = 60, **keys: int) -> LabelledTokens:
    return LabelledTokens.read(model, HOOK, islice(corpus.documents(seed=5), n), context_size=32, **keys)


@pytest.fixture(scope="module")
def tokens(model: LanguageModel) -> LabelledTokens:
    return read(model)


def on(tokens: LabelledTokens, name: str) -> Tensor:
    """Which tokens a concept is on."""
    place, concept = tokens.of(torch.arange(len(tokens.document)))
    found = torch.zeros(len(tokens.document), dtype=torch.bool)
    found[place[concept == tokens.names.index(name)]] = True
    return found


def firings(*latents: Tensor) -> Firings:
    """Make firings of latents from how strongly each is active on every token; further latents never are."""
    f = torch.zeros(len(latents[0]), D_SAE)
    for latent, values in enumerate(latents):
        f[:, latent] = values
    token, latent = f.nonzero(as_tuple=True)
    return Firings(token, latent, f[token, latent], D_SAE)


def test_labels_are_the_corpus_and_tokens_those_of_the_tokenizer(model: LanguageModel, tokens: LabelledTokens) -> None:
    number, document = 7, corpus.document(7, seed=5)
    encoded = model.tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False)
    first = int((tokens.document < number).sum())
    for place, labels in enumerate(corpus.token_labels(document, encoded["offset_mapping"])[:31]):
        _, concepts = tokens.of(torch.tensor([first + place]))
        text = model.tokenizer.decode([encoded["input_ids"][place]])
        assert [tokens.names[concept] for concept in concepts] == [*sorted(labels), f"token:{text}"]


def test_activations_are_those_of_a_document_alone_behind_bos(model: LanguageModel, tokens: LabelledTokens) -> None:
    ids = model.tokenizer(corpus.document(3, seed=5).text, add_special_tokens=False)["input_ids"][:31]
    alone = model.capture(torch.tensor([[model.tokenizer.bos_token_id, *ids]]), [HOOK])[HOOK][0, 1:]
    torch.testing.assert_close(tokens.activations[tokens.document == 3], alone.float())


def test_batching_changes_nothing(model: LanguageModel, tokens: LabelledTokens) -> None:
    one = read(model, batch_documents=7)
    torch.testing.assert_close(one.activations, tokens.activations)
    assert torch.equal(one.concepts, tokens.concepts)
    assert torch.equal(one.document, tokens.document)
    sae = saes.architecture("topk")(saes.architecture("topk").config_class(d_sae=64, k=4), 128)
    sae.initialise(torch.Generator().manual_seed(0))
    whole, parts = (Firings.of(sae, tokens.activations, batch_tokens=size) for size in (10_000, 37))
    assert torch.equal(whole.token, parts.token)
    assert torch.equal(whole.latent, parts.latent)
    assert len(whole.token) == 4 * len(tokens.document)


def test_a_latent_that_is_a_label_is_found_with_an_f1_of_1(tokens: LabelledTokens) -> None:
    digit, comma = on(tokens, "digit"), on(tokens, "punctuation:comma")
    truth = Truth(firings(comma.float(), digit.float() * 3), tokens)
    found = truth.judge(0.5)
    assert [found.concept_of(latent) for latent in range(3)] == ["punctuation:comma", "digit", None]
    assert found.precision[:2].tolist() == found.recall[:2].tolist() == [1, 1]
    assert found.share == 1
    best = {one.label: one for one in truth.best_latents()}
    assert (best["digit"].latent, best["digit"].f1) == (1, 1)
    assert (best["punctuation:comma"].latent, best["punctuation:comma"].f1) == (0, 1)
    assert best["digit"].frequency == pytest.approx(float(digit.float().mean()))
    assert best["case:capitalised"].f1 == 0  # neither is ever active there
    assert 0 < best["register:arithmetic"].f1 < 1


def test_weak_activations_count_below_the_threshold_only(tokens: LabelledTokens) -> None:
    digit = on(tokens, "digit").float()
    truth = Truth(firings(digit + 0.3 * (1 - digit)), tokens)
    assert truth.judge(0.0).share == 0
    assert truth.judge(0.25).share == 0
    assert truth.judge(0.5).share == 1
    assert truth.judge(0.0).counted == 1
    assert truth.judge(0.5).counted == pytest.approx(float(digit.mean()))
    assert next(one for one in truth.best_latents() if one.label == "digit").threshold == 0.5


def test_the_identity_of_a_token_is_a_concept_where_wanted(tokens: LabelledTokens) -> None:
    name = "token: the"
    truth = Truth(firings(on(tokens, name).float()), tokens)
    assert truth.judge(0.5, identity=True).concept_of(0) == name
    labels_only = truth.judge(0.5)
    assert labels_only.names[int(labels_only.chosen[0])] == "role:determiner"


def test_latents_at_random_detect_nothing(tokens: LabelledTokens) -> None:
    generator = torch.Generator().manual_seed(0)
    n = len(tokens.document)
    random = (torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.1) for _ in range(D_SAE))
    found = Truth(firings(*random), tokens).judge(0.5, identity=True)
    assert found.judged.all()
    assert found.share == 0
    low, high = found.interval
    assert low == 0
    assert high == pytest.approx(3.84 / (D_SAE + 3.84), abs=1e-3)  # Wilson's upper limit for none of 8


def test_a_latent_of_one_document_is_live_and_not_interpretable(tokens: LabelledTokens) -> None:
    few = (tokens.document < 2 * DOCUMENTS - 2).float()  # a document too few of each half
    one = (tokens.document == 4).float()
    found = Truth(firings(few * on(tokens, "digit"), one, one), tokens).judge(0.0)
    assert found.live.tolist() == [True] * 3 + [False] * (D_SAE - 3)
    assert not found.judged.any()
    assert found.share == 0


def test_what_one_half_chose_is_judged_by_the_other(tokens: LabelledTokens) -> None:
    digit, comma = on(tokens, "digit"), on(tokens, "punctuation:comma")
    judging = tokens.document % 2 == 1
    found = Truth(firings(torch.where(judging, comma, digit).float()), tokens).judge(0.0)
    assert found.names[int(found.chosen[0])] == "digit"
    assert found.precision[0] == 0
    assert found.concept_of(0) is None


def test_nothing_detects_the_labels_of_other_tokens(tokens: LabelledTokens) -> None:
    false = tokens.shifted()
    assert torch.equal(false.frequency.sum(0), tokens.frequency.sum(0))
    assert Truth(firings(on(tokens, "digit").float()), false).judge(0.5).share == 0


def test_documents_without_tokens_and_no_firings(model: LanguageModel) -> None:
    empty = replace(corpus.document(0), text="", spans=())
    some = LabelledTokens.read(model, HOOK, [empty, corpus.document(1), empty], context_size=32)
    assert set(some.document.tolist()) == {1}
    none = LabelledTokens.read(model, HOOK, [empty, empty], context_size=32)
    assert none.activations.shape == (0, 128)
    truth = Truth(firings(torch.zeros(len(some.document))), some)
    found = truth.judge(0.5)
    assert found.interval == (0, 1)
    assert not found.live.any()
    assert all(one.f1 == 0 for one in truth.best_latents())
    assert Truth(Firings.of(_topk(), none.activations), none.shifted()).best_latents() == []


def _topk() -> saes.SAE:
    cls = saes.architecture("topk")
    sae = cls(cls.config_class(d_sae=D_SAE, k=2), 128)
    sae.initialise(torch.Generator().manual_seed(0))
    return sae
