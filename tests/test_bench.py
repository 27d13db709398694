"""The bench verb at tiny sizes: it says what it measured, and leaves nothing behind but what was asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_models

from saepipe import bench_memory, bench_stream, entry
from saepipe.bench import bench, scratch
from saepipe.bench_figure import Figure, table
from saepipe.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = [
    "model.hooks=[blocks.2.hook_resid_post]",
    "model.device=cpu",
    "trainer.accelerator=cpu",
    "data.context_size=16",
    "store.batch_prompts=4",
    "stream.batch_tokens=240",
    "stream.window_tokens=600",
    "bench.tokens=256",
    "bench.gb=0.002",
    "bench.rounds=2",
]
PARTS = "bench.parts=[limits,cache,stream,memory,evaluate]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("model") / "model", "llama")


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "saepipe.bench", *TINY, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_it_measures_all_parts_prints_a_table_and_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    overrides = [f"model.name={model}", "bench.out=out.json", "bench.dir=a/b", "bench.rounds=1", PARTS]
    done = subprocess.run(command(*overrides), cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert [*found["seconds"]] == PARTS.partition("[")[2].strip("]").split(",")
    machine = found["machine"]
    assert machine["cores"] == os.cpu_count()
    assert machine["memory_gb"] > 0
    assert {"date", "cpu", "threads", "versions", "load_before", "commit"} <= machine.keys()
    names = [figure["figure"] for figure in found["figures"]]
    assert sum(name.startswith("cache, ") for name in names) == 4
    assert sum(name.startswith("stream, rows/s") for name in names) == (2 if hasattr(os, "posix_fadvise") else 1)
    assert sum(name.startswith("stream, memory") for name in names) == 3
    assert sum(name.startswith("limit, ") for name in names) == (4 if hasattr(os, "posix_fadvise") else 3)
    assert "evaluate, 4 plain forward passes over it" in names
    for figure in found["figures"]:
        assert figure["ratio"] > 0
        assert (figure["unit"] != "") == figure["figure"].startswith("limit")
        assert len(figure["rounds"]) == 1
        assert figure["figure"] in done.stdout
        assert figure["met"] in (True, False) if figure["bar"] else figure["met"] is None


def test_the_random_model_is_measured_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saepipe import bench_cache

    monkeypatch.setattr(bench_cache, "LAYERS", 2)
    monkeypatch.setattr(bench_cache, "WIDTH", 64)
    monkeypatch.setattr(bench_cache, "BLOCK", 1)
    config = entry.load_config("bench", [*TINY, "bench.parts=[cache]", f"bench.dir={tmp_path}/x", "bench.rounds=1"])
    figures = bench(config)["figures"]
    assert figures[1]["bar"] == "at least 0.95"
    assert figures[1]["cache_tokens_per_s"] > 0
    assert figures[2]["figure"] == "cache, time of 2 hooks over that of the deepest, capturing"
    assert not list(tmp_path.iterdir())


def test_nothing_stays_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_stream._Plain, "read", interrupt)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    config = entry.load_config("bench", [*TINY, "bench.parts=[stream]", f"bench.dir={tmp_path}/mine"])
    with pytest.raises(KeyboardInterrupt):
        bench(config)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
def test_nothing_stays_after_a_signal(tmp_path: Path) -> None:
    overrides = ["bench.parts=[stream]", "bench.dir=scratch", "bench.rounds=100000"]
    process = subprocess.Popen(
        command(*overrides), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not list(tmp_path.rglob("*.safetensors")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["bench.parts=[caches]"], "bench.parts=caches is not known; did you mean cache"),
        (["bench.parts=[]"], "name some of limits, cache, stream, step"),
        (["bench.gb=0.0001", "bench.parts=[stream]"], "give at least bench.gb="),
        (["bench.architectures=[topk2]", "bench.parts=[step]"], "bench.architectures=topk2 is not known; did you mean"),
        (["bench.peers=true", "bench.peers_python=no/python", "bench.parts=[step]"], "make it with `make peers`"),
        (["bench.batch_tokens=30", "bench.parts=[ranks]"], "bench.batch_tokens=30 cannot be shared by 4 ranks"),
        (["bench.gb=1e9"], "bench.gb=1000000000.0 needs"),
        (["model.hooks=[blocks.1.hook_mlp_out]", "model.name=demo", "bench.parts=[cache]"], "give blocks.N.hook_resid"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench(entry.load_config("bench", [*TINY, f"bench.dir={tmp_path}/x", *overrides]))
    assert not list(tmp_path.iterdir())


def test_memory_needs_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "STATUS", tmp_path / "nothing")
    with pytest.raises(UserError, match="leave memory out"):
        bench_memory.measure(entry.load_config("bench", TINY), tmp_path)


def test_a_folder_that_somebody_else_uses_meanwhile_stays(tmp_path: Path) -> None:
    with scratch(tmp_path / "new" / "er") as folder:
        assert folder.is_dir()
        (tmp_path / "new" / "file").touch()
    assert not folder.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]


def test_the_table_says_what_was_met() -> None:
    figures = [
        Figure("speed", [0.2, 0.9, 1.0], {}, at_least=0.95),
        Figure("size", [1.1], {}, at_most=1.2),
        Figure("other", [2.0], {}),
        Figure("time", [2000.0], {}, unit="s", told="1 token/s"),
    ]
    assert table(figures).splitlines() == [
        "figure  ratio        bar",
        "speed   0.900        at least 0.95  missed",
        "size    1.100        at most 1.2    met",
        "other   2.000",
        "time    2,000.000 s                         1 token/s",
    ]
