"""The next token is drawn from what is left of the distribution."""

import torch

from saepipe.sampling import Sampling

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
IDS = torch.zeros(4000, 1, dtype=torch.int64)


def shares(sampling: Sampling, logits: torch.Tensor = LOGITS) -> list[float]:
    chosen = sampling.choose(logits, IDS, torch.Generator().manual_seed(0))
    return [float((chosen == token).float().mean()) for token in range(4)]


def near(found: list[float], expected: list[float]) -> bool:
    return torch.allclose(torch.tensor(found), torch.tensor(expected), atol=0.03)


def test_shares_are_the_distributions() -> None:
    assert near(shares(Sampling()), [0.5, 0.3, 0.15, 0.05])
    halved = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    assert near(shares(Sampling(temperature=2.0)), (halved / halved.sum()).tolist())


def test_only_the_likeliest() -> None:
    assert near(shares(Sampling(top_k=2)), [5 / 8, 3 / 8, 0, 0])
    assert shares(Sampling(top_k=9)) == shares(Sampling())
    assert near(shares(Sampling(top_p=0.7)), [5 / 8, 3 / 8, 0, 0])
    assert near(shares(Sampling(top_p=0.81)), [50 / 95, 30 / 95, 15 / 95, 0])
    shuffled = LOGITS[:, [2, 0, 3, 1]]
    assert near(shares(Sampling(top_p=0.7), shuffled), [0, 5 / 8, 0, 3 / 8])
    assert shares(Sampling(do_sample=False)) == [1, 0, 0, 0]


def test_what_is_there_already_is_drawn_less() -> None:
    assert shares(Sampling(do_sample=False, freq_penalty=1.0)) == [0, 1, 0, 0]
