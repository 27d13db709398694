import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from wandb.sdk import wandb_summary

from saepipe import comparison, entry, processes
from saepipe.analyze import analyze
from saepipe.cache import cache
from saepipe.config import ModelConfig, StoreConfig
from saepipe.errors import UserError
from saepipe.evaluate import evaluate
from saepipe.formats import saelens
from saepipe.language_model import LanguageModel
from saepipe.plan import Plan
from saepipe.runs import Run
from saepipe.saes.topk import TopKConfig, TopKSAE
from saepipe.token_store import TokenStore
from saepipe.token_writer import TokenStoreWriter

HOOK, SEQ, D_IN = "blocks.1.hook_resid_post", 16, 128
TARGET = "blocks.2.hook_mlp_out"


def made(folder: Path, *, held_out: int = 4, special: bool = False) -> None:
    """A store's plan and tokens and a finished run on the demo model, as cache and train leave them."""
    ids = np.random.default_rng(0).integers(3, 2048, (8, SEQ)).astype(np.int32) * (not special)
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


def strict(found: Any) -> Any:
    """What is not a number is null in the file."""
    if isinstance(found, dict):
        return {key: strict(value) for key, value in found.items()}
    return None if found != found else found


def asked(folder: Path, *overrides: str) -> entry.RunConfig:
    return entry.load_config("evaluate", [f"run.dir={folder}/run", *overrides])


def test_metrics_are_returned_written_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path)
    caplog.set_level("INFO", "saepipe")
    found = evaluate(asked(tmp_path))
    assert strict(found) == json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert (found["contexts"], found["d_sae"], found["hook"], found["target_hook"]) == (4, 64, HOOK, HOOK)
    assert found["l0"] <= 4
    assert comparison.figures(found) in caplog.text
    assert evaluate(asked(tmp_path, "evaluate.tokens=32"))["contexts"] == 2


def test_an_intermediate_sae_is_measured_while_the_run_goes_on(tmp_path: Path) -> None:
    made(tmp_path)
    whole, run = evaluate(asked(tmp_path)), Run(tmp_path / "run")
    shutil.copytree(run.sae_folder, run.step_folder(20))
    shutil.rmtree(run.sae_folder)
    run.summary_file.unlink()
    found = evaluate(asked(tmp_path, "evaluate.step=20"))
    assert found["ce_loss_score"] == whole["ce_loss_score"]
    assert json.loads((tmp_path / "run/eval/step-000000020.json").read_text()) == strict(found)
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


def test_held_out_documents_of_special_tokens_alone_are_refused(tmp_path: Path) -> None:
    made(tmp_path, special=True)
    with pytest.raises(UserError, match=r"evaluate\.tokens=200000 reads 4 held-out contexts that hold nothing but"):
        evaluate(asked(tmp_path))
    assert not (tmp_path / "run" / "eval").exists()


def test_a_store_elsewhere_is_named_and_another_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"is not there; say with store\.dir="):
        evaluate(asked(tmp_path, f"store.dir={tmp_path}/store"))
    assert evaluate(asked(tmp_path, f"store.dir={tmp_path}/moved"))["contexts"] == 4
    Run(tmp_path / "run").finish({"steps": 1, "store": {"identity": "other"}})
    with pytest.raises(UserError, match="is another store"):
        evaluate(asked(tmp_path, f"store.dir={tmp_path}/moved"))
    assert not (tmp_path / "store").exists()


def another(folder: Path, name: str, **keys: Any) -> Run:
    """A further run on the same store, with another SAE."""
    run = Run(folder / name)
    shutil.copytree(folder / "run", run.folder)
    sae = TopKSAE(TopKConfig(d_sae=64, k=8, normalize_activations="none", **keys), D_IN)
    sae.initialise(torch.Generator().manual_seed(1))
    saelens.save(sae, run.sae_folder, metadata={"hook_name": HOOK})
    return run


def test_several_runs_are_measured_in_one_reading_as_alone_and_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    other = another(tmp_path, "other")
    alone = {name: evaluate(asked(tmp_path, f"run.dir={tmp_path}/{name}")) for name in ("run", "other")}
    opened: list[str] = []
    monkeypatch.setattr(LanguageModel, "open", counting(opened))
    caplog.set_level("INFO", "saepipe")
    together = evaluate(asked(tmp_path, f"run.dir=[{tmp_path}/run,{other.folder}]"))["runs"]
    assert opened == ["demo"]
    for name, found in alone.items():
        ours = together[f"{tmp_path}/{name}"]
        for timing in ("seconds", "tokens_per_s"):
            del found[timing], ours[timing]
        assert strict(ours) == strict(found)
    assert "targets met" in caplog.text
    assert f"{other.folder}: L0" in caplog.text  # what to change in it
    assert evaluate(asked(tmp_path, f"run.dir={tmp_path}"))["runs"].keys() == together.keys()  # the folder of both


def counting(opened: list[str]) -> Any:
    real = LanguageModel.open

    def open_counted(config: Any, **where: Any) -> LanguageModel:
        opened.append(config.name)
        return real(config, **where)

    return open_counted


def test_a_folder_of_runs_leaves_out_what_is_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path)
    other = another(tmp_path, "other")
    other.summary_file.unlink()
    assert evaluate(asked(tmp_path, f"run.dir={tmp_path}"))["run_dir"] == f"{tmp_path}/run"
    assert f"{other.folder} is not finished" in caplog.text
    Run(tmp_path / "run").summary_file.unlink()
    with pytest.raises(UserError, match="holds no run that is finished"):
        evaluate(asked(tmp_path, f"run.dir={tmp_path}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir=[]"], r"run\.dir=\[\] names no run"),
        (["run.dir=[a,3]"], r"run\.dir=3 is no text"),
        (["run.dir=[a,[b]]"], r"run\.dir=\['b'\] is no text"),
        (["run.dir=[runs/a,runs/b]", "evaluate.step=3"], r"evaluate\.step=3 is of one run"),
        (["run.dir=nowhere"], r"holds no config\.yaml"),
    ],
)
def test_what_names_no_runs_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(entry.load_config("evaluate", overrides))


def test_other_verbs_take_one_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which evaluate alone takes"):
        analyze(entry.load_config("analyze", ["run.dir=[a,b]"]))


@pytest.mark.prove
@pytest.mark.timeout(300)
def test_processes_that_divide_the_contexts_find_what_one_finds(tmp_path: Path) -> None:
    made(tmp_path)
    one, two = evaluate(asked(tmp_path)), evaluate(asked(tmp_path, "evaluate.workers=2"))
    for name, value in one.items():
        if isinstance(value, float) and name not in ("seconds", "nearest_cosine"):
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    assert (two["tokens"], two["contexts"], two["histograms"]) == (one["tokens"], one["contexts"], one["histograms"])


def test_without_its_store_a_run_is_measured_on_the_same_documents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [f"store.dir={tmp_path}/store", "store.tokens=4000", f"data.context_size={SEQ}", "data.held_out=0.1"]
    keys += [f"model.hooks=[{HOOK}]", "cache.tokens_only=true"]
    config = entry.load_config("cache", keys)
    cache(config)
    tokens = TokenStore.open(tmp_path / "store" / "tokens")
    about = {"model": {"name": "demo"}, "hooks": {HOOK: D_IN}, "capture": "huggingface", "device_kind": "cpu"}
    plan = Plan.make(tokens, config.store, threads=2, data={"path": "demo"}, **about)
    plan.save(tmp_path / "store")
    made(tmp_path / "another")
    run = Run(tmp_path / "run")
    shutil.copytree(tmp_path / "another" / "run", run.folder)
    trained = entry.load_config("train", [*keys[:-1], f"run.dir={run.folder}"])
    entry.save_config(trained, run.config_file)
    run.finish({"steps": 1, "store": {"identity": plan.identity}})
    with_store = evaluate(asked(tmp_path, "evaluate.tokens=320"))
    shutil.rmtree(tmp_path / "store")
    without = evaluate(asked(tmp_path, "evaluate.tokens=320"))
    assert "held-out documents are read from data.path=demo again" in caplog.text
    for timing in ("seconds", "tokens_per_s"):
        del with_store[timing], without[timing]
    assert strict(without) == strict(with_store)


@pytest.mark.parametrize("verb", ["evaluate", "analyze"])
def test_a_model_that_has_changed_since_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, verb: str) -> None:
    made(tmp_path)
    run, weights = Run(tmp_path / "run"), LanguageModel.open(ModelConfig(hooks=[HOOK])).identity["weights"]
    for there in (weights, "others"):
        assert "is not as it was" not in caplog.text
        plan = replace(Plan.load(tmp_path / "store"), model={"name": "demo", "weights": there})
        (tmp_path / "store" / "plan.json").unlink()
        plan.save(tmp_path / "store")
        run.finish({"steps": 1, "store": {"identity": plan.identity}})
        {"evaluate": evaluate, "analyze": analyze}[verb](entry.load_config(verb, [f"run.dir={tmp_path}/run"]))
    assert "model.name=demo is not as it was when store.dir=" in caplog.text


def test_figures_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    made(tmp_path)
    path = Run(tmp_path / "run").sae_folder / "sae_weights.safetensors"
    weights = load_file(path)
    huge = {"W_enc": 1e4 * weights["W_enc"], "W_dec": torch.full_like(weights["W_dec"], 3e38)}
    save_file(weights | huge, path)  # finite, but not what they come to
    evaluate(asked(tmp_path))
    found = json.loads((tmp_path / "run/eval/metrics.json").read_text(), parse_constant=pytest.fail)
    assert found["explained_variance"] is None
    assert found["l0"] == 4


@pytest.mark.parametrize("metadata", [{}, {"hook_name": 3}, {"hook_name": ["blocks.0.hook_resid_post"]}])
@pytest.mark.parametrize("verb", ["evaluate", "analyze"])
def test_an_sae_that_does_not_say_where_it_belongs_is_refused(
    tmp_path: Path, metadata: dict[str, Any], verb: str
) -> None:
    made(tmp_path)
    path = Run(tmp_path / "run").sae_folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": metadata}))
    with pytest.raises(UserError, match=r"cfg\.json has no valid hook_name in its metadata"):
        {"evaluate": evaluate, "analyze": analyze}[verb](entry.load_config(verb, [f"run.dir={tmp_path}/run"]))


def test_figures_reach_the_runs_own_summary_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    seen: dict[str, float] = {}
    monkeypatch.setattr(wandb_summary.Summary, "update", lambda self, values: seen.update(values))
    evaluate(asked(tmp_path, "logger=wandb", "logger.offline=true"))
    assert {"evaluate/l0", "evaluate/ce_loss_score", "evaluate/dense_latents"} <= seen.keys()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.prove
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_that_divide_the_contexts_end_with_the_one_that_started_them(tmp_path: Path, number: int) -> None:
    made(tmp_path)
    command = [sys.executable, "-m", "saepipe.evaluate", f"run.dir={tmp_path}/run", "evaluate.workers=2"]
    process = subprocess.Popen(command, start_new_session=True, text=True, stderr=subprocess.PIPE)
    while not (workers := children(process.pid)):
        time.sleep(0.1)
    if number == signal.SIGINT:  # a terminal sends it to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, told = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in told
    deadline = time.monotonic() + 120
    while not all(processes.ended(processes.host(), int(worker)) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(process: int) -> list[str]:
    """Both workers of a process, once they are there."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    workers = [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return workers if len(workers) == 2 else []
