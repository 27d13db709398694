"""Training for real, on a small store: what is left behind, what is refused, and that a killed run ends the same."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import small_store
import torch
from safetensors.torch import load_file

from saepipe import entry, grid, saes
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.run_length import in_vain, total_steps
from saepipe.store import Store
from saepipe.train import resolved, train

ROOT = Path(__file__).parents[1]
HOOK, TARGET = small_store.HOOKS
KEYS = [f"stream.hook={HOOK}", "sae.d_sae=12", "stream.batch_tokens=24", "stream.window_tokens=96", "train.tokens=720"]
TOPK = [*KEYS, "sae=topk", "sae.k=3", "train.log_every_steps=10", "train.checkpoint_every_steps=10"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    small_store.build(folder)
    return folder


def configured(store: Path, run: Path, *overrides: str) -> RunConfig:
    return entry.load_config("train", [*TOPK, f"store.dir={store}", f"run.dir={run}", *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(saelens.load(run / "sae").named_parameters())


def test_a_run_leaves_everything_that_the_verbs_after_it_need(store: Path, tmp_path: Path) -> None:
    summary = train(configured(store, tmp_path / "x"))
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        ".lock", "config.yaml", "metrics.csv", "summary.json", "checkpoints", "sae",
    }  # fmt: skip
    assert summary == json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["steps"] == 30
    assert summary["tokens"] == 720
    assert re.fullmatch(r"[0-9a-f]{64}", summary["store"]["identity"])
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"].startswith("cpu")
    assert summary["metrics"]["metrics/l0"] <= 3
    assert summary["command"].startswith("python -m saepipe.train stream.hook=")
    assert len((tmp_path / "x" / "metrics.csv").read_text().splitlines()) == 1 + 3
    cfg = json.loads((tmp_path / "x" / "sae" / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == HOOK
    assert cfg["metadata"]["model_name"] == "small"
    # Model and data come from the store's plan, not from this command's defaults.
    assert entry.read_config(tmp_path / "x" / "config.yaml").data.path == "small.txt"


def test_an_export_says_which_positions_it_was_trained_on(store: Path, tmp_path: Path) -> None:
    for key, wanted in {"stream.positions=[1,3]": [1, 4], "stream.positions=null": None}.items():
        run = tmp_path / key.partition("=")[2]
        train(configured(store, run, key, "train.tokens=240"))
        assert saelens.load(run / "sae").metadata.seqpos_slice == wanted


def test_training_lowers_the_loss(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path / "x", "train.tokens=7200", "optim.lr=0.02"))
    lines = (tmp_path / "x" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("losses/mse_loss")
    assert float(lines[-1].split(",")[column]) < 0.5 * float(lines[1].split(",")[column])


def test_the_same_command_twice_says_that_it_is_done(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(configured(store, tmp_path / "x"))
    stamp = (tmp_path / "x" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO", "saepipe")
    assert train(configured(store, tmp_path / "x")) == first
    assert "already trained" in caplog.text
    assert (tmp_path / "x" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("architecture", saes.registered())
def test_bf16_mixed_trains_and_keeps_float32_weights(store: Path, tmp_path: Path, architecture: str) -> None:
    overrides = [
        *KEYS,
        f"sae={architecture}",
        f"store.dir={store}",
        f"run.dir={tmp_path}",
        "trainer.precision=bf16-mixed",
    ]
    overrides += ["sae.k=3"] if "k" in vars(saes.architecture(architecture).config_class()) else []
    train(entry.load_config("train", overrides))
    found = load_file(tmp_path / "sae" / "sae_weights.safetensors")  # as they lie there: `saelens.load` converts
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(weights(tmp_path), torch.float32)


def launched(overrides: list[str], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::UserWarning:saepipe", "-m", "saepipe.train", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_run_killed_and_resumed_ends_with_the_same_bits(store: Path, tmp_path: Path) -> None:
    keys = [*TOPK, "train.tokens=4800", "train.checkpoint_every_steps=20", f"store.dir={store}"]
    train(entry.load_config("train", [*keys, f"run.dir={tmp_path / 'whole'}"]))
    killed = tmp_path / "killed"
    process = launched([*keys, f"run.dir={killed}"])
    deadline = time.monotonic() + 120
    while len(list(killed.glob("checkpoints/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "summary.json").exists(), "the run was over before it could be killed"
    summary = train(entry.load_config("train", [*keys, f"run.dir={killed}"]))
    assert 0 < summary["resumed_from_step"] < summary["steps"] == 200
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(killed)[name]), name
    steps = [line.split(",")[0] for line in (killed / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(10, 201, 10)]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_word_and_a_code(store: Path, tmp_path: Path, sent: int, code: int) -> None:
    keys = [*TOPK, "train.tokens=2400000", "train.checkpoint_every_steps=20", f"store.dir={store}"]
    process = launched([*keys, f"run.dir={tmp_path / 'x'}"])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("x/checkpoints/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    assert not (tmp_path / "x" / "summary.json").exists()
    stopped = int(re.search(r"stopped at step ([\d,]+)", output)[1].replace(",", ""))  # type: ignore[index]
    assert (tmp_path / "x" / "checkpoints" / f"step-{stopped:09d}.json").exists()  # it saves where it stopped


def test_a_second_process_on_one_run_says_who_holds_it(store: Path, tmp_path: Path) -> None:
    from saepipe.lock import hold

    (tmp_path / "x").mkdir()
    with hold(tmp_path / "x", key="run.dir"):
        process = launched([*TOPK, f"store.dir={store}", f"run.dir={tmp_path / 'x'}"])
        output, _ = process.communicate()
    assert process.returncode == 2, output
    assert f"process {os.getpid()}" in output
    assert "Traceback" not in output


def test_a_folder_of_another_run_is_refused(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path / "x"))
    with pytest.raises(UserError, match=r"sae.k is 3 there and 2 here"):
        train(configured(store, tmp_path / "x", "sae.k=2"))
    with pytest.raises(UserError, match=r"train.tokens is 720 there and 960 here"):
        train(configured(store, tmp_path / "x", "train.tokens=960"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=other", "model.name=other differs from the store's"),
        ("data.path=other.txt", "data.path=other.txt differs"),
        ("store.dtype=float32", "store.dtype=float32 differs"),
        ("model.hooks=[blocks.7.hook_resid_post]", "model.hooks"),
        ("stream.hook=blocks.9.hook_resid_post", "stream.hook=blocks.9.hook_resid_post is not known; did you mean"),
        ("stream.hook=null", "stream.hook"),
        ("stream.batch_tokens=4096", "stream.batch_tokens"),
        ("train.tokens=23", "train.tokens=23"),
        ("sae.k=13", "sae.k=13"),
        ("sae.skip_connection=true", "sae.skip_connection=True lets an autoencoder copy its input"),
        ("stream.target_hook=blocks.9.hook_resid_post", "stream.target_hook=blocks.9.hook_resid_post is not known"),
    ],
)
def test_what_does_not_fit_the_store_is_refused_before_anything_is_written(
    store: Path, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        train(configured(store, tmp_path / "x", override))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sae.k=13"], "sae.k=13 is more than the 12 latents"),
        (["grid.k=[3,13]"], "sae.k=13 is more than the 12 latents"),
        (["train.micro_batches=5"], "train.micro_batches=5 does not divide the 24 rows"),
        (["train.tokens=3"], "less than one batch"),
        (["train.compile=true"], "train.compile=true does not go with sae=topk"),
        (["trainer.devices=5"], "cannot be split among 5 ranks"),
        (["trainer.num_nodes=2"], "which srun or torchrun starts"),
        (["sae.skip_connection=true"], "lets an autoencoder copy its input"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_rank_is_started_or_a_folder_made(
    store: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        train(configured(store, tmp_path / "x", *overrides))
    assert not (tmp_path / "x").exists()


def test_a_transcoder_never_subtracts_its_bias_from_its_input(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    key, target = "sae.apply_b_dec_to_input", f"stream.target_hook={TARGET}"
    for overrides, kept in {
        (): True,
        (f"{key}=false",): False,
        (target,): False,  # true by default, and the user did not mean it
        (target, f"{key}=false"): False,
        (f"stream.target_hook={HOOK}", f"{key}=true"): True,  # the same hook: no transcoder
    }.items():
        stream, sae = resolved(configured(store, tmp_path, *overrides), opened)
        assert (sae.apply_b_dec_to_input, stream.hook) == (kept, HOOK)
    for typed in (f"{key}=true", f"++{key}=true"):
        with pytest.raises(UserError, match=rf"{key}=true does not go with .*{TARGET}.*leave sae\."):
            train(configured(store, tmp_path / "x", target, typed))
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_an_autoencoder_has_no_other_hook(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path / "x", f"stream.target_hook={HOOK}"))
    sae = saelens.load(tmp_path / "x" / "sae")
    assert not sae.is_transcoder
    assert "hook_name_out" not in sae.metadata


def test_another_store_or_stream_is_no_resume(store: Path, tmp_path: Path) -> None:
    keys = ["train.tokens=720", "train.checkpoint_every_steps=10"]
    train(configured(store, tmp_path / "x", *keys))
    small_store.build(tmp_path / "other", seed=6)
    for finished in (True, False):
        if not finished:
            (tmp_path / "x" / "summary.json").unlink()
        with pytest.raises(UserError, match="another store"):
            train(configured(tmp_path / "other", tmp_path / "x", *keys))
        for key in ("data.exclude_special_tokens=false", "trainer.precision=bf16-mixed", "stream.seed=3"):
            with pytest.raises(UserError, match=key.split("=")[0]):
                train(configured(store, tmp_path / "x", *keys, key))
    assert train(configured(store, tmp_path / "x", *keys, "stream.prefetch_batches=0"))["steps"] == 30


def test_a_run_without_its_config_is_not_gone_on_with(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path / "x"))
    (tmp_path / "x" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"without its config\.yaml"):
        train(configured(store, tmp_path / "x", "sae.k=2"))


@pytest.mark.parametrize("content", [b"", b'{"steps": 3', b"[1]", b"\xff"])
def test_a_damaged_summary_names_a_cure_that_works(store: Path, tmp_path: Path, content: bytes) -> None:
    train(configured(store, tmp_path / "x"))
    (tmp_path / "x" / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match="delete it and run the same train command"):
        train(configured(store, tmp_path / "x"))
    (tmp_path / "x" / "summary.json").unlink()
    assert train(configured(store, tmp_path / "x"))["steps"] == 30


def test_a_damaged_export_names_a_cure_that_works(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path / "x"))
    before = weights(tmp_path / "x")
    (tmp_path / "x" / "sae" / "sae_weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"delete .*summary\.json and run the same train command again"):
        train(configured(store, tmp_path / "x"))
    (tmp_path / "x" / "summary.json").unlink()
    train(configured(store, tmp_path / "x"))
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "x").items())


def test_a_run_shorter_than_its_schedule_is_warned_of(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(configured(store, tmp_path / "x", "optim.lr_warm_up_steps=20", "optim.lr_decay_steps=20"))
    assert "longer than the run's 30 steps" in caplog.text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["sae=standard", "sae.l1_warm_up_steps=31"], "the penalty never reaches sae.l1_coefficient"),
        (["sae=jumprelu", "sae.l0_warm_up_steps=31"], "the penalty never reaches sae.l0_coefficient"),
        (["sae=jumprelu", "grid.l0_warm_up_steps=[5,31]"], "sae.l0_warm_up_steps=31 is longer"),
        (["sae.dead_method=resample"], "no latent is resampled; try sae.resample_every_steps=6"),
        (["sae=batchtopk"], "the threshold stays low.*; try sae.topk_threshold_lr=0.167"),
        (["sae.resample_scale=0.1"], "has no effect with sae.dead_method=auxk"),
        (["sae=jumprelu", "sae.tanh_scale=2"], "it belongs to sae.sparsity_loss=tanh"),
        (["optim.n_restart_cycles=2"], "has no effect with optim.lr_scheduler_name=constant"),
    ],
)
def test_keys_without_effect_are_warned_of(keys: list[str], words: str) -> None:
    config = entry.load_config("train", keys)
    config.train.tokens = 30 * config.stream.batch_tokens
    found = [text for point in grid.points(config) for text in in_vain(point, total_steps(point, 1))]
    assert re.search(words, "; ".join(found))


def test_a_usual_run_has_no_key_without_effect() -> None:
    for name in saes.registered():
        assert not list(in_vain(entry.load_config("train", [f"sae={name}"]), 1000))


def test_the_last_row_has_the_gradients_norm(store: Path, tmp_path: Path) -> None:
    summary = train(configured(store, tmp_path / "x", "train.log_every_steps=7"))
    assert summary["metrics"]["details/grad_norm"] > 0


def test_an_accelerator_that_is_not_there_is_refused(store: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match=r"trainer\.accelerator=cuda is not on this machine"):
        train(configured(store, tmp_path / "x", "trainer.accelerator=cuda"))


def test_a_store_that_is_missing_or_incomplete_names_the_cache_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python -m saepipe.cache"):
        train(configured(tmp_path / "absent", tmp_path / "x"))
    small_store.build(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(UserError, match="incomplete"):
        train(configured(tmp_path / "store", tmp_path / "x"))


def test_a_run_that_diverges_stops_with_the_step_and_keeps_the_last_checkpoint(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"losses/mse_loss was not finite at step 2 \(batch 1 of .*optim\.lr"):
        train(configured(store, tmp_path / "x", "optim.lr=1e18"))
    assert not (tmp_path / "x" / "sae").exists()


def test_weights_that_are_not_finite_are_never_saved(store: Path, tmp_path: Path) -> None:
    keys = ["optim.lr=1e18", "train.log_every_steps=30", "train.checkpoint_every_steps=1"]
    with pytest.raises(UserError, match=r"at step \d+ .*optim\.lr"):
        train(configured(store, tmp_path / "x", *keys))
    checkpoints = list((tmp_path / "x" / "checkpoints").glob("*.ckpt"))
    assert checkpoints  # the first step is still finite
    for path in checkpoints:
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["state_dict"].values())


def test_a_run_killed_after_its_last_checkpoint_is_finished_by_the_next_call(store: Path, tmp_path: Path) -> None:
    first = train(configured(store, tmp_path / "x"))
    before = weights(tmp_path / "x")
    (tmp_path / "x" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "x" / "sae")
    second = train(configured(store, tmp_path / "x"))
    assert second["metrics"] == first["metrics"]
    assert second["resumed_from_step"] == second["steps"] == 30
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "x").items())
    assert len((tmp_path / "x" / "metrics.csv").read_text().splitlines()) == 1 + 3


def test_running_out_of_memory_names_the_keys(store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"train\.micro_batches=2 or stream\.window_tokens=\d+ \(a smaller window, in another run\.dir\)",
    ):
        train(configured(store, tmp_path / "x", "sae.d_sae=1000000000000"))


def test_train_needs_no_language_model_library(store: Path, tmp_path: Path) -> None:
    hidden = {"transformers", "transformer_lens", "datasets"}
    packages = tmp_path / "packages"  # this environment without the three, as if they had never been installed
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.split("-")[0].lower() not in hidden:
            (packages / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    isolated = [sys.executable, "-S", "-c"]
    for name in hidden:
        assert subprocess.run([*isolated, f"import {name}"], env=environment, capture_output=True).returncode == 1
    program = [*isolated, "from saepipe.train import main; main()"]
    keys = [*TOPK, f"store.dir={store}", f"run.dir={tmp_path / 'x'}"]
    done = subprocess.run([*program, *keys], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert saelens.load(tmp_path / "x" / "sae").d_sae == 12


def test_a_sweep_gives_each_point_its_own_folder(store: Path, tmp_path: Path) -> None:
    process = launched(["-m", *TOPK[:-1], f"store.dir={store}", f"run.dir={tmp_path}", "sae.k=2,3", "optim.lr=0.001"])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert {path.name for path in tmp_path.iterdir()} == {"multirun.yaml", "sae.k=2", "sae.k=3"}
    for k in (2, 3):
        assert saelens.load(tmp_path / f"sae.k={k}" / "sae").cfg.k == k
