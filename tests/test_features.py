import pytest
import torch

from saepipe.feature_page import Excerpt
from saepipe.features import BANDS, PER_BAND, _bands, _label
from saepipe.kept_contexts import FREE, Peaks
from saepipe.latents import STRATA


@pytest.mark.parametrize("maximum", [2.01, 2.5, 3.3, 3.99])
@pytest.mark.parametrize("filled", [0.1, 0.5, 1.0])
def test_a_range_has_contexts_wherever_one_of_its_strata_has(maximum: float, filled: float) -> None:
    generator = torch.Generator().manual_seed(0)
    width = 4 / STRATA
    strata = Peaks.none(1, STRATA, "cpu")[0]
    middles = ((torch.arange(STRATA) + 0.5) * width).clamp(max=maximum)
    taken = (torch.rand(STRATA, generator=generator) < filled) & (torch.arange(STRATA) * width <= maximum)
    taken[int(maximum / width)] = True
    strata.keys[:] = torch.where(taken, torch.randperm(1000, generator=generator)[:STRATA], FREE)
    strata.values[:] = torch.where(taken, middles, 0)
    found = _bands(strata, 4.0, maximum)
    assert len(found) == BANDS
    high = maximum + 1e-6
    for low, drawn in found:
        inside = taken & (middles >= low) & (middles < high)
        kept = drawn.keys >= 0
        assert int(kept.sum()) == min(PER_BAND, int(inside.sum()))
        assert set(drawn.keys[kept].tolist()) == set(
            strata.keys[inside].sort(descending=True).values[:PER_BAND].tolist()
        )
        assert drawn.values.tolist() == sorted(drawn.values.tolist(), reverse=True)
        high = low
    assert high == 0


def test_a_label_is_of_the_most_frequent_strongest_tokens() -> None:
    words = [" the", "The", " the", "a", "a", "a", " ", "b"]
    excerpts = [Excerpt([("before", 0.5), (word, 1.0), ("after", 0.9)]) for word in words]
    assert _label(excerpts) == "a · the · The"
    assert _label(excerpts[6:]) == "␣ · b"
