"""The verb: a store that holds exactly what the model computes, made once, however often it is stopped."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from small_store import files, left_behind

from saepipe import projection, shuffle
from saepipe.cache import _place, cache
from saepipe.config import CacheConfig, DataConfig, ModelConfig, RunConfig, StoreConfig, StreamConfig
from saepipe.demo import MODEL_DIR
from saepipe.errors import UserError
from saepipe.language_model import LanguageModel
from saepipe.lock import hold
from saepipe.store import Store

pytestmark = pytest.mark.usefixtures("short_timing")
HOOKS = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]


def configured(
    inputs: Path, folder: Path, *, hooks: list[str] = HOOKS, dry_run: bool = False, **store: object
) -> RunConfig:
    sizes = {"tokens": 3000, "shard_tokens": 256, "shuffle_tokens": 1024, "batch_prompts": 8, "dtype": "float32"}
    return RunConfig(
        model=ModelConfig(name=str(inputs / "model"), hooks=hooks, device="cpu"),
        data=DataConfig(path=str(inputs / "text.jsonl"), context_size=24, held_out=0.1),
        store=StoreConfig(dir=str(folder), **sizes | store),
        cache=CacheConfig(dry_run=dry_run),
    )


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "store"
    result = cache(configured(inputs, folder))
    assert result["rows"] == 3000
    assert result["tokens_per_s"] > 0
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert result["bytes"] == written
    return folder


def test_every_row_is_what_the_model_computes(inputs: Path, finished: Path) -> None:
    store = Store.open(finished)
    model = LanguageModel.open(ModelConfig(name=str(inputs / "model"), hooks=HOOKS, device="cpu"))
    plan = store.plan
    assert store.hooks == HOOKS
    direct = {hook: values.flatten(0, 1) for hook, values in captured(model, store.tokens.train.ids).items()}
    rows_seen: list[np.ndarray] = []
    for shard in range(plan.n_shards):
        tokens = plan.row_tokens(shard)
        rows_seen.append(tokens)
        for hook in HOOKS:
            blocks = [store.read_block(hook, shard, block) for block in range(plan.n_blocks(hook, shard))]
            torch.testing.assert_close(torch.cat(blocks), direct[hook][torch.from_numpy(tokens)], atol=1e-5, rtol=1e-5)
    tokens = np.concatenate(rows_seen)
    assert len(tokens) == len(set(tokens.tolist())) == 3000
    direct = {hook: values.flatten(0, 1) for hook, values in captured(model, store.tokens.heldout.ids).items()}
    for hook in HOOKS:
        held_out = torch.cat([rows for rows, _ in store.held_out(hook)])
        torch.testing.assert_close(held_out, direct[hook], atol=1e-5, rtol=1e-5)


def captured(model: LanguageModel, ids: np.ndarray) -> dict[str, torch.Tensor]:
    return model.capture(torch.from_numpy(ids.astype(np.int64)), HOOKS)


def test_second_call_says_that_it_is_done(inputs: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = files(finished)
    caplog.set_level(logging.INFO)
    result = cache(configured(inputs, finished))
    assert f"store.dir={finished} is complete already" in caplog.text
    assert (result["rows"], result["tokens_per_s"]) == (3000, None)
    assert files(finished) == before


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_sigkill_and_again_gives_the_same_bytes(inputs: Path, finished: Path, tmp_path: Path, seconds: float) -> None:
    """The child waits before each shard, so that the kill comes between some of them."""
    code = (
        "import sys, time\n"
        "sys.path[:0] = sys.argv[1].split(':')\n"
        "from pathlib import Path\n"
        "from saepipe import cache as verb, projection, store\n"
        "from test_cache import configured\n"
        "projection._TIMING_S = 0.01\n"
        "write = store.Store.write\n"
        "store.Store.write = lambda *a, **k: (print('writing', flush=True), time.sleep(0.05), write(*a, **k))\n"
        "verb.cache(configured(Path(sys.argv[2]), Path(sys.argv[3])))\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, f"{here}:{here.parent}", str(inputs), str(tmp_path / "store")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "store" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"is incomplete"):
        Store.open(tmp_path / "store")
    cache(configured(inputs, tmp_path / "store"))
    assert files(tmp_path / "store") == files(finished)


def test_two_workers_make_the_same_bytes_and_one_may_die(inputs: Path, finished: Path, tmp_path: Path) -> None:
    config = configured(inputs, tmp_path / "store")
    config.cache.workers = 2

    def kill_the_helper() -> None:
        while not (found := multiprocessing.active_children()) or not (tmp_path / "store" / ".lock").exists():
            time.sleep(0.01)
        killed.append(found[0])
        found[0].kill()

    killed: list[Any] = []
    killer = threading.Thread(target=kill_the_helper)
    killer.start()
    result = cache(config)
    killer.join()
    assert killed[0].exitcode == -signal.SIGKILL
    assert result["rows"] == 3000
    assert files(tmp_path / "store") == files(finished)
    cache(config)
    assert files(tmp_path / "store") == files(finished)


def test_an_error_of_a_helper_is_the_commands(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The helpers start with a configuration of their own, here one whose model is not there."""
    config = configured(inputs, tmp_path / "store")
    config.cache.workers = 2
    other = replace(config, model=replace(config.model, name=str(tmp_path / "none")))
    monkeypatch.setattr("saepipe.workers.alone", lambda _: other)
    with pytest.raises(UserError, match=r"model.name=.*none"):
        cache(config)


def test_tokens_only_stops_before_the_model_is_needed(
    inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(inputs, tmp_path / "store")
    config.cache.tokens_only = True
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # no weights
        assert cache(config)["rows"] >= 3000
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [".lock", "tokens"]
    config.cache.tokens_only = False
    cache(config)
    assert files(tmp_path / "store") == files(finished)


@pytest.mark.parametrize(("gpus", "expected"), [(4, [2, 3]), (2, [0, 1])])
def test_a_process_that_sees_its_own_gpus_only_takes_the_first(
    monkeypatch: pytest.MonkeyPatch, gpus: int, expected: list[int]
) -> None:
    """Two workers of one GPU each, in the second task of a node: with all GPUs in sight, or with its own two."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = RunConfig(cache=CacheConfig(workers=2))
    workers = _place(config).split(2)
    assert [worker.local_rank for worker in workers] == expected
    assert [(worker.index, worker.count) for worker in workers] == [(2, 4), (3, 4)]


def test_a_deleted_shard_is_written_again(inputs: Path, finished: Path, tmp_path: Path) -> None:
    cache(configured(inputs, tmp_path / "store"))
    for path in (tmp_path / "store" / HOOKS[0]).glob("000003.*"):
        path.unlink()
    cache(configured(inputs, tmp_path / "store"))
    assert files(tmp_path / "store") == files(finished)


def test_dry_run_writes_nothing(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    projected = cache(configured(inputs, tmp_path / "store", dry_run=True))
    assert not (tmp_path / "store").exists()
    assert projected["seconds"] > 0
    assert "cache.dry_run=true: nothing was written" in caplog.text
    assert "tokens/s (huggingface on cpu)" in caplog.text


def test_projection_is_near_the_truth(inputs: Path, tmp_path: Path) -> None:
    config = configured(inputs, tmp_path / "store", dtype="bfloat16")
    config.data.held_out = 0  # a few hundred documents are read at once, and all that are held out of them are kept
    config.cache.dry_run = True
    projected = cache(config)["bytes"]
    config.cache.dry_run = False
    cache(config)
    parts = [*(tmp_path / "store").rglob("*.safetensors"), *(tmp_path / "store" / "tokens").iterdir()]
    truth = sum(path.stat().st_size for path in parts)
    assert truth / 1.1 < projected < truth * 1.1


def test_shuffle_that_the_memory_cannot_hold(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "memory_bytes", lambda: 200_000.0)
    with pytest.raises(UserError, match=r"store.shuffle_tokens=1024 needs .* GB of memory .* halve it"):
        cache(configured(inputs, tmp_path / "store"))
    cache(configured(inputs, tmp_path / "store", shuffle_tokens=256))


def test_store_that_the_disk_cannot_hold(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs .* GB more and its disk has .* try store.tokens=\d+, store.dtype=int8"):
        cache(configured(inputs, tmp_path / "store", tokens=10**15))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hooks": HOOKS[:1]}, r"belongs to another plan: model.hooks is"),
        ({"tokens": 3024}, r"store.tokens is 3000 there and 3024 here"),
        ({"seed": 1}, r"store.seed is 0 there and 1 here"),
        ({"dtype": "bfloat16"}, r"store.dtype is float32 there and bfloat16 here"),
        ({"batch_prompts": 4}, r"store.batch_prompts is 8 there and 4 here"),
    ],
)
def test_folder_of_another_plan(inputs: Path, finished: Path, change: dict[str, object], message: str) -> None:
    before = files(finished)
    with pytest.raises(UserError, match=message):
        cache(configured(inputs, finished, **change))
    assert files(finished) == before


def test_a_poor_shuffle_is_refused_or_warned_of(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shuffle, "StreamConfig", lambda: StreamConfig(batch_tokens=48, window_tokens=240))
    config = configured(inputs, tmp_path / "store", shard_tokens=24, shuffle_tokens=24, tokens=1000)
    with pytest.raises(UserError, match=r"store.shuffle_tokens=24 shuffles too few .* set cache.poor_shuffle=warn"):
        cache(config)
    assert not (tmp_path / "store" / "plan.json").exists()
    config.cache.poor_shuffle = "warn"
    cache(config)
    assert "store.shuffle_tokens=24 shuffles too few" in caplog.text
    assert Store.open(tmp_path / "store").manifest.companions > shuffle.WORST


def test_second_process_waits_for_the_first_ones_tokens(
    inputs: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = threading.Thread(target=lambda: hold_for_a_while(tmp_path / "store"))
    first.start()
    while not (tmp_path / "store" / ".lock").exists():
        time.sleep(0.01)
    cache(configured(inputs, tmp_path / "store"))
    first.join()
    assert f"store.dir={tmp_path / 'store'}: waiting for process {os.getpid()} on" in caplog.text
    assert files(tmp_path / "store") == files(finished)


def hold_for_a_while(folder: Path) -> None:
    with hold(folder, key="store.dir"):
        time.sleep(2)


def test_folder_of_something_else(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no store \(it has letters.txt\)"):
        cache(configured(inputs, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]
    with pytest.raises(UserError, match=r"is a file; choose another store.dir"):
        cache(configured(inputs, tmp_path / "letters.txt"))


def test_damaged_tokens_are_told_before_anything_is_captured_from_them(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(finished, tmp_path / "store")
    ids = store / "tokens" / "train.ids"
    content = ids.read_bytes()
    for path in (store / HOOKS[0]).glob("000003.*"):
        path.unlink()
    ids.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    before = files(store)
    with pytest.raises(UserError, match=rf"{ids} does not match its hash; delete {ids.parent} and run the same"):
        cache(configured(inputs, store))
    assert files(store) == before
    shutil.rmtree(ids.parent)
    cache(configured(inputs, store))
    assert files(store) == files(finished)


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_manifest_that_is_none_is_made_again(
    inputs: Path, finished: Path, tmp_path: Path, content: bytes | None
) -> None:
    store = shutil.copytree(finished, tmp_path / "store")
    path = store / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    cache(configured(inputs, store))
    assert files(store) == files(finished)


def test_damaged_tokens_of_a_complete_store_are_told(inputs: Path, finished: Path, tmp_path: Path) -> None:
    store = shutil.copytree(finished, tmp_path / "store")
    special = store / "tokens" / "heldout.special"
    special.write_bytes(b"\1" * len(special.read_bytes()))
    with pytest.raises(UserError, match=rf"{special} does not match its hash"):
        cache(configured(inputs, store))


@pytest.mark.parametrize("name", ["plan.json", "tokens/train.ids", ".lock/x"])
def test_a_folder_of_another_program_stays_as_it_is(inputs: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "theirs"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"store\.dir") as error:
        cache(configured(inputs, folder))
    assert "delete" not in str(error.value)
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / name]
    assert (folder / name).read_text() == '{"mine": 1}'


def test_goes_on_after_a_kill_while_the_plan_was_written(inputs: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(finished / "tokens", folder / "tokens")
    (folder / ".lock").touch()
    left_behind(folder / "plan.json").write_text("half of it")
    cache(configured(inputs, folder))
    assert files(folder) == files(finished)


def test_a_name_that_is_too_long_for_the_disk(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"store\.dir=.*n{300} cannot be written .*choose a folder of your own"):
        cache(configured(inputs, tmp_path / ("n" * 300)))


def test_a_full_disk_suggests_no_store_of_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"0 GB free; try a store.dir on another disk"):
        cache(configured(inputs, tmp_path / "store"))


def test_weights_that_are_not_finite_are_not_blamed_on_the_type(inputs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(inputs / "model", tmp_path / "model")
    shutil.copy(inputs / "text.jsonl", tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not finite in float32; the model's own weights or activations .*model.name"):
        cache(configured(tmp_path, tmp_path / "store", hooks=HOOKS[1:]))


def test_context_longer_than_the_models(inputs: Path, tmp_path: Path) -> None:
    config = configured(inputs, tmp_path / "store")
    config.data.context_size = small_models.CONTEXT_LIMIT + 1
    with pytest.raises(UserError, match=r"data.context_size=65 is longer than the 64 tokens"):
        cache(config)
    assert not (tmp_path / "store").exists()


def test_too_few_tokens(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"store.tokens=1000000 is more than the \d+ training tokens"):
        cache(configured(inputs, tmp_path / "store", tokens=10**6))
    cache(configured(inputs, tmp_path / "store", tokens=1000))  # nothing is left that stands in the way


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    small_models.make(tmp_path / "model", "llama")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e6
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in small_models.TEXTS))
    with pytest.raises(UserError, match=r"blocks.1.hook_resid_post.* not finite in float16; .*store.dtype=bfloat16"):
        cache(configured(tmp_path, tmp_path / "store", hooks=HOOKS[1:], dtype="float16"))


def test_out_of_memory_names_the_keys(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LanguageModel, ids: torch.Tensor, hooks: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(LanguageModel, "capture", fail)
    with pytest.raises(UserError, match=r"store.batch_prompts=4 or data.context_size=12 or .*model.dtype=bfloat16"):
        cache(configured(inputs, tmp_path / "store"))


def test_command_line(inputs: Path, tmp_path: Path) -> None:
    arguments = [
        f"model.name={inputs / 'model'}",
        "model.hooks=[blocks.1.hook_resid_post]",
        f"data.path={inputs / 'text.jsonl'}",
        "data.context_size=16",
        f"store.dir={tmp_path / 'store'}",
        "store.tokens=500",
    ]
    command = [sys.executable, "-m", "saepipe.cache", *arguments]
    here = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"store.dir={tmp_path / 'store'} is complete: 500 tokens of blocks.1.hook_resid_post" in done.stdout
    refused = subprocess.run([*command, "model.dtype=bfloat16"], cwd=here, capture_output=True, text=True)
    assert refused.returncode == 2
    assert (
        refused.stderr.strip()
        .splitlines()[-1]
        .startswith(f"saepipe: store.dir={tmp_path / 'store'} belongs to another")
    )
    assert "Traceback" not in refused.stderr


def test_demo_model(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(device="cpu"), data=DataConfig(), store=StoreConfig(dir=str(tmp_path / "store"), tokens=4096)
    )
    assert (MODEL_DIR / "config.json").exists()
    assert cache(config)["rows"] == 4096
    assert Store.open(tmp_path / "store").width("blocks.2.hook_resid_post") > 16
