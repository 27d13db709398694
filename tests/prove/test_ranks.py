"""Any number of ranks trains the same SAE: in float64 to the last digits, in float32 as far as rounding goes."""

import csv
from pathlib import Path

import pytest
import small_runs
import small_store
import torch

from saepipe import rank_processes
from saepipe.errors import UserError

STEPS = 50
WORLDS = (1, 2, 4)

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=["64-true", pytest.param("32-true", marks=pytest.mark.long)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Train every case on every number of ranks, each in a folder `<world size>/<case>`."""
    folder = tmp_path_factory.mktemp("ranks")
    small_store.build(folder / "store")
    for world in WORLDS:
        configs = [
            small_runs.configured(
                small_runs.keys(name, STEPS, *more, f"trainer.precision={request.param}", "train.log_every_steps=1"),
                folder / "store",
                folder / str(world) / case,
            )
            for case, (name, more) in small_runs.cases().items()
        ]
        rank_processes.run(small_runs.train_each, configs, world)
    return request.param, folder


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("case", small_runs.cases())
def test_ranks_equal_one(trained: tuple[str, Path], case: str, world: int) -> None:
    precision, folder = trained
    limit = 1e-9 if precision == "64-true" else 1e-4
    one, several = (small_runs.tensors(folder / str(n) / case) for n in (1, world))
    assert one.keys() == several.keys()
    worst = 0.0
    for name, value in one.items():
        if value.dtype == torch.int64:  # the tokens since a latent fired: the same latents are dead
            assert torch.equal(value, several[name]), name
            continue
        norm, difference = value.double().norm(), (value.double() - several[name].double()).norm()
        worst = max(worst, float(difference / norm) if norm > 0 else float(difference))
    print(f"{precision} {case} on {world} ranks: {worst:.1e}")
    assert worst <= limit
    if not case.endswith("-none"):
        plain = small_runs.tensors(folder / "1" / f"{case.split('-')[0]}-none")
        assert not torch.equal(plain["sae.W_dec"], one["sae.W_dec"]), "nothing was revived"
    names, *rows = csv.reader((folder / "1" / case / "metrics.csv").read_text().splitlines())
    assert any(float(row[names.index("sparsity/dead_features")]) > 0 for row in rows), "no latent was ever dead"


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_optimizer(tmp_path: Path) -> None:
    small_store.build(tmp_path / "store")
    keys = small_runs.keys("batchtopk", STEPS, "train.checkpoint_every_steps=5")
    config = small_runs.configured(keys, tmp_path / "store", tmp_path / "x")
    with pytest.raises(UserError, match=r"losses/mse_loss was not finite at step 14 \(batch 13 of the stream\)"):
        rank_processes.run(small_runs.train_with_nan, config, 2)
    assert small_runs.state(tmp_path / "x")["steps_done"] == 10
    assert all(value.isfinite().all() for value in small_runs.tensors(tmp_path / "x").values())
    rank_processes.run(small_runs.train_each, [config], 2)  # what was saved is good
    assert small_runs.state(tmp_path / "x")["steps_done"] == STEPS


def test_more_ranks_see_the_same_losses(trained: tuple[str, Path]) -> None:
    _, folder = trained
    for case in small_runs.cases():
        rows = [(folder / str(n) / case / "metrics.csv").read_text().splitlines() for n in WORLDS]
        columns = [index for index, name in enumerate(rows[0][0].split(",")) if name.startswith(("losses", "metrics"))]
        for lines in zip(*(each[1:] for each in rows), strict=True):
            one, *others = [[float(line.split(",")[index]) for index in columns] for line in lines]
            for other in others:
                assert other == pytest.approx(one, rel=1e-4, abs=1e-4), case
