import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from saepipe import entry
from saepipe.config import StoreConfig
from saepipe.errors import UserError
from saepipe.evaluate import evaluate, table
from saepipe.formats import saelens
from saepipe.plan import Plan
from saepipe.runs import Run
from saepipe.saes.topk import TopKConfig, TopKSAE
from saepipe.token_writer import TokenStoreWriter

HOOK, SEQ, D_IN = "blocks.1.hook_resid_post", 16, 128
TARGET = "blocks.2.hook_mlp_out"


def made(folder: Path, *, held_out: int = 4) -> None:
    """A store's plan and tokens and a finished run on the demo model, as cache and train leave them."""
    ids = np.random.default_rng(0).integers(3, 2048, (8, SEQ)).astype(np.int32)
    with TokenStoreWriter(folder / "store" / "tokens", context_size=SEQ, source={}) as writer:
        for side, rows in (("train", slice(4)), ("heldout", slice(4, 4 + held_out))):
            writer.append(side, ids[rows], np.zeros_like(ids[rows]), ids[rows] < 3)
        tokens = writer.finish(special_ids=[0, 1, 2])
    keys = {"model": {"name": "demo"}, "hooks": {HOOK: D_IN}, "capture": "huggingface", "device_kind": "cpu"}
    plan = Plan.make(tokens, StoreConfig(tokens=4 * SEQ), threads=2, data={"path": "demo"}, **keys)
    plan.save(folder / "store")
    run = Run(folder / "run")
    overrides = [f"store.dir={folder}/store", f"run.dir={folder}/run", f"model.hooks=[{HOOK}]"]
    entry.save_config(entry.load_config("train", overrides), run.config_file)
    sae = TopKSAE(TopKConfig(d_sae=64, k=4, normalize_activations="none"), D_IN)
    sae.initialise(torch.Generator().manual_seed(0))
    saelens.save(sae, run.sae_folder, metadata={"hook_name": HOOK})
    run.finish({"steps": 1, "store": {"identity": plan.identity}})


def asked(folder: Path, *overrides: str) -> entry.RunConfig:
    return entry.load_config("evaluate", [f"run.dir={folder}/run", *overrides])


def test_metrics_are_returned_written_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path)
    caplog.set_level("INFO", "saepipe")
    found = evaluate(asked(tmp_path))
    assert found == json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert (found["contexts"], found["d_sae"], found["hook"], found["target_hook"]) == (4, 64, HOOK, HOOK)
    assert found["l0"] <= 4
    assert table(found) in caplog.text
    assert evaluate(asked(tmp_path, "evaluate.tokens=32"))["contexts"] == 2


def test_an_intermediate_sae_is_measured_while_the_run_goes_on(tmp_path: Path) -> None:
    made(tmp_path)
    whole, run = evaluate(asked(tmp_path)), Run(tmp_path / "run")
    shutil.copytree(run.sae_folder, run.step_folder(20))
    shutil.rmtree(run.sae_folder)
    run.summary_file.unlink()
    found = evaluate(asked(tmp_path, "evaluate.step=20"))
    assert found["ce_loss_score"] == whole["ce_loss_score"]
    assert json.loads((tmp_path / "run/eval/step-000000020.json").read_text()) == found
    with pytest.raises(UserError, match=r"evaluate\.step=21 is not known; did you mean 20"):
        evaluate(asked(tmp_path, "evaluate.step=21"))
    with pytest.raises(UserError, match="is not finished"):
        evaluate(asked(tmp_path))


def test_a_transcoder_is_measured_at_its_target(tmp_path: Path) -> None:
    made(tmp_path)
    as_autoencoder = evaluate(asked(tmp_path))
    sae = TopKSAE(TopKConfig(d_sae=64, k=4, apply_b_dec_to_input=False, skip_connection=True), D_IN, D_IN)
    sae.initialise(torch.Generator().manual_seed(0))
    saelens.save(sae, Run(tmp_path / "run").sae_folder, metadata={"hook_name": HOOK, "hook_name_out": TARGET})
    found = evaluate(asked(tmp_path))
    assert (found["hook"], found["target_hook"]) == (HOOK, TARGET)
    assert found["ce_loss_without_sae"] == pytest.approx(as_autoencoder["ce_loss_without_sae"], rel=1e-5)
    assert found["ce_loss_with_ablation"] != pytest.approx(as_autoencoder["ce_loss_with_ablation"], rel=1e-3)


def test_without_held_out_documents_the_cure_is_named(tmp_path: Path) -> None:
    made(tmp_path, held_out=0)
    with pytest.raises(UserError, match=r"data\.held_out=0\.05 left no whole context"):
        evaluate(asked(tmp_path))


def test_a_store_that_is_gone_or_another_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"is not there; say with store\.dir="):
        evaluate(asked(tmp_path))
    assert evaluate(asked(tmp_path, f"store.dir={tmp_path}/moved"))["contexts"] == 4
    Run(tmp_path / "run").finish({"steps": 1, "store": {"identity": "other"}})
    with pytest.raises(UserError, match="is another store"):
        evaluate(asked(tmp_path, f"store.dir={tmp_path}/moved"))
    assert not (tmp_path / "store").exists()
