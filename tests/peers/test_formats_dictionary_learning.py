"""dictionary_learning opens what saepipe writes, and saepipe what dictionary_learning's own training writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_saes import D_IN, D_SAE, data, make
from torch import Tensor

from saepipe import formats, saes

pytest.importorskip("dictionary_learning")

from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

STEPS = 30
SOON = {"warmup_steps": 2, "lr": 1e-2}
RANKED = SOON | {"k": 5, "threshold_start_step": 5}
TRAINERS: dict[str, tuple[type, dict[str, Any]]] = {
    "standard": (StandardTrainer, SOON | {"sparsity_warmup_steps": 2}),
    "april": (StandardTrainerAprilUpdate, SOON | {"sparsity_warmup_steps": 2}),
    "p_anneal": (PAnnealTrainer, SOON | {"sparsity_warmup_steps": 2, "anneal_start": 10, "p_end": 0.5}),
    "gated": (GatedSAETrainer, SOON | {"sparsity_warmup_steps": 2}),
    "gated_anneal": (GatedAnnealTrainer, SOON | {"sparsity_warmup_steps": 2, "anneal_start": 10, "p_end": 0.5}),
    "jumprelu": (JumpReluTrainer, SOON | {"sparsity_warmup_steps": 2, "bandwidth": 0.1}),
    "topk": (TopKTrainer, RANKED),
    "batchtopk": (BatchTopKTrainer, RANKED),
    "batchtopk_without_threshold": (BatchTopKTrainer, RANKED | {"threshold_start_step": 1000}),
    "matryoshka": (MatryoshkaBatchTopKTrainer, RANKED | {"group_fractions": [0.25, 0.75]}),
}


class Activations:
    """Random batches, the same whenever they are gone through."""

    config: ClassVar = {"ctx_len": 128, "io": "out"}

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS + 1):
            yield 3 * torch.randn(64, D_IN, generator=generator) + 1


def same(ours: Any, theirs: Any) -> None:
    """Compare latents and reconstructions of raw activations, and print the largest differences."""
    with torch.no_grad():
        f, other = ours.encode(data(256)), theirs.encode(data(256))
        assert 0 < (other > 0).float().mean() < 1
        torch.testing.assert_close(f, other, rtol=1e-5, atol=1e-5)
        out, other_out = ours.decode(other), theirs.decode(other)
        torch.testing.assert_close(out, other_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(data(256)), theirs(data(256)), rtol=1e-5, atol=2e-5)
    print(f"{float((f - other).abs().max()):.1e} {float((out - other_out).abs().max()):.1e}")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_saepipe_opens_what_it_trained(name: str, normalize: bool, tmp_path: Path) -> None:
    trainer, options = TRAINERS[name]
    settings = {"steps": STEPS, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "gpt2"}
    config = {"trainer": trainer, "device": "cpu", "seed": 0, **settings, **options}
    saved = {"save_dir": str(tmp_path), "save_steps": [STEPS - 1]}
    trainSAE(Activations(), [config], STEPS, device="cpu", normalize_activations=normalize, **saved)
    folder = tmp_path / "trainer_0"
    sae = formats.load(folder)
    if name == "april":  # the loader would rescale the rows of its decoder
        theirs = AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
    else:
        theirs, _ = load_dictionary(str(folder), "cpu")
    same(sae, theirs)
    early = formats.load(folder / "checkpoints" / f"ae_{STEPS - 1}.pt")
    theirs.load_state_dict(torch.load(folder / "checkpoints" / f"ae_{STEPS - 1}.pt"))
    same(early, theirs)
    assert sae.metadata == {"model_name": "gpt2", "context_size": 128, "hook_name": "blocks.3.hook_resid_post"}


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("name", saes.registered())
def test_it_opens_what_saepipe_writes(name: str, apply_b_dec: bool, tmp_path: Path) -> None:
    sae = make(name, apply_b_dec_to_input=apply_b_dec)
    if name in ("batchtopk", "matryoshka"):
        sae.get_buffer("threshold").fill_(0.03)
    formats.save(sae, tmp_path, format="dictionary_learning", metadata={"model_name": "gpt2", "context_size": 64})
    theirs, config = load_dictionary(str(tmp_path), "cpu")
    assert (config["trainer"]["lm_name"], config["buffer"]["ctx_len"]) == ("gpt2", 64)
    same(sae, theirs)


def test_a_decoder_of_unit_rows_is_an_autoencoder_to_it(tmp_path: Path) -> None:
    sae = make("standard", normalize_activations="none")
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    formats.save(sae, tmp_path, format="dictionary_learning", metadata={})
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"] == "AutoEncoder"
    theirs, _ = load_dictionary(str(tmp_path), "cpu")
    same(sae, theirs)
