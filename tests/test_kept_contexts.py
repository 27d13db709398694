import torch

from saepipe.kept_contexts import FREE, KeptContexts, Peaks, by_chance, by_strength


def test_keys_by_strength_rank_as_the_values_do_and_the_earlier_context_first() -> None:
    values = torch.tensor([1e-30, 0.1, 0.5, 0.5, 3e20])
    contexts = torch.tensor([5, 9, 8, 7, 1 << 30])
    keys = by_strength(values, contexts)
    assert keys.argsort().tolist() == [0, 1, 2, 3, 4]
    assert (keys > FREE).all()


def test_keys_by_chance_are_even_and_independent_of_each_other() -> None:
    contexts = torch.arange(20_000)
    one, other = (by_chance(torch.full_like(contexts, latent), contexts).double() / 2**63 for latent in (3, 4))
    assert (one >= 0).all()
    assert abs(float(one.mean()) - 0.5) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1])) < 0.03
    assert len(set(one.tolist())) == len(contexts)


def test_a_group_moves_into_one_that_holds_something() -> None:
    kept = KeptContexts(3, 2)
    f = torch.zeros(4, 5, 1)
    f[torch.arange(4), torch.tensor([0, 1, 4, 2]), 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    groups, keys = torch.tensor([0, 0, 2, 2]), torch.tensor([10, 30, 20, 40])
    order = kept.wanted(groups, keys)
    assert order.tolist() == [1, 0, 3, 2]
    kept.put(groups[order], Peaks.of(f, 100, order, torch.zeros_like(order), keys[order]))
    kept.regroup(torch.tensor([False, False, True]), torch.tensor([0, 1, 0]))
    assert kept.peaks.keys.tolist() == [[40, 30], [FREE, FREE], [FREE, FREE]]
    assert kept.peaks.contexts[0].tolist() == [103, 101]
    assert kept.peaks.positions[0].tolist() == [2, 1]
    assert kept.peaks.values[0].tolist() == [4.0, 2.0]
