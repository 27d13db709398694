import json
from pathlib import Path

import pytest

from saepipe import entry
from saepipe.errors import UserError
from saepipe.runs import Run


def trained(folder: Path, *overrides: str, finished: bool = True) -> Run:
    run = Run(folder)
    entry.save_config(
        entry.load_config("train", ["model.name=small", f"run.dir={folder}", *overrides]), run.config_file
    )
    if finished:
        run.finish({"steps": 3, "store": {}})
    return run


def asked(folder: Path, *overrides: str) -> entry.RunConfig:
    return entry.load_config("evaluate", [f"run.dir={folder}", *overrides])


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    assert trained(tmp_path / "a", finished=False).summary() is None
    assert (
        trained(tmp_path / "b").summary()
        == {"steps": 3, "store": {}}
        == json.loads((tmp_path / "b/summary.json").read_text())
    )


def test_a_later_verb_takes_the_runs_keys_and_its_own(tmp_path: Path) -> None:
    run = trained(tmp_path, "sae.k=7", "store.dir=acts")
    config = run.finished_config(asked(tmp_path, "evaluate.tokens=99", "model.device=cpu", "analyze.latents=5"))
    assert (config.model.name, config.model.device) == ("small", "cpu")
    assert (config.sae.k, config.store.dir) == (7, "acts")
    assert (config.evaluate.tokens, config.analyze.latents) == (99, 5)


def test_a_store_that_has_moved_can_be_named(tmp_path: Path) -> None:
    assert trained(tmp_path).finished_config(asked(tmp_path, "store.dir=elsewhere")).store.dir == "elsewhere"


def test_a_typed_key_that_differs_from_the_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sae.k=9 differs from the run's: .* has sae.k=32"):
        trained(tmp_path).finished_config(asked(tmp_path, "sae.k=9"))


def test_no_run_and_an_unfinished_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.dir=.* holds no config.yaml"):
        Run(tmp_path).finished_config(asked(tmp_path))
    with pytest.raises(UserError, match="is not finished"):
        trained(tmp_path, finished=False).finished_config(asked(tmp_path))


def test_only_what_decides_the_weights_must_agree(tmp_path: Path) -> None:
    run = trained(tmp_path, "train.tokens=5000")
    run.refuse_another(entry.load_config("train", ["train.tokens=5000", "train.log_every_steps=3", "logger=wandb"]))
    with pytest.raises(UserError, match=r"optim.lr is 0.0003 there and 0.5 here; choose another run.dir"):
        run.refuse_another(entry.load_config("train", ["train.tokens=5000", "optim.lr=0.5"]))


@pytest.mark.parametrize("override", ["stream.positions=[1,3]", "stream.max_norm=10", "stream.roles=[user]"])
def test_another_filter_of_rows_is_another_run(tmp_path: Path, override: str) -> None:
    run = Run(tmp_path)
    entry.save_config(entry.load_config("train", []), run.config_file)
    with pytest.raises(UserError, match=rf"holds another run: {override.split('=')[0]} is None there and"):
        run.refuse_another(entry.load_config("train", [override]))
