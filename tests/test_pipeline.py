"""The whole job by its command lines, on models and data that saepipe has never seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_models
import torch
from transformers import AutoModelForCausalLM, GemmaConfig

from saepipe.demo import corpus
from saepipe.formats import saelens

ROOT = Path(__file__).parents[1]


def saepipe(verb: str, *overrides: str, cwd: Path, code: int = 0) -> str:
    """Run a verb as a user does; return everything that it says."""
    done = subprocess.run(
        [sys.executable, "-m", f"saepipe.{verb}", *overrides],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.parquet"
    texts = [corpus.document(index, seed=9).text for index in range(400)]
    pq.write_table(pa.table({"body": texts, "number": list(range(len(texts)))}), path)
    return path


@pytest.mark.prove
def test_a_llama_folder_and_a_parquet_file(parquet: Path, tmp_path: Path) -> None:
    small_models.make(tmp_path / "llama", "llama")
    cache = ["model.name=llama", "model.hooks=[blocks.2.hook_resid_post]", f"data.path={parquet}", "data.column=body"]
    cache += ["data.context_size=32", "store.dir=acts", "store.tokens=6000", "data.held_out=0.2"]
    said = saepipe("cache", *cache, cwd=tmp_path)
    assert "GB free" in said  # the projection comes first
    train = ["store.dir=acts", "sae=topk", "sae.k=4", "sae.expansion=4", "stream.batch_tokens=512"]
    train += ["train.tokens=60000", "optim.lr=0.003", "run.dir=runs/x"]
    saepipe("train", *train, cwd=tmp_path)
    assert "already trained" in saepipe("train", *train, cwd=tmp_path)
    said = saepipe("evaluate", "run.dir=runs/x", cwd=tmp_path)
    assert "CE score" in said
    found = json.loads((tmp_path / "runs/x/eval/metrics.json").read_text())
    assert found["hook"] == "blocks.2.hook_resid_post"
    assert 0.3 < found["explained_variance"] < 1
    assert found["l0"] <= 4
    saepipe("analyze", "run.dir=runs/x", "analyze.latents=8", cwd=tmp_path)
    assert "<html" in (tmp_path / "runs/x/features/index.html").read_text()[:500]


@pytest.mark.prove
def test_gemma2b_on_a_small_gemma_folder(parquet: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=small_models.VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    small_models.tokenizer().save_pretrained(tmp_path / "gemma")
    keys = ["+experiment=gemma2b", "model.name=gemma", "model.device=cpu", f"data.path={parquet}", "data.column=body"]
    keys += ["data.streaming=false", "data.context_size=64", "store.tokens=8000", "store.batch_prompts=4"]
    keys += ["train.tokens=24000", "stream.batch_tokens=1024", "sae.expansion=2", "trainer.accelerator=cpu"]
    said = saepipe("train", *keys, cwd=tmp_path, code=2)
    assert "python -m saepipe.cache +experiment=gemma2b model.name=gemma" in said
    for verb in ("cache", "train", "evaluate", "analyze"):
        saepipe(verb, *keys, cwd=tmp_path)
    sae = saelens.load(tmp_path / "runs/gemma2b/sae")
    assert (sae.cfg.architecture, sae.d_in, sae.d_sae) == ("standard", 48, 96)
    assert sae.metadata["hook_name"] == "blocks.6.hook_resid_post"
    assert (tmp_path / "runs/gemma2b/eval/metrics.json").is_file()


def test_what_the_hub_would_have_is_refused_within_seconds(tmp_path: Path) -> None:
    said = saepipe("cache", "+experiment=gemma2b", cwd=tmp_path, code=2)
    assert "model.name=google/gemma-2b" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
