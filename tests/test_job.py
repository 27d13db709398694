"""Jobs of one point and of several: what a grid is next to its points alone, and what is due on the way."""

import csv
import json
import re
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import small_runs
import small_store
import torch
from small_runs import HOOK, interrupted

from saepipe import entry, saes
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.formats import saelens
from saepipe.heldout import measure
from saepipe.job import Job
from saepipe.launched import Launch
from saepipe.runs import Run
from saepipe.saes.base import Step
from saepipe.store import Store
from saepipe.train import train

STEPS = 30
TARGET = list(small_store.HOOKS)[1]
RANKED = [name for name in saes.registered() if saes.architecture(name).sparse_step]
TIMED = {"details/tokens_per_s", "details/seconds_left"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "store"
    small_store.build(folder)
    return folder


def configured(store: Path, run: Path, architecture: str, *more: str) -> RunConfig:
    every = ["train.log_every_steps=10", "train.checkpoint_every_steps=10", "stream.prefetch_batches=0"]
    every += ["stream.lanes=4"]  # few of them, since each has windows of its own, which cost most of the time
    keys = small_runs.keys(architecture, STEPS, *every, *more, f"store.dir={store}", f"run.dir={run}")
    given = {key.split("=")[0]: key for key in keys if not key.startswith("grid=")}  # the last one of a key counts
    return entry.load_config("train", list(given.values()))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMED} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path, *, metrics: bool = True) -> None:
    """Compare two finished runs bit by bit: weights, counters, the optimizer, the export and the metrics."""
    for kind in ("state_dict", "optimizer"):
        first, second = (dict(flat(small_runs.state(run)[kind])) for run in (one, other))
        assert first.keys() == second.keys()
        assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    for name in (saelens.WEIGHTS, saelens.SPARSITY):
        assert (one / "sae" / name).read_bytes() == (other / "sae" / name).read_bytes()
    if metrics:
        assert rows(one) == rows(other)
    summaries = [json.loads((run / "summary.json").read_text())["metrics"] for run in (one, other)]
    for name in summaries[0].keys() - TIMED:
        assert summaries[0][name] == summaries[1][name], name


def flat(state: Any, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    """List the tensors in a state, by where they are."""
    if isinstance(state, torch.Tensor):
        return [(prefix, state)]
    items = state.items() if isinstance(state, dict) else ()
    return [found for key, value in items for found in flat(value, f"{prefix}.{key}")]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The blocks of training rows that were read so far: hook, shard and number."""
    found: list[tuple[str, int, int]] = []
    read = Store.read_block_into

    def counted(store: Store, hook: str, shard: int, block: int, *arguments: Any, held_out: bool = False) -> int:
        if not held_out:
            found.append((hook, shard, block))
        return read(store, hook, shard, block, *arguments, held_out=held_out)

    monkeypatch.setattr(Store, "read_block_into", counted)
    return found


GRIDS = {
    "topk": ("grid={k: [2,3], lr: [0.01,0.002]}", {"sae.k": ["2", "3"], "optim.lr": ["0.01", "0.002"]}),
    "matryoshka": ("grid.d_sae=[12,20]", {"sae.d_sae": ["12", "20"]}),
    "standard": ("grid.dead_method=[resample,ghost]", {"sae.dead_method": ["resample", "ghost"]}),
    "jumprelu": ("grid.hook=[blocks.0.hook_resid_post,blocks.1.hook_resid_post]", {"stream.hook": [HOOK, TARGET]}),
}


@pytest.mark.parametrize("architecture", GRIDS)
def test_a_grid_is_its_points_alone_and_reads_the_store_once(
    store: Path, tmp_path: Path, architecture: str, blocks: list[tuple[str, int, int]]
) -> None:
    written, lists = GRIDS[architecture]
    more = [f"{key}={values[0]}" for key, values in lists.items()]
    more = [*more, "sae.resample_every_steps=20", "train.evaluate_every_steps=15"]
    config = configured(store, tmp_path / "grid", architecture, *more)
    config = entry.load_config("train", [*config.overrides, written])
    summary = train(config)
    read_together = Counter(blocks)
    alone: dict[str, Counter[tuple[str, int, int]]] = {}
    names = list(lists)
    points = [[value] for value in lists[names[0]]]
    for name in names[1:]:
        points = [[*point, value] for point in points for value in lists[name]]
    for point in points:
        typed = [f"{name}={value}" for name, value in zip(names, point, strict=True)]
        folder = ",".join(sorted(typed))
        blocks.clear()
        train(configured(store, tmp_path / "alone" / folder, architecture, *more, *typed))
        hook = configured(store, tmp_path, architecture, *more, *typed).stream.hook
        alone[str(hook)] = Counter(blocks)
        assert_same_run(tmp_path / "grid" / folder, tmp_path / "alone" / folder)
        assert summary["points"][str(tmp_path / "grid" / folder)]["points"] == len(points)
    assert len(summary["points"]) == len(points)
    assert read_together == sum(alone.values(), Counter())
    assert read_together.total() > 5


def frozen_grid(store: Path, run: Path, *more: str) -> RunConfig:
    """A grid whose second point is not finite from its second step on."""
    return configured(store, run, "batchtopk", "grid.lr=[0.01,1e18,0.002]", *more)


def test_a_point_that_is_not_finite_is_frozen_and_told_and_the_others_go_on(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "grid"
    process = small_runs.launch(frozen_grid(store, run, "train.n_checkpoints=1").overrides)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert f"{run}/optim.lr=1e+18 is frozen, the others go on: losses/mse_loss was not finite at step 2" in output
    last = output.splitlines()[-1]
    assert last.startswith("saepipe: 1 of 3 points were frozen, the others are done: ")
    assert f"{run}/optim.lr=1e+18: losses/mse_loss was not finite at step 2 (batch 1 of the stream); " in last
    assert "lower optim.lr (now 1e+18)" in last
    broken = run / "optim.lr=1e+18"
    assert {path.name for path in broken.iterdir()} == {".lock", "config.yaml", "metrics.csv", "failure.txt"}
    assert rows(broken) == []
    for rate in ("0.01", "0.002"):
        train(configured(store, tmp_path / rate, "batchtopk", f"optim.lr={rate}"))
        assert_same_run(run / f"optim.lr={rate}", tmp_path / rate)
        assert [path.name for path in (run / f"optim.lr={rate}" / "sae_steps").iterdir()] == ["000000015"]
    # The same command says so again, at once.
    before = (run / "optim.lr=0.01" / "metrics.csv").stat().st_mtime_ns
    with pytest.raises(UserError, match="1 of 3 points were frozen"):
        train(frozen_grid(store, run))
    assert (run / "optim.lr=0.01" / "metrics.csv").stat().st_mtime_ns == before


def test_a_grid_of_which_no_point_is_left_stops(store: Path, tmp_path: Path) -> None:
    config = configured(store, tmp_path / "x", "standard", "grid.lr=[1e18,2e18]")
    with pytest.raises(UserError, match=r"was not finite at step 2 \(batch 1 of the stream\); what was saved"):
        train(config)
    assert not list(tmp_path.rglob("summary.json"))


def test_an_interrupted_grid_with_a_frozen_point_goes_on(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "grid"
    with interrupted(after_steps=13):
        train(frozen_grid(store, run))
    assert Run(run / "optim.lr=1e+18").failure()
    assert small_runs.state(run / "optim.lr=0.01")["steps_done"] == 15  # heeded a step late
    caplog.set_level("INFO", "saepipe")
    with pytest.raises(UserError, match=r"1 of 3 points were frozen.*optim\.lr=1e\+18"):
        train(frozen_grid(store, run))
    assert "2 points of batchtopk" in caplog.text
    assert "going on from step 15" in caplog.text
    for rate in ("0.01", "0.002"):
        train(configured(store, tmp_path / rate, "batchtopk", f"optim.lr={rate}"))
        assert_same_run(run / f"optim.lr={rate}", tmp_path / rate)


def test_a_checkpoint_under_another_name_is_refused(store: Path, tmp_path: Path) -> None:
    config = configured(store, tmp_path / "x", "topk")
    with interrupted(after_steps=12):
        train(config)
    folder = tmp_path / "x" / "checkpoints"
    for path in folder.glob("step-000000014.*"):
        shutil.copy(path, folder / path.name.replace("14", "19"))
    with pytest.raises(UserError, match="a checkpoint of step 14 under the name of step 19; delete it"):
        train(config)


def test_a_grid_goes_back_to_what_all_points_have(store: Path, tmp_path: Path) -> None:
    grid = configured(store, tmp_path / "grid", "gated", "grid.l1_coefficient=[0.1,1]")
    with interrupted(after_steps=22):
        train(grid)
    torn = tmp_path / "grid" / "sae.l1_coefficient=1" / "checkpoints" / "step-000000024.ckpt"
    torn.write_bytes(torn.read_bytes()[:-100])
    summary = train(grid)
    assert [point["resumed_from_step"] for point in summary["points"].values()] == [20, 20]
    for coefficient in ("0.1", "1"):
        alone = tmp_path / coefficient
        train(configured(store, alone, "gated", f"sae.l1_coefficient={coefficient}"))
        assert_same_run(tmp_path / "grid" / f"sae.l1_coefficient={coefficient}", alone)
        assert [row["step"] for row in rows(tmp_path / "grid" / f"sae.l1_coefficient={coefficient}")] == [
            "10",
            "20",
            "30",
        ]


def test_points_that_were_begun_alone_lose_nothing_in_a_grid(store: Path, tmp_path: Path) -> None:
    def point(run: Path, k: int) -> RunConfig:
        return configured(store, run / f"sae.k={k}", "topk", f"sae.k={k}")

    for k, steps in ((2, 22), (3, 12)):
        with interrupted(after_steps=steps):
            train(point(tmp_path / "grid", k))
    summary = train(configured(store, tmp_path / "grid", "topk", "grid.k=[2,3,4]"))
    assert [found["resumed_from_step"] for found in summary["points"].values()] == [
        24,
        14,
        0,
    ]
    for k in (2, 3, 4):
        train(point(tmp_path / "alone", k))
        assert_same_run(tmp_path / "grid" / f"sae.k={k}", tmp_path / "alone" / f"sae.k={k}", metrics=k == 4)


def test_a_grid_that_goes_back_says_so_and_writes_its_checkpoints_anew(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = configured(store, tmp_path / "grid", "topk", "grid.k=[2,3]")
    with interrupted(after_steps=12):
        train(grid)
    with interrupted(after_steps=24):  # one of them goes on alone, to 20 and 26
        train(configured(store, tmp_path / "grid" / "sae.k=2", "topk", "sae.k=2"))
    folder = tmp_path / "grid" / "sae.k=2" / "checkpoints"
    shutil.copytree(tmp_path / "grid" / "sae.k=3" / "checkpoints", folder, dirs_exist_ok=True)  # as if 14 were there
    caplog.clear()
    with interrupted(after_steps=22):
        train(grid)
    assert "sae.k=2: going on from step 14, not from step 26" in caplog.text
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["step-000000020.ckpt", "step-000000024.ckpt"]


def test_a_grid_of_which_a_point_is_done_trains_the_others(store: Path, tmp_path: Path) -> None:
    grid = configured(store, tmp_path / "grid", "topk", "grid.k=[2,3]")
    train(grid)
    done, other = (tmp_path / "grid" / f"sae.k={k}" for k in (2, 3))
    before = (done / "summary.json").stat().st_mtime_ns
    shutil.copytree(other, tmp_path / "copy")
    for path in other.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(grid)
    assert (done / "summary.json").stat().st_mtime_ns == before
    assert_same_run(other, tmp_path / "copy")


def test_saes_on_the_way_are_those_of_shorter_runs(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path / "x", "batchtopk", "train.n_checkpoints=2"))
    steps = tmp_path / "x" / "sae_steps"
    assert sorted(path.name for path in steps.iterdir()) == ["000000010", "000000020"]
    for done in (10, 20):
        run = tmp_path / str(done)
        train(configured(store, run, "batchtopk", f"train.tokens={done * small_runs.BATCH}"))
        assert saelens.load(steps / f"{done:09d}").d_sae == 12
        for name in (saelens.WEIGHTS, saelens.SPARSITY):
            assert (steps / f"{done:09d}" / name).read_bytes() == (run / "sae" / name).read_bytes()


def test_held_out_figures_join_the_metrics(store: Path, tmp_path: Path) -> None:
    summary = train(configured(store, tmp_path / "x", "batchtopk", "train.evaluate_every_steps=12"))
    found = {row["step"]: row["heldout/explained_variance"] for row in rows(tmp_path / "x")}
    assert {step: bool(value) for step, value in found.items()} == {
        "10": False,
        "12": True,
        "20": False,
        "24": True,
        "30": True,  # the end, in the row of the step's own figures
    }
    expected = measure(Store.open(store), HOOK, HOOK, saelens.load(tmp_path / "x" / "sae"))
    assert float(found["30"]) == pytest.approx(expected["heldout/explained_variance"], rel=1e-4)
    held_out = {name: value for name, value in summary["metrics"].items() if name.startswith("heldout/")}
    assert held_out == pytest.approx(expected, rel=1e-4)
    assert "metrics/l0" in summary["metrics"]


@pytest.mark.parametrize("architecture", saes.registered())
def test_a_point_starts_from_an_exported_sae(store: Path, tmp_path: Path, architecture: str) -> None:
    first = job_of(configured(store, tmp_path / "first", architecture))
    point, folder = first._build(0, 0)[0], tmp_path / "first" / "sae"
    with torch.no_grad():
        point.sae.W_dec.mul_(torch.linspace(2, 3, 12)[:, None])
        if (threshold := dict(point.sae.named_buffers()).get("threshold")) is not None:
            threshold.fill_(0.02)
    first._export(0, point, folder)
    other = saelens.load(folder)
    keys = [f"train.init_from={folder}", "train.seed=5"]
    job = job_of(configured(store, tmp_path / "second", architecture, *keys))
    sae = job._build(0, 0)[0].sae
    with closing(job.streams[0].iterate()) as batches:
        x = next(batches).float()
    f, theirs = sae.encode(x), other.encode(x)
    assert 0 < (theirs > 0).float().mean() < 1
    torch.testing.assert_close(f, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(f), other.decode(theirs), rtol=1e-5, atol=1e-5)


def test_a_run_starts_from_an_exported_one_and_resumes(store: Path, tmp_path: Path) -> None:
    first = train(configured(store, tmp_path / "first", "batchtopk", "optim.lr=0.02"))
    keys = [f"train.init_from={tmp_path / 'first' / 'sae'}", "optim.lr=0.001", "train.log_every_steps=1"]
    train(configured(store, tmp_path / "whole", "batchtopk", *keys))
    with interrupted(after_steps=7):
        train(configured(store, tmp_path / "parted", "batchtopk", *keys))
    train(configured(store, tmp_path / "parted", "batchtopk", *keys))
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    fresh = rows(tmp_path / "first")[0]["metrics/explained_variance"]
    begun = float(rows(tmp_path / "whole")[0]["metrics/explained_variance"])
    assert begun > float(fresh)
    assert begun == pytest.approx(first["metrics"]["metrics/explained_variance"], abs=0.1)


def job_of(config: RunConfig) -> Job:
    """Make the job of one run, before it has begun."""
    from saepipe.train import adopt_plan, open_store, resolved

    opened = open_store(config)
    adopt_plan(config, opened)
    config.stream, config.sae = resolved(config, opened)
    return Job([config], opened, Launch.alone())


def test_what_a_run_cannot_start_from_is_refused_before_it_begins(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path / "first", "standard"))
    start = f"train.init_from={tmp_path / 'first' / 'sae'}"
    for architecture, more, words in (
        ("standard", [f"train.init_from={tmp_path}"], "is no SAE in a format that is known here"),
        ("standard", [start, "sae.d_sae=13"], "d_sae=12, where this run's has 13; change sae.d_sae"),
        ("standard", [start, f"stream.hook={TARGET}"], "d_in=6, where this run's has 4"),
        ("standard", [start, f"stream.target_hook={TARGET}"], "d_out=6, where this run's has 4"),
        ("standard", [start, "sae.apply_b_dec_to_input=false"], "set sae.apply_b_dec_to_input=true"),
        ("gated", [start], "has no b_gate, which sae=gated needs"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            train(configured(store, tmp_path / "x", architecture, *more))
        assert not (tmp_path / "x" / "config.yaml").exists()


@pytest.mark.parametrize("architecture", RANKED)
def test_a_sparse_step_is_not_compiled(store: Path, tmp_path: Path, architecture: str) -> None:
    words = rf"train\.compile=true does not go with sae={architecture}, whose sparse step .* leave it out"
    with pytest.raises(UserError, match=words):
        train(configured(store, tmp_path / "x", architecture, "train.compile=true"))
    assert not (tmp_path / "x" / "config.yaml").exists()


@pytest.mark.parametrize(("architecture", "skip"), [("topk", "true"), ("jumprelu", "false")])
def test_a_transcoder_is_trained_resumed_and_exported(
    store: Path, tmp_path: Path, architecture: str, skip: str
) -> None:
    keys = [f"stream.target_hook={TARGET}", f"sae.skip_connection={skip}", "optim.lr=0.01"]
    keys += ["sae.dead_method=resample", "sae.resample_every_steps=12", "train.evaluate_every_steps=10"]
    summary = train(configured(store, tmp_path / "whole", architecture, *keys))
    with interrupted(after_steps=17):
        train(configured(store, tmp_path / "parted", architecture, *keys))
    assert train(configured(store, tmp_path / "parted", architecture, *keys))["resumed_from_step"] == 19
    assert_same_run(tmp_path / "parted", tmp_path / "whole")
    sae = saelens.load(tmp_path / "parted" / "sae")
    assert (sae.is_transcoder, sae.d_in, sae.d_out) == (True, *small_store.HOOKS.values())
    assert (sae.metadata["hook_name"], sae.metadata["hook_name_out"]) == (HOOK, TARGET)
    assert (sae.W_skip is not None and bool(sae.W_skip.any())) == (skip == "true")
    assert not sae.cfg.apply_b_dec_to_input
    expected = measure(Store.open(store), HOOK, TARGET, sae)
    assert summary["metrics"]["heldout/mse"] == pytest.approx(expected["heldout/mse"], rel=1e-4)


@pytest.mark.parametrize("method", ["mean", "zeros"])
def test_a_transcoder_starts_from_both_hooks(store: Path, tmp_path: Path, method: str) -> None:
    opened = Store.open(store)
    keys = [f"stream.target_hook={TARGET}", f"sae.b_dec_init_method={method}", "sae.skip_connection=true"]
    job = job_of(configured(store, tmp_path, "topk", *keys))
    sae = job._build(0, 0)[0].sae
    assert (sae.is_transcoder, sae.d_in, sae.d_out) == (True, *small_store.HOOKS.values())
    for hook, scale in ((HOOK, sae.norm_scale), (TARGET, sae.target_scale)):
        assert float(scale) == pytest.approx(opened.statistics(hook).norm_scale)
    start = opened.statistics(TARGET).mean if method == "mean" else torch.zeros(sae.d_out)
    torch.testing.assert_close((sae.b_dec / sae.target_scale).detach(), start)
    with closing(job.streams[0].iterate()) as batches:
        x, y = next(batches)
    losses = sae.loss(x.float(), y.float(), Step())
    assert losses.target.shape == (small_runs.BATCH, sae.d_out)


def test_parts_must_divide_a_batch_and_train_the_same(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.micro_batches=5 does not divide the 24 rows that each of 1 ranks"):
        train(configured(store, tmp_path / "x", "batchtopk", "train.micro_batches=5"))
    for parts in (1, 3):
        keys = [f"train.micro_batches={parts}", "trainer.precision=64-true"]
        train(configured(store, tmp_path / str(parts), "batchtopk", *keys))
    one, three = (small_runs.tensors(tmp_path / str(parts)) for parts in (1, 3))
    for name, value in one.items():
        torch.testing.assert_close(three[name], value, rtol=1e-9, atol=1e-9)
