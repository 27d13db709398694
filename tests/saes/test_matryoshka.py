import pytest
import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.saes.base import Step
from saepipe.saes.matryoshka import MatryoshkaConfig, MatryoshkaSAE

D_IN, D_SAE, TOKENS = 6, 40, 12


def make(**values: object) -> tuple[MatryoshkaSAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, D_IN, generator=generator) + 0.5
    keys = {"d_sae": D_SAE, "k": 5.0, "matryoshka_widths": [4, 10, 30], **values}
    sae = MatryoshkaSAE(MatryoshkaConfig(**keys), D_IN)  # type: ignore[arg-type]
    sae.initialise(generator, mean=x.mean(0), norm_scale=1.5)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 5, D_SAE)[:, None])
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE, generator=generator))
    return sae.double(), x.double()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rescale", [True, False])
def test_loss_is_written_out_width_by_width(rescale: bool, reduction: str) -> None:
    sae, x = make(rescale_acts_by_decoder_norm=rescale, mse_reduction=reduction, dead_method="none")
    target = 1.5 * x
    pre = (target - sae.b_dec) @ sae.W_enc + sae.b_enc
    ranked = pre * sae.W_dec.norm(dim=1) if rescale else pre
    smallest = ranked.flatten().topk(5 * TOKENS).values[-1]
    f = torch.where(ranked >= smallest, pre.relu(), 0.0)
    expected = {}
    for width, name in [(D_SAE, "mse_loss"), *((width, f"inner_mse_loss_{width}") for width in (4, 10, 30))]:
        squared = (target - f[:, :width] @ sae.W_dec[:width] - sae.b_dec).square()
        expected[name] = squared.sum() / TOKENS / (D_IN if reduction == "mean" else 1)
    losses = sae.loss(x, x, Step())
    assert losses.terms.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(losses.terms[name], term)
    torch.testing.assert_close(losses.notes["topk_threshold"], smallest.detach())
    assert losses.l0 == 5
    parameters = list(sae.parameters())
    theirs = torch.autograd.grad(sum(expected.values()), parameters)
    for mine, their in zip(torch.autograd.grad(losses.total, parameters), theirs, strict=True):
        torch.testing.assert_close(mine, their)


def test_the_last_latents_change_no_inner_term() -> None:
    sae, x = make()
    before = sae.loss(x, x, Step()).terms
    with torch.no_grad():
        sae.W_dec[30:] = sae.W_dec[30:].flip(1)  # of the same norms, so that the same latents are kept
    after = sae.loss(x, x, Step()).terms
    assert after["mse_loss"] != before["mse_loss"]
    assert all(after[name] == before[name] for name in before if name.startswith("inner"))


def test_an_inner_autoencoder_without_an_active_latent_is_its_bias() -> None:
    sae, x = make()
    with torch.no_grad():
        sae.b_enc[:4] = -100
    terms = sae.loss(x, x, Step()).terms
    torch.testing.assert_close(terms["inner_mse_loss_4"], (1.5 * x - sae.b_dec).square().sum(1).mean())


def test_widths_by_default_are_the_papers() -> None:
    assert MatryoshkaSAE(MatryoshkaConfig(d_sae=65_536), 4).inner_widths == [2048, 6144, 14_336, 30_720]
    assert MatryoshkaSAE(MatryoshkaConfig(d_sae=40), 4).inner_widths == [1, 3, 8, 18]
    assert MatryoshkaSAE(MatryoshkaConfig(d_sae=8, k=2.0), 4).inner_widths == [1, 3]  # an eighth of none is left out
    assert make()[0].inner_widths == [4, 10, 30]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"matryoshka_widths": []}, ["sae.matryoshka_widths=[]", "null"]),
        ({"matryoshka_widths": [0, 4]}, ["sae.matryoshka_widths=[0, 4]"]),
        ({"matryoshka_widths": [8, 4]}, ["sae.matryoshka_widths=[8, 4] do not rise"]),
        ({"matryoshka_widths": [4, 4]}, ["sae.matryoshka_widths=[4, 4] do not rise"]),
        ({"matryoshka_widths": [4, 41]}, ["sae.matryoshka_widths=[4, 41]", "40 latents"]),
        ({"k": 41.0}, ["sae.k=41", "at most 40"]),
        ({"k": 0.0}, ["sae.k=0.0", "above 0"]),
        ({"topk_threshold_lr": 1.5}, ["sae.topk_threshold_lr=1.5", "at most 1"]),
    ],
)
def test_impossible_values_are_refused_by_key(values: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert all(word in str(caught.value) for word in words), caught.value
