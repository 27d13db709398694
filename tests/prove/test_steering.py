"""A latent of a register steers the demo model into that register, and without it there is less of the register."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from saepipe import entry
from saepipe.cache import cache
from saepipe.demo import corpus
from saepipe.demo.corpus import Document
from saepipe.demo.registers import REGISTERS
from saepipe.hooked import HookedSAETransformer, load_model
from saepipe.reading import Texts, activations
from saepipe.saes.base import SAE
from saepipe.steering import Steer
from saepipe.train import train
from saepipe.typical import Typical

pytestmark = [pytest.mark.prove, pytest.mark.long, pytest.mark.timeout(1800)]

NAMES = list(REGISTERS)
CORPUS, JUDGE, JUDGED = 5, 77, 99
"""Seeds of documents: those that the latent is chosen on, those that the judge learns from, those it is tested on."""
WINDOW = 16
"""Tokens that are judged together."""


class Judge:
    """Naive Bayes: the register under whose token frequencies a window of tokens is likeliest. It knows of no SAE."""

    def __init__(self, model: HookedSAETransformer) -> None:
        counts = torch.full((len(NAMES), model.cfg.d_vocab), 0.5)
        for document in islice(corpus.documents(JUDGE), 2000):
            ids = torch.tensor(token_ids(model, document))
            counts[NAMES.index(document.register)] += torch.bincount(ids, minlength=counts.shape[1])
        self._log_share = (counts / counts.sum(1, keepdim=True)).log()

    def share(self, ids: Tensor, register: str) -> float:
        """Share of the windows of some texts [text, seq] that are of a register."""
        n = ids.shape[1] // WINDOW
        scores = self._log_share[:, ids[:, : n * WINDOW]].unflatten(2, (n, WINDOW)).sum(3)
        return float((scores.argmax(0) == NAMES.index(register)).float().mean())


def token_ids(model: HookedSAETransformer, document: Document) -> list[int]:
    return model.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.fixture(scope="module")
def model() -> HookedSAETransformer:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> SAE:
    """An SAE of the demo model with few latents, so that each of them stands for much."""
    folder = tmp_path_factory.mktemp("steering")
    places = [f"store.dir={folder}/store", f"run.dir={folder}/run", "model.device=cpu"]
    cache(entry.load_config("cache", ["+experiment=demo", *places, "store.tokens=400_000"]))
    sizes = ["sae.d_sae=128", "sae.k=4", "sae.dead_after_tokens=60_000", "train.tokens=600_000"]
    train(entry.load_config("train", ["+experiment=demo", *places, *sizes, "optim.lr_decay_steps=50"]))
    return SAE.load(folder / "run" / "sae")


@pytest.fixture(scope="module")
def judge(model: HookedSAETransformer) -> Judge:
    return Judge(model)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(islice(corpus.documents(CORPUS), 400))


@pytest.fixture(scope="module")
def chosen(model: HookedSAETransformer, sae: SAE, documents: list[Document]) -> tuple[str, int]:
    """The register, and its latent, with the best F1 of any: whether a token is the register's, by the corpus's labels.

    So both are chosen by what the latent reads, and by nothing that is generated.
    """
    fired = torch.zeros(len(NAMES), sae.d_sae)
    tokens = torch.zeros(len(NAMES))
    labels = iter(documents)
    for read in Texts(model, [document.text for document in documents], truncate=True).batches(16):
        for f, counted in zip(activations(model, sae, read), read.counted, strict=True):
            number = NAMES.index(next(labels).register)
            fired[number] += (f > 0).sum(0)
            tokens[number] += counted.sum()
    precision = fired / fired.sum(0).clamp(min=1)
    recall = fired / tokens[:, None]
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    number, latent = divmod(int(f1.argmax()), sae.d_sae)
    print(
        f"\nlatent {latent} for register:{NAMES[number]}: F1 {f1[number, latent]:.2f}, precision "
        f"{precision[number, latent]:.2f}, recall {recall[number, latent]:.2f}"
    )
    return NAMES[number], latent


@pytest.fixture(scope="module")
def typical(model: HookedSAETransformer, sae: SAE, documents: list[Document]) -> Typical:
    texts = Texts(model, [document.text for document in documents], truncate=True)
    return Typical.measure(model, sae, texts.batches(16))


def generated(model: HookedSAETransformer, prompts: Tensor, steer: Steer | None = None) -> Iterator[Tensor]:
    """What follows prompts [text, seq], 256 at a time, each with a seed of its own."""
    keys: dict[str, Any] = {"max_new_tokens": 2 * WINDOW, "stop_at_eos": False, "return_type": "tokens"}
    for seed, part in enumerate(prompts.split(256)):
        hooks = steer.fwd_hooks if steer else []
        yield model.generate(part, fwd_hooks=hooks, seed=seed, **keys)[:, prompts.shape[1] :]


def test_the_judge_knows_registers(model: HookedSAETransformer, judge: Judge) -> None:
    right = []
    for document in islice(corpus.documents(JUDGED), 300):
        ids = token_ids(model, document)
        if len(ids) >= WINDOW:
            right.append(judge.share(torch.tensor([ids]), document.register))
    print(f"\nthe judge is right of {sum(right) / len(right):.1%} of what it sees")
    assert sum(right) / len(right) > 0.95


def test_steering_raises_a_register_fivefold_and_ablating_lowers_it(
    model: HookedSAETransformer, sae: SAE, judge: Judge, chosen: tuple[str, int], typical: Typical
) -> None:
    register, latent = chosen
    nothing = torch.full((1024, 1), model.tokenizer.bos_token_id)

    def share(steer: Steer | None, prompts: Tensor = nothing) -> float:
        return judge.share(torch.cat(list(generated(model, prompts, steer))), register)

    plain, ablated = share(None), share(Steer(sae, [latent], "ablate"))
    steered = share(Steer(sae, {latent: 3.0}, typical=typical), nothing[:256])
    clamped = share(Steer(sae, {latent: 4.0}, "clamp", typical=typical), nothing[:256])
    away = share(Steer(sae, {latent: -2.0}, typical=typical))
    print(
        f"\nshare of {register}: {plain:.3f} as it is, {steered:.3f} at 3 times the typical activation "
        f"({steered / plain:.1f} times), {clamped:.3f} clamped at 4, {ablated:.3f} ablated, {away:.3f} at -2"
    )
    assert steered >= 5 * plain
    assert clamped >= 5 * plain
    assert ablated < plain
    assert away < plain


def test_ablating_lowers_a_register_that_has_begun(
    model: HookedSAETransformer, sae: SAE, judge: Judge, chosen: tuple[str, int], documents: list[Document]
) -> None:
    register, latent = chosen
    begun = [model.to_tokens(one.text, truncate=True)[0, :5] for one in documents if one.register == register][:16]
    prompts = torch.stack(begun).repeat(16, 1)
    plain = judge.share(torch.cat(list(generated(model, prompts))), register)
    ablated = judge.share(torch.cat(list(generated(model, prompts, Steer(sae, [latent], "ablate")))), register)
    print(f"\nshare of {register} after its first four tokens: {plain:.3f} as it is, {ablated:.3f} ablated")
    assert ablated < plain - 0.02
