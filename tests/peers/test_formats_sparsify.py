"""sparsify opens what saepipe writes, and saepipe what sparsify's own training writes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saes import D_IN, data, make, make_transcoder

import saepipe.demo
from saepipe import formats

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at its import; its kernels are for a GPU
pytest.importorskip("sparsify")

from datasets import Dataset
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from transformers import AutoModelForCausalLM

MODEL = Path(saepipe.demo.__file__).parent / "model"


def same(ours: Any, theirs: Any, x: torch.Tensor) -> None:
    """Compare latents and outputs for raw activations, and print the largest differences."""
    theirs.cfg.multi_topk = False  # else its forward pass gives what 4 k latents make, which training alone asks for
    with torch.no_grad():
        done = theirs(x)
        f = torch.zeros(len(x), theirs.num_latents).scatter(-1, done.latent_indices, done.latent_acts)
        assert 0 < (f > 0).float().mean() < 1
        torch.testing.assert_close(ours.encode(x), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(f, x), done.sae_out, rtol=1e-5, atol=1e-5)
        print(
            f"{float((ours.encode(x) - f).abs().max()):.1e} {float((ours.decode(f, x) - done.sae_out).abs().max()):.1e}"
        )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True), (False, True)])
def test_saepipe_opens_what_it_trained(transcode: bool, skip: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 2000, (32, 32), generator=generator)
    dataset = Dataset.from_dict({"input_ids": tokens}).with_format("torch")
    hook = "layers.1.mlp" if transcode else "layers.1"
    config = TrainConfig(
        SaeConfig(expansion_factor=2, k=8, multi_topk=True, transcode=transcode, skip_connection=skip),
        batch_size=4,
        hookpoints=[hook],
        log_to_wandb=False,
        save_dir=str(tmp_path),
        run_name="run",
    )
    trainer = Trainer(config, dataset, model)
    trainer.fit()
    trainer.save()
    folder = tmp_path / "run" / hook
    sae, theirs = formats.load(folder), SparseCoder.load_from_disk(folder)
    assert (sae.is_transcoder, sae.cfg.skip_connection) == (transcode or skip, skip)
    x = torch.randn(64, theirs.d_in, generator=generator) * 2 + 0.3
    same(sae, theirs, x)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_it_opens_what_saepipe_writes(apply_b_dec: bool, tmp_path: Path) -> None:
    sae = make("topk", k=6, apply_b_dec_to_input=apply_b_dec)
    formats.save(sae, tmp_path, format="sparsify", metadata={"model_name": "gpt2"})
    theirs = SparseCoder.load_from_disk(tmp_path)
    assert (theirs.cfg.k, theirs.num_latents, theirs.cfg.transcode) == (6, sae.d_sae, False)
    same(sae, theirs, data(256))


@pytest.mark.parametrize("skip", [False, True])
def test_it_opens_transcoders_that_saepipe_writes(skip: bool, tmp_path: Path) -> None:
    sae = make_transcoder("topk", d_out=D_IN, k=6, skip_connection=skip)
    formats.save(sae, tmp_path, format="sparsify", metadata={})
    theirs = SparseCoder.load_from_disk(tmp_path)
    assert (theirs.cfg.transcode, theirs.cfg.skip_connection) == (True, skip)
    same(sae, theirs, data(256))
