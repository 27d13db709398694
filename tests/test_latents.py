import numpy as np
import pytest
import torch
from torch import Tensor

from saepipe.kept_contexts import AFTER, BEFORE, by_chance
from saepipe.latents import BINS, STRATA, LatentActivity

CONTEXTS, SEQ, D_SAE, TOP = 30, 40, 23, 4


@pytest.fixture(scope="module")
def read() -> tuple[Tensor, Tensor]:
    """Sparse activations of growing size, with ties, dead latents, and what must not count: sinks, NaN."""
    generator = torch.Generator().manual_seed(1)
    f = torch.rand(CONTEXTS, SEQ, D_SAE, generator=generator) * torch.logspace(-3, 2, CONTEXTS)[:, None, None]
    f *= torch.rand(f.shape, generator=generator) < torch.linspace(0.001, 0.4, D_SAE)
    f[:, :, 3] = 0
    f[:, :, 5] = (f[:, :, 5] > 0) * 2.0  # every activation the same, and a power of two
    f[17, 9, 7] = 3.0  # the only one of its latent
    f[:17, :, 7] = f[18:, :, 7] = f[17, :9, 7] = f[17, 10:, 7] = 0
    counted = torch.rand(CONTEXTS, SEQ, generator=generator) < 0.9
    counted[:, 0] = False
    counted[17, 9] = True
    f[:, 0] = 1e6
    f[4, 0] = torch.nan
    return f, counted


def observed(read: tuple[Tensor, Tensor], step: int) -> LatentActivity:
    f, counted = read
    activity = LatentActivity(D_SAE, contexts=TOP)
    for start in range(0, CONTEXTS, step):
        activity.update(start, f[start : start + step].clone(), counted[start : start + step])
    return activity


@pytest.fixture(scope="module")
def plain(read: tuple[Tensor, Tensor]) -> np.ndarray:
    f, counted = read
    return torch.where(counted[..., None], f, 0).numpy()


@pytest.mark.parametrize("step", [1, CONTEXTS])
def test_typical_is_the_mean_where_a_latent_is_active(
    read: tuple[Tensor, Tensor], plain: np.ndarray, step: int
) -> None:
    typical = observed(read, step).typical
    for latent in range(D_SAE):
        active = plain[:, :, latent][plain[:, :, latent] > 0]
        assert float(typical[latent]) == pytest.approx(active.mean() if len(active) else np.nan, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("step", [1, 7, CONTEXTS])
def test_top_contexts_are_those_of_brute_force(read: tuple[Tensor, Tensor], plain: np.ndarray, step: int) -> None:
    activity = observed(read, step)
    for latent in range(D_SAE):
        peaks = plain[:, :, latent].max(1)
        order = [int(c) for c in np.argsort(-peaks, kind="stable")[:TOP] if peaks[c] > 0]
        top = activity.top[latent]
        assert top.contexts.tolist()[: len(order)] == order
        assert top.values.tolist() == sorted(peaks.tolist())[: -TOP - 1 : -1]
        for rank, context in enumerate(order):
            position = int(plain[context, :, latent].argmax())
            assert top.positions[rank] == position
            assert top.windows[rank].tolist() == window(plain, context, position, latent)


def window(plain: np.ndarray, context: int, position: int, latent: int) -> list[float]:
    return np.pad(plain[context, :, latent], (BEFORE, AFTER))[position : position + BEFORE + 1 + AFTER].tolist()


@pytest.mark.parametrize("step", [1, 7, CONTEXTS])
def test_contexts_are_drawn_by_chance_from_all_that_fire_and_from_each_stratum(
    read: tuple[Tensor, Tensor], plain: np.ndarray, step: int
) -> None:
    activity = observed(read, step)
    for latent in range(D_SAE):
        peaks = plain[:, :, latent].max(1)
        active = torch.from_numpy(peaks > 0).nonzero().squeeze(1)
        order = active[by_chance(torch.full_like(active, latent), active).argsort(descending=True)].tolist()
        sampled = activity.sampled[latent]
        assert sampled.contexts.tolist()[: len(order)] == order[:4]
        assert (sampled.keys < 0).sum() == max(0, 4 - len(order))
        width = float(activity.histogram_top[latent]) / STRATA
        strata = activity.strata[latent]
        for stratum in range(STRATA):
            inside = [context for context in order if int(peaks[context] / width) == stratum]
            if not inside:
                assert strata.keys[stratum] < 0
                continue
            assert strata.contexts[stratum] == inside[0]
            position = int(plain[inside[0], :, latent].argmax())
            assert strata.windows[stratum].tolist() == window(plain, inside[0], position, latent)


@pytest.mark.parametrize("step", [1, 7, CONTEXTS])
def test_histograms_count_every_activation_in_its_bin(
    read: tuple[Tensor, Tensor], plain: np.ndarray, step: int
) -> None:
    activity = observed(read, step)
    flat = plain.reshape(-1, D_SAE)
    assert activity.fired.tolist() == (flat > 0).sum(0).tolist()
    assert activity.maxima.tolist() == flat.max(0).tolist()
    assert activity.tokens == int(read[1].sum())
    for latent in activity.fired.nonzero().squeeze(1).tolist():
        top = float(activity.histogram_top[latent])
        assert top / 2 <= flat[:, latent].max() < top
        active = flat[:, latent][flat[:, latent] > 0]
        assert activity.histogram[latent].tolist() == np.histogram(active, BINS, (0, top))[0].tolist()


def test_spread_draws_live_latents_evenly_by_density(read: tuple[Tensor, Tensor]) -> None:
    activity = observed(read, 5)
    fired = activity.fired
    live = sorted(fired.nonzero().squeeze(1).tolist(), key=lambda latent: (int(fired[latent]), latent))
    assert 3 not in live
    assert activity.spread(100) == sorted(live)
    assert activity.spread(1) == [live[len(live) // 2]]
    ranks = sorted(live.index(latent) for latent in activity.spread(7))
    assert len(ranks) == 7
    assert max(np.diff([-1, *ranks, len(live)])) <= 4


def test_nothing_fires() -> None:
    activity = LatentActivity(4, contexts=2)
    activity.update(0, torch.zeros(3, 5, 4), torch.ones(3, 5, dtype=torch.bool))
    assert activity.spread(3) == []
    assert activity.fired.tolist() == [0, 0, 0, 0]
