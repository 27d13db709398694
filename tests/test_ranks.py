"""What two real ranks exchange, and that they train what one would: one start for all of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import small_runs
import small_store
import small_works
import torch

from saepipe import rank_processes, saes
from saepipe.config import RunFolder
from saepipe.launched import Launch
from saepipe.ranks import ALONE, Ranks
from saepipe.runs import Run

STEPS = 24
CASES = {case: found for case, found in small_runs.cases().items() if case.split("-")[1] in ("resample", "auxk")}
"""Every architecture, with what is drawn from the global batch, and with terms of the dead latents."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exchange on two ranks, and train there and alone, each run in a folder `<world size>/<case>`."""
    folder = tmp_path_factory.mktemp("ranks")
    small_store.build(folder / "store")
    more = ["trainer.precision=64-true", "train.log_every_steps=4", "train.evaluate_every_steps=12"]
    more += ["stream.lanes=4"]  # each lane has windows of its own, which cost most of the time
    configs = {
        world: [
            small_runs.configured(small_runs.keys(name, STEPS, *keys, *more), folder / "store", folder / world / case)
            for case, (name, keys) in CASES.items()
        ]
        for world in ("1", "2")
    }
    small_runs.train_each(configs["1"], Launch.alone())
    moved = dataclasses.replace(configs["2"][0], run=RunFolder(dir=str(folder / "moved")))
    with small_runs.interrupted(after_steps=9):
        small_runs.train_each([moved], Launch.alone())
    assert small_runs.state(folder / "moved")["steps_done"] == 11
    configs["2"].append(moved)
    rank_processes.run(small_works.exchange_and_train, (folder, configs["2"]), 2)
    return folder


@pytest.fixture(scope="module")
def found(done: Path) -> list[dict[str, Any]]:
    return [torch.load(done / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_alone_each_gives_back_what_it_was_given() -> None:
    x = torch.randn(6, 3)
    assert ALONE.sum(x) is ALONE.least(x) is ALONE.lanes(x, 3) is x


def test_sums_and_least_values(found: list[dict[str, Any]]) -> None:
    for each in found:
        for dtype in (torch.float32, torch.float64, torch.int64):
            assert torch.equal(each[f"sum {dtype}"], torch.tensor([3, -6, 7], dtype=dtype))
            assert torch.equal(each[f"least {dtype}"], torch.tensor([1, -3, 0], dtype=dtype))


def test_what_ranks_have_is_put_in_the_order_of_the_global_batch(found: list[dict[str, Any]]) -> None:
    assert small_works.rows(Ranks(1, 2)).squeeze(1).tolist() == [*range(6, 12), *range(18, 24)]
    for each in found:
        whole, column = each["lanes"]
        assert torch.equal(whole, torch.arange(24)[:, None])
        assert torch.equal(column, torch.arange(24))


def test_batchtopk_keeps_what_one_rank_would(found: list[dict[str, Any]]) -> None:
    for name, values, count in small_works.kept_cases(torch.Generator().manual_seed(0)):
        expected, chosen = small_works.kept(values, count, ALONE)  # tests/saes/test_batchtopk.py sorts to find them
        for kind in ("smallest", "parts"):
            (one, mine), (other, theirs) = (each[f"{kind} {name}"] for each in found)
            assert torch.equal(one, expected), (kind, name)
            assert torch.equal(other, expected), (kind, name)
            assert mine + theirs == chosen, (kind, name)
        for each in found if f"kth {name}" in found[0] else ():
            assert torch.equal(each[f"kth {name}"], expected), name


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_does(done: Path, case: str) -> None:
    assert_same(done / "1" / case, done / "2" / case)


def test_a_run_that_one_rank_began_goes_on_with_two(done: Path) -> None:
    summary = Run(done / "moved").summary()
    assert summary is not None
    assert (summary["resumed_from_step"], summary["ranks"]) == (11, 2)
    assert_same(done / "1" / next(iter(CASES)), done / "moved")


def assert_same(alone: Path, together: Path) -> None:
    one, two = small_runs.state(alone), small_runs.state(together)
    assert one["steps_done"] == two["steps_done"] == STEPS
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)
    for at, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(two["optimizer"]["state"][at][name], value, rtol=1e-7, atol=1e-9)
    timed = {"details/tokens_per_s", "details/seconds_left"}
    assert one["last_metrics"].keys() == two["last_metrics"].keys() > timed
    for name in one["last_metrics"].keys() - timed:
        assert two["last_metrics"][name] == pytest.approx(one["last_metrics"][name], rel=1e-6, abs=1e-9), name
    assert "heldout/explained_variance" in two["last_metrics"]


def test_every_architecture_is_there() -> None:
    assert {name for name, _ in CASES.values()} == set(saes.registered())
