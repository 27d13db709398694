"""Latents that tell two sets of texts apart are found, with intervals that hold what they promise."""

import pytest
import torch
from small_finished import HOOK
from small_hooked import make

from saepipe.errors import UserError
from saepipe.hooked import load_model
from saepipe.reading import Texts
from saepipe.separation import Summary, separate

PLANTED, SHIFT = 17, 1.5


def drawn(generator: torch.Generator, n: int, shift: float) -> torch.Tensor:
    """Values of 40 latents in some texts; the planted one is shifted, and the last never fires."""
    values = torch.randn(n, 40, generator=generator)
    values[:, PLANTED] += shift
    values[:, -1] = 0
    return values


def test_a_planted_latent_is_found_and_its_intervals_hold_it() -> None:
    generator = torch.Generator().manual_seed(1)  # how often intervals hold the truth is another test's
    found = separate(drawn(generator, 60, SHIFT), drawn(generator, 50, 0.0))
    assert found.best(3)[0] == PLANTED
    truth = float(torch.special.ndtr(torch.tensor(SHIFT / 2**0.5)))  # of two normal variables of variance 1
    for interval, true in ((found.auroc_interval, truth), (found.difference_interval, SHIFT)):
        low, high = interval[:, PLANTED].tolist()
        assert low < true < high
    assert found.p_adjusted[PLANTED] == pytest.approx(1 / 1001)
    others = [latent for latent in range(40) if latent != PLANTED]
    assert float(found.p_adjusted[others].min()) > 0.05
    assert (found.auroc[-1], found.difference[-1], found.p_adjusted[-1]) == (0.5, 0, 1)
    assert 39 not in found.best(40)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(25, 2000, generator=generator) + 0.8, torch.randn(30, 2000, generator=generator)
    found = separate(a, b, resamples=300)
    truth = float(torch.special.ndtr(torch.tensor(0.8 / 2**0.5)))
    for interval, true in ((found.auroc_interval, truth), (found.difference_interval, 0.8)):
        held = ((interval[0] <= true) & (true <= interval[1])).float().mean()
        assert 0.92 < float(held) < 0.98


def test_p_values_hold_for_all_latents_together() -> None:
    lowest = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(12, 50, generator=generator).relu() for _ in range(2))
        lowest.append(float(separate(a, b, resamples=100, seed=seed).p_adjusted.min()))
    assert sum(p <= 0.1 for p in lowest) <= 13  # 6 are expected, and 14 or more once in 700
    assert sum(p <= 0.5 for p in lowest) >= 20


def test_auroc_counts_pairs_and_halves_ties() -> None:
    a, b = torch.tensor([[0.0], [2.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    pairs = [(x > y) + 0.5 * (x == y) for x in a[:, 0].tolist() for y in b[:, 0].tolist()]
    assert separate(a, b, resamples=100).auroc[0] == pytest.approx(sum(pairs) / 12)


def test_a_faultless_separation_has_an_interval_that_depends_on_the_number_of_texts() -> None:
    few, many = (separate(torch.ones(n, 1), torch.zeros(n, 1), resamples=100) for n in (5, 50))
    assert few.auroc[0] == many.auroc[0] == 1
    assert few.auroc_interval[0, 0] < many.auroc_interval[0, 0] < 1
    assert few.auroc_interval[1, 0] == 1


def test_it_is_repeatable_and_does_not_depend_on_how_latents_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = drawn(generator, 9, 1.0), drawn(generator, 8, 0.0)
    whole = separate(a, b, resamples=100, seed=3)
    monkeypatch.setattr("saepipe.separation._CHUNK", 1000)
    parts = separate(a, b, resamples=100, seed=3)
    for name, value in vars(whole).items():
        torch.testing.assert_close(vars(parts)[name], value)


def test_texts_are_summed_up_over_the_tokens_that_count() -> None:
    model, sae = load_model("demo", device="cpu"), make(HOOK, 128)
    texts = ["GET /index.html HTTP/1.1", "Dear Sir"]
    every = [sae.encode(model.run_with_cache(text, names_filter=[HOOK])[1][HOOK])[0, 1:].detach() for text in texts]
    for measure, by_hand in (("mean", lambda f: f.mean(0)), ("max", lambda f: f.amax(0))):
        found = Summary.measure(model, sae, Texts(model, texts).batches(2), measure)
        torch.testing.assert_close(found.values, torch.stack([by_hand(f) for f in every]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.active, torch.stack([(f > 0).any(0).float() for f in every]))
    with pytest.raises(UserError, match="measure=median is not known"):
        Summary.measure(model, sae, [], "median")


@pytest.mark.parametrize("keys", [{"confidence": 1.0}, {"confidence": 95}, {"resamples": 0}])
def test_what_nothing_can_be_drawn_for_is_refused(keys: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(keys))}="):
        separate(torch.rand(3, 2), torch.rand(3, 2), **keys)  # type: ignore[arg-type]


def test_one_text_is_no_set() -> None:
    with pytest.raises(UserError, match="set B holds 1 text; give at least two"):
        separate(torch.ones(3, 2), torch.ones(1, 2))
