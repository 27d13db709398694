import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from saepipe import entry, saes
from saepipe.config import RunConfig
from saepipe.errors import UserError

VERBS = ("cache", "train", "evaluate", "analyze", "steer", "attribute", "contrast", "bench")
EXPERIMENTS = sorted(path.stem for path in (entry.CONF / "experiment").glob("*.yaml"))
ROOT = Path(__file__).parents[1]


def run(verb: str, *overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"saepipe.{verb}", *overrides]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_root_config_with_the_whole_schema(verb: str) -> None:
    config = entry.load_config(verb)
    assert isinstance(config, RunConfig)
    assert config.sae.architecture in saes.registered()
    assert config.run.dir == "runs/default"
    assert config.store.dir == "stores/default"


def test_the_experiments_that_are_promised_are_there() -> None:
    assert {"demo", "gemma2b", "gemma2-2b", "gpt2-small", "pythia70m"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_experiment_composes_with_every_verb(verb: str, experiment: str) -> None:
    config = entry.load_config(verb, [f"+experiment={experiment}", "sae.d_sae=64"])
    assert (config.run.name, config.sae.resolve(128)) == (experiment, 64)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("architecture", saes.registered())
def test_every_experiment_composes_with_every_architecture(architecture: str, experiment: str) -> None:
    config = entry.load_config("train", [f"+experiment={experiment}", f"sae={architecture}"])
    assert (config.run.name, config.sae.architecture) == (experiment, architecture)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_sets_architecture_neutral_sae_keys_only(experiment: str) -> None:
    sae = OmegaConf.load(entry.CONF / "experiment" / f"{experiment}.yaml").get("sae") or {}
    assert set(sae) <= {item.name for item in fields(saes.SAEConfig)} - {"architecture"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_command_hardware_disk_time_and_metrics(experiment: str) -> None:
    text = (entry.CONF / "experiment" / f"{experiment}.yaml").read_text()
    for word in ("# @package _global_", "python -m saepipe", "Hardware:", "Disk:", "Time:", "Expect:"):
        assert word in text


def test_gemma2b_is_standard_with_a_coefficient_to_sweep() -> None:
    config = entry.load_config("train", ["+experiment=gemma2b", "sae.l1_coefficient=4"])
    assert (config.model.name, config.sae.architecture, config.sae.l1_coefficient) == ("google/gemma-2b", "standard", 4)
    assert config.sae.resolve(2048) == 16_384


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sae.kk=3", "did you mean sae.k"),
        ("trani.tokens=3", "train.tokens"),
        ("+foo=3", "key=foo is not known"),
        ("+store.foo=3", "key=store.foo is not known"),
        ("+sae.l1_coefficient=3", "l1_coefficient"),
        ("sae=topkk", "did you mean topk"),
        ("+experiment=gemma", "did you mean gemma2b"),
        ("store.tokens=abc", "store.tokens=abc"),
        ("store.tokens=1e6", "1_000_000"),
        ("train.seed=null", "train.seed"),
        ("sae.k=x", "k does not fit"),
        ("sae.k=0", "sae.k=0"),
        ("sae.d_sae=0", "sae.d_sae=0"),
        ("train.tokens", "key=value"),
        ("model.hooks=3", "model.hooks=3"),
        ("sae.l1_coefficient=3", "choose sae=gated or sae=standard"),
        ("experiment=demo", "+experiment=NAME"),
        ("sae=null", "sae=topk"),
        ("sae=3", "sae=topk"),
        ("sae.k=1,2", "add -m for a run of each, or grid.k=[1,2] to train them in one job"),
        ("store.tokens=3,4", "add -m for a run of each"),
        ("grid.k=1,2", "write grid.k=[1,2]"),
        ("run.dir=x${y}", "Interpolation key 'y' not found"),
    ],
)
def test_a_mistake_is_one_sentence_with_key_and_cure(override: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        entry.load_config("train", [override])
    assert "\n" not in str(raised.value)


def test_a_config_comes_back_from_its_file(tmp_path: Path) -> None:
    config = entry.load_config("train", ["+experiment=demo", "sae.k=7", "optim.grad_clip=1"])
    entry.save_config(config, tmp_path / "config.yaml")
    assert entry.read_config(tmp_path / "config.yaml") == config


def test_a_missing_or_foreign_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        entry.read_config(tmp_path / "config.yaml")
    for content in (b"colour: red\n", b"", b"model: {name: [", b"\xff\xfe\x00", b"sae: null\n"):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.yaml is damaged"):
            entry.read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("folder", ["a b", "it's", "ünï ☃", "k=3,x=1", "a;b", "~/x", "a/sae.k=16"])
def test_a_folder_may_have_any_name(folder: str) -> None:
    if "," in folder:  # would be two of them
        folder = f'"{folder}"'
    config = entry.load_config("train", [f"run.dir={folder}", f"store.dir={folder}"])
    assert config.run.dir == config.store.dir == str(Path(folder.strip('"')).expanduser())


def test_differences_name_the_keys() -> None:
    mine, theirs = entry.load_config("train"), entry.load_config("train", ["sae.k=16", "optim.lr=0.5"])
    found = entry.differences(mine, theirs)
    assert found["sae.k"] == (32, 16)
    assert found["optim.lr"][1] == 0.5
    assert set(found) == {"sae.k", "optim.lr", "overrides"}


def test_flags_may_stand_anywhere_and_every_point_is_tried(tmp_path: Path) -> None:
    done = run("train", "sae.k=7", "-m", "optim.lr=-1,-2", cwd=tmp_path)
    assert done.returncode == 2
    for value in (-1, -2):
        assert f"saepipe: optim.lr={value}: optim.lr={value}.0 is out of range" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m saepipe.train --help | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout
    assert "Traceback" not in done.stderr


def test_the_command_line_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    done = run("train", "sae.kk=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean sae.k" in done.stderr
    assert not list(tmp_path.iterdir())  # Hydra leaves nothing either


def test_train_without_a_store_prints_the_cache_command(tmp_path: Path) -> None:
    done = run("train", "+experiment=gemma2b", "model.name=some/model", "sae.l1_coefficient=4", cwd=tmp_path)
    assert done.returncode == 2
    assert "python -m saepipe.cache +experiment=gemma2b model.name=some/model\n" in done.stderr
    assert not list(tmp_path.iterdir())
