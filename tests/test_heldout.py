"""The figures on held-out rows, against a plain computation on activations that are known."""

from pathlib import Path

import numpy as np
import pytest
import small_store
import torch
from small_store import CONTEXT_SIZE, HOOKS
from torch import Tensor

from saepipe import heldout, saes
from saepipe.heldout import measure
from saepipe.saes.base import SAE
from saepipe.store import Store

HOOK, TARGET = HOOKS
CONTEXTS = 5


def ordinary_rows(hook: str) -> Tensor:
    """The held-out rows as they were written, without position 0 and the special token 1."""
    rows = small_store.activations(np.arange(CONTEXTS), HOOKS[hook]).bfloat16()
    ids = (np.arange(CONTEXT_SIZE)[None] + np.arange(CONTEXTS)[:, None] + 12) % 17 + 1
    ids[:, 0] = 0
    assert (ids == 1).any()
    return rows[torch.from_numpy(ids > 1)].double()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store.build(tmp_path_factory.mktemp("heldout") / "store")


def sae_of(name: str, store: Store, target: str = HOOK, *, skip: bool = False) -> SAE:
    cls, transcoder = saes.architecture(name), target != HOOK
    keys = {"k": 3} if "k" in vars(cls.config_class()) else {}
    cfg = cls.config_class(d_sae=20, apply_b_dec_to_input=not transcoder, skip_connection=skip, **keys)
    sae = cls(cfg, store.width(HOOK), store.width(target) if transcoder else None)
    scales = {"norm_scale": 0.3, "target_scale": 0.6 if transcoder else None}
    generator = torch.Generator().manual_seed(1)
    sae.initialise(generator, mean=store.statistics(target).mean.float(), **scales)
    with torch.no_grad():
        sae.W_dec.mul_(4)
        sae.get_parameter(sae.latent_parameters[0])[:6] = -1e9  # never active
        if sae.W_skip is not None:
            torch.nn.init.normal_(sae.W_skip, std=0.1, generator=generator)
    return sae


@pytest.mark.parametrize(
    ("name", "target", "skip"),
    [*((name, HOOK, False) for name in saes.registered()), ("standard", TARGET, False), ("jumprelu", TARGET, True)],
)
@pytest.mark.parametrize("chunk", [4096, 7])
def test_the_figures_are_those_of_the_ordinary_rows(
    store: Store, name: str, target: str, skip: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "_CHUNK", chunk)
    sae = sae_of(name, store, target, skip=skip)
    x, y = ordinary_rows(HOOK), ordinary_rows(target)
    with torch.no_grad():
        f = sae.encode(x.float())
        predicted = sae.decode(f, x.float()).double()
    error = (y - predicted).square().sum(1)
    expected = {
        "heldout/l0": (f > 0).sum(1).double().mean(),
        "heldout/dead_fraction": 1 - (f > 0).any(0).double().mean(),
        "heldout/mse": error.mean(),
        "heldout/explained_variance": 1 - error.mean() / (y - y.mean(0)).square().sum(1).mean(),
        "heldout/cosine_similarity": torch.cosine_similarity(y, predicted, dim=1).mean(),
        "heldout/relative_reconstruction_bias": predicted.square().sum(1).mean() / (y * predicted).sum(1).mean(),
    }
    found = measure(store, HOOK, target, sae)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(float(value), rel=1e-5), key
    assert 0 < found["heldout/l0"] < 20
    assert found["heldout/dead_fraction"] >= 0.3


def test_measuring_leaves_the_sae_and_its_gradients_alone(store: Store) -> None:
    sae = sae_of("batchtopk", store)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    measure(store, HOOK, HOOK, sae)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in sae.parameters())


def test_a_store_without_held_out_rows_has_no_figures(tmp_path: Path, store: Store) -> None:
    sae = sae_of("standard", store)
    assert len(small_store.make_tokens(tmp_path / "store" / "tokens", heldout=0).heldout) == 0
    bare = small_store.build(tmp_path / "store")
    assert measure(bare, HOOK, HOOK, sae) == {}
    assert measure(bare, HOOK, TARGET, sae_of("standard", store, TARGET)) == {}
