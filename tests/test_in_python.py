"""The verbs as functions, as in a notebook: configurations made in Python, twice, in threads and in event loops."""

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saepipe import entry, saes
from saepipe.analyze import analyze
from saepipe.cache import cache
from saepipe.config import (
    AnalyzeConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    RunFolder,
    StoreConfig,
    StreamConfig,
    TrainConfig,
)
from saepipe.errors import UserError
from saepipe.evaluate import evaluate
from saepipe.train import train

TopKConfig = saes.architecture("topk").config_class
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def configured(**groups: object) -> RunConfig:
    return RunConfig(
        **{
            "model": ModelConfig(name="demo", hooks=["blocks.2.hook_resid_post"]),
            "data": DataConfig(context_size=32),
            "store": StoreConfig(tokens=6144),
            "stream": StreamConfig(batch_tokens=512),
            "sae": TopKConfig(d_sae=64, k=8),
            "train": TrainConfig(tokens=4096),
            "run": RunFolder(name="mine"),
            "evaluate": EvaluateConfig(tokens=1000),
            "analyze": AnalyzeConfig(tokens=1000, latents=4),
            **groups,
        }
    )


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_timing: None) -> None:
    monkeypatch.chdir(tmp_path)


def all_verbs(config: RunConfig) -> list[float]:
    cached, trained = cache(config), train(config)
    assert (cached["dir"], trained["run_dir"]) == ("stores/mine", "runs/mine")
    return [trained["metrics"]["metrics/l0"], evaluate(config)["l0"], analyze(config)["live"]]


def test_every_verb_twice_and_the_configuration_stays_as_it_was() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    config = configured()
    assert all_verbs(config) == all_verbs(config)
    assert config == configured()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_inside_of_a_running_event_loop_and_in_a_thread_of_its_own() -> None:
    async def cell() -> list[float]:
        return all_verbs(configured())

    found = asyncio.run(cell())
    others: list[list[float]] = []
    thread = threading.Thread(target=lambda: others.append(all_verbs(configured(train=TrainConfig(tokens=4096)))))
    thread.start()
    thread.join()
    assert others == [found]


def test_a_thread_trains_as_well() -> None:
    cache(configured())
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(train(configured())["run_dir"]))
    thread.start()
    thread.join()
    assert found == ["runs/mine"]


def test_an_architecture_is_a_dataclass_a_name_a_dictionary_or_the_default() -> None:
    for given in (None, "topk", {"architecture": "topk"}, TopKConfig()):
        assert entry.settled(configured(sae=given)).sae == entry.load_config("train").sae
    assert entry.settled(configured(sae={"architecture": "gated", "l1_coefficient": 2})).sae.l1_coefficient == 2.0


def test_a_wrong_type_is_refused_by_its_key() -> None:
    config = configured()
    config.store.tokens = "many"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"store\.tokens does not fit"):
        cache(config)
    with pytest.raises(UserError, match="sae"):
        entry.settled(configured(sae="topq"))


@pytest.mark.parametrize("first", ["", "import logging; logging.basicConfig(level='WARNING'); "])
def test_messages_are_shown_where_nobody_set_up_logging(first: str) -> None:
    code = f"{first}from saepipe import entry; entry.settled(entry.RunConfig()); entry.log.info('said')"
    code = code.replace("entry.log", "entry.logging.getLogger('saepipe.any')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "" if first else "said\n")
