"""SAELens's own evaluation of an exported demo SAE agrees with saepipe's inclusive figures."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from saepipe import entry
from saepipe.cache import cache
from saepipe.demo import MODEL_DIR
from saepipe.evaluate import evaluate
from saepipe.runs import Run
from saepipe.train import train

sae_lens = pytest.importorskip("sae_lens")
evals = pytest.importorskip("sae_lens.evals")

CONTEXTS, BATCH = 80, 16
GROUPS = {
    "l0": "sparsity",
    "explained_variance": "reconstruction_quality",
    "mse": "reconstruction_quality",
    "ce_loss_score": "model_performance_preservation",
    "ce_loss_with_sae": "model_performance_preservation",
    "ce_loss_with_ablation": "model_performance_preservation",
    "ce_loss_without_sae": "model_performance_preservation",
    "kl_div_score": "model_behavior_preservation",
    "kl_div_with_sae": "model_behavior_preservation",
    "kl_div_with_ablation": "model_behavior_preservation",
    "l2_norm_in": "shrinkage",
    "l2_norm_out": "shrinkage",
    "l2_ratio": "shrinkage",
    "relative_reconstruction_bias": "shrinkage",
}


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_run_evals_finds_what_evaluate_finds(architecture: str, tmp_path: Path) -> None:
    keys = ["+experiment=demo", f"run.dir={tmp_path}/run", f"store.dir={tmp_path}/store", "store.tokens=60000"]
    keys += [f"sae={architecture}", "sae.d_sae=512", "train.tokens=200000", "stream.window_tokens=49152"]
    keys += ["stream.batch_tokens=768", "optim.lr_warm_up_steps=10", "optim.lr_decay_steps=20"]
    cache(entry.load_config("cache", keys))
    train(entry.load_config("train", keys))
    run = Run(tmp_path / "run")
    side = run.tokens(tmp_path / "store").heldout
    ids = torch.from_numpy(side.ids[:CONTEXTS].astype("int64"))
    asked = [f"run.dir={tmp_path}/run", f"evaluate.tokens={ids.numel()}", "evaluate.inclusive=true"]
    ours = evaluate(entry.load_config("evaluate", asked))
    assert ours["inclusive_tokens"] == ids.numel()

    sae = sae_lens.SAE.load_from_disk(str(run.sae_folder), device="cpu")
    # SAELens's own subclass of the bridge runs no hooks in `run_with_hooks`.
    model = TransformerBridge.boot_transformers(str(MODEL_DIR), device="cpu")
    store = sae_lens.ActivationsStore.from_sae(
        model,
        sae,
        Dataset.from_dict({"input_ids": ids.tolist()}),
        streaming=False,
        store_batch_size_prompts=BATCH,
        total_tokens=CONTEXTS,
    )
    batches = CONTEXTS // BATCH
    found, _ = evals.run_evals(
        sae,
        store,
        model,
        pytest.importorskip("sae_lens.training.activation_scaler").ActivationScaler(),
        evals.get_eval_everything_config(BATCH, batches, batches),
        exclude_special_tokens=False,
    )
    for name, group in GROUPS.items():
        # SAELens takes this one's mean over batches; ours is of all tokens, as the paper's.
        near = 5e-3 if name == "relative_reconstruction_bias" else 1e-4
        assert found[group][name] == pytest.approx(ours[f"inclusive_{name}"], rel=near, abs=near), name
    # Leaving special tokens out changes what is found, so that the test would notice.
    assert abs(ours["explained_variance"] - ours["inclusive_explained_variance"]) > 1e-3
