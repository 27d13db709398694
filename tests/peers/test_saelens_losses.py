"""For equal weights and inputs, every loss term and gradient is SAELens's (`make peers` runs this beside sae-lens)."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from saepipe import saes
from saepipe.saes.base import SAE, Step

sae_lens = pytest.importorskip("sae_lens")

D_IN, D_SAE, TOKENS = 24, 96, 128
DEAD = torch.tensor([1, 4, 30, 31, 70, 95])
MANY_DEAD = torch.arange(0, D_SAE, 3)  # more than k_aux = d_in // 2
WIDTHS = [8, 24, 48]


@dataclasses.dataclass
class Case:
    """An architecture with some of its keys, and what SAELens calls both."""

    name: str
    keys: dict[str, Any]
    theirs: str
    their_keys: dict[str, Any]
    dead: Tensor = dataclasses.field(default_factory=lambda: DEAD)
    coefficients: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.keys.items())])


def _jumprelu(coefficient: float = 2.5, **keys: Any) -> Case:
    renamed = {"sparsity_loss", "tanh_scale", "init_threshold", "bandwidth", "ste_to_input"}
    names = {key: f"jumprelu_{key}" for key in renamed} | {"sparsity_loss": "jumprelu_sparsity_loss_mode"}
    keys = {"bandwidth": 0.2, **keys}
    theirs = {names.get(key, key): value for key, value in keys.items()}
    return Case(
        "jumprelu", {"l0_coefficient": coefficient, **keys}, "JumpReLU", theirs, coefficients={"l0": coefficient}
    )


def _ranked(name: str, theirs: str, dead: Tensor = DEAD, **keys: Any) -> Case:
    their_keys = dict(keys)
    if "matryoshka_widths" in keys:
        their_keys["matryoshka_widths"] = [*keys["matryoshka_widths"], D_SAE]
    return Case(name, keys, theirs, their_keys, dead)


CASES = [
    Case("standard", {"l1_coefficient": 3.0}, "Standard", {}, coefficients={"l1": 3.0}),
    Case("gated", {"l1_coefficient": 0.7}, "Gated", {}, coefficients={"l1": 0.7}),
    _jumprelu(),
    _jumprelu(ste_to_input=True),
    _jumprelu(sparsity_loss="tanh", tanh_scale=3.0),
    _jumprelu(sparsity_loss="tanh", ste_to_input=True, pre_act_loss_coefficient=0.3),
    _jumprelu(sparsity_loss="quadratic", target_l0=10.0),
    *(
        _ranked(name, theirs, dead, k=6, aux_loss_coefficient=0.8, rescale_acts_by_decoder_norm=rescale, **more)
        for name, theirs, more in [
            ("topk", "TopK", {}),
            ("batchtopk", "BatchTopK", {}),
            ("matryoshka", "MatryoshkaBatchTopK", {"matryoshka_widths": WIDTHS}),
        ]
        for rescale in (True, False)
        for dead in (DEAD, MANY_DEAD)
    ),
]


def _data() -> Tensor:
    return 2 * torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(3)) + 0.5


def _mine(case: Case, apply_b_dec: bool) -> SAE:
    cls = saes.architecture(case.name)
    cfg = cls.config_class(d_sae=D_SAE, normalize_activations="none", apply_b_dec_to_input=apply_b_dec, **case.keys)
    sae = cls(cfg, D_IN)
    generator = torch.Generator().manual_seed(7)
    sae.initialise(generator)
    with torch.no_grad():  # as after some training
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + 0.1 * noise).abs() if name == "threshold" else parameter + 0.2 * noise)
    return sae


def _theirs(case: Case, apply_b_dec: bool, weights: dict[str, Tensor]) -> Any:
    keys = {"normalize_activations": "none", "apply_b_dec_to_input": apply_b_dec, **case.their_keys}
    cfg = getattr(sae_lens, f"{case.theirs}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **keys)
    sae = getattr(sae_lens, f"{case.theirs}TrainingSAE")(cfg)
    sae.load_state_dict({**sae.state_dict(), **{name: value.clone() for name, value in weights.items()}})
    return sae


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_terms_and_gradients(case: Case, apply_b_dec: bool) -> None:
    from sae_lens.saes.sae import TrainStepInput

    mine, x = _mine(case, apply_b_dec), _data()
    theirs = _theirs(case, apply_b_dec, dict(mine.named_parameters()))
    losses = mine.loss(x, x, Step(10**6, case.dead))
    losses.total.backward()
    mask = torch.zeros(D_SAE, dtype=torch.bool).index_fill_(0, case.dead, True)
    done = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=case.coefficients, dead_neuron_mask=mask, n_training_steps=0, is_logging_step=False
        )
    )
    done.loss.backward()
    assert losses.terms.keys() == done.losses.keys()
    for name, term in done.losses.items():
        assert losses.terms[name].item() == pytest.approx(term.item(), rel=1e-5), name
    assert losses.total.item() == pytest.approx(done.loss.item(), rel=1e-5)
    theirs_by_name = dict(theirs.named_parameters())
    assert dict(mine.named_parameters()).keys() == theirs_by_name.keys()
    for name, parameter in mine.named_parameters():
        expected = theirs_by_name[name].grad
        assert parameter.grad is not None
        assert expected.norm() > 0
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_thresholds_move_as_theirs(name: str) -> None:
    from sae_lens.saes.sae import TrainStepInput

    case = next(case for case in CASES if case.name == name)
    mine = _mine(case, True)
    theirs = _theirs(case, True, dict(mine.named_parameters()))
    for step in range(5):
        x = _data() * (1 + step)
        mine.after_step(mine.loss(x, x, Step(step)))
        theirs.training_forward_pass(
            TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
        )
    assert float(mine.get_buffer("threshold")) == pytest.approx(float(theirs.topk_threshold), rel=1e-6)
