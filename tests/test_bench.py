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
from saepipe.bench_figure import Figure, speed, table
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
    assert "evaluate, share of its time that 4 plain forward passes take" in names
    for figure in found["figures"]:
        assert figure["value"] > 0
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
    assert figures[1]["bar"] == ""  # too few tokens to judge by
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
def test_a_hang_up_ends_it_unless_it_is_ignored(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended, scratch(tmp_path):
        os.kill(os.getpid(), signal.SIGHUP)
    assert ended.value.code == 129
    assert not list(tmp_path.iterdir())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with scratch(tmp_path) as folder:
            os.kill(os.getpid(), signal.SIGHUP)
            assert folder.is_dir()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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
    assert "saepipe: SIGTERM; the parts that were finished are above" in error
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
        (["bench.k=20", "bench.d_sae=39"], "bench.k=20 is more than half of bench.d_sae=39"),
        (["bench.out=."], "bench.out=. is a folder; name a file"),
        (["bench.against=README.md"], "bench.against=README.md is no file that bench.out=README.md would have written"),
        (["bench.against=gone.json"], "bench.against=gone.json is no file"),
        (["trainer.precision=64-true"], "trainer.precision=64-true is not measured"),
        (["trainer.devices=2"], "leave trainer.devices and trainer.num_nodes out"),
        (["bench.gb=1e9"], "bench.gb=1000000000.0, bench.batch_tokens=2048"),
        (["model.hooks=[blocks.1.hook_mlp_out]", "model.name=demo", "bench.parts=[cache]"], "give blocks.N.hook_resid"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench(entry.load_config("bench", [*TINY, f"bench.dir={tmp_path}/x", *overrides]))
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    keys = ["trainer.accelerator=gpu", f"bench.dir={tmp_path}/x", "bench.parts=[limits]"]
    with pytest.raises(UserError, match="accelerator=gpu: there is no CUDA device"):
        bench(entry.load_config("bench", [*TINY, *keys]))


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


def test_what_a_killed_bench_left_is_gone_and_nothing_else(tmp_path: Path) -> None:
    for name in ("saepipe-bench-left", "saepipe-bench-mine", "bench-other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "saepipe-bench-left" / ".lock").touch()
    with scratch(tmp_path) as first, scratch(tmp_path) as second:
        assert first.is_dir()  # another bench holds it
        assert second.is_dir()
        there = {path.name for path in tmp_path.iterdir()} - {first.name, second.name}
    assert there == {path.name for path in tmp_path.iterdir()} == {"saepipe-bench-mine", "bench-other"}


def test_the_table_says_what_was_met() -> None:
    figures = [
        Figure("speed", [0.2, 0.9, 1.0], {}, at_least=0.95),
        Figure("size", [1.1], {}, at_most=1.2),
        Figure("other", [2.0], {}),
        Figure("time", [2000.0], {}, unit="s", told="1 token/s"),
    ]
    assert table(figures).splitlines() == [
        "figure  value        rounds    wanted",
        "speed   0.900        0.2 to 1  at least 0.95  missed",
        "size    1.100                  at most 1.2    met",
        "other   2.000",
        "time    2,000.000 s                                   1 token/s",
    ]
    assert table(figures[1:], {"time": 1500.0, "gone": 1.0}).splitlines() == [
        "figure  value        rounds  there        wanted",
        "size    1.100                             at most 1.2  met",
        "other   2.000",
        "time    2,000.000 s          1,500.000 s                    1 token/s",
    ]


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (0.001, "0 tokens/s, 86.4 a day"),
        (0.5, "0 tokens/s, 43.2 thousand a day"),
        (307.0, "307 tokens/s, 26.5 million a day"),
        (15_348.0, "15,348 tokens/s, 1.33 billion a day"),
        (2e7, "20,000,000 tokens/s, 1.73 trillion a day"),
    ],
)
def test_a_rate_is_told_by_the_second_and_by_the_day(rate: float, words: str) -> None:
    assert speed(rate) == words


def test_what_was_measured_until_an_interruption_is_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from saepipe import bench as module
    from saepipe import bench_limits

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_limits, "measure", lambda *_: [Figure("limit, wit", [3.0], {})])
    monkeypatch.setattr(bench_stream, "measure", interrupt)
    out = tmp_path / "out.json"
    keys = ["bench.parts=[limits,stream]", f"bench.dir={tmp_path}/x", f"bench.out={out}"]
    with pytest.raises(SystemExit) as ended:
        module._interruptible(entry.load_config("bench", [*TINY, *keys]))
    assert ended.value.code == 130
    assert "saepipe: interrupted; the parts that were finished are above" in capsys.readouterr().err
    assert [figure["value"] for figure in json.loads(out.read_text())["figures"]] == [3.0]


@pytest.mark.parametrize(
    ("part", "key"),
    [
        *((part, "bench.batch_tokens=64") for part in ("step", "train", "start", "grid", "ranks")),
        *(("cache", "bench.tokens=16383"), ("stream", "bench.gb=0.9"), ("memory", "bench.gb=0.9")),
    ],
)
def test_promises_are_judged_at_their_sizes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, key: str
) -> None:
    from saepipe import bench as module

    keys = ["trainer.accelerator=cpu", f"bench.parts=[{part}]", f"bench.dir={tmp_path}/x"]
    monkeypatch.setattr(module, "_part", lambda _: lambda *_: [Figure("wit", [3.0], {}, at_least=4.0)])
    for more, bar, met in (([], "at least 4", False), ([key], "", None)):
        (figure,) = bench(entry.load_config("bench", [*keys, *more]))["figures"]
        assert (figure["bar"], figure["met"]) == (bar, met)


def test_another_machines_values_stand_beside_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from saepipe import bench_limits

    monkeypatch.setattr(bench_limits, "measure", lambda *_: [Figure("limit, wit", [3.0], {}, unit="W")])
    there = tmp_path / "there.json"
    keys = ["bench.parts=[limits]", f"bench.dir={tmp_path}/x"]
    bench(entry.load_config("bench", [*TINY, *keys, f"bench.out={there}"]))
    there.write_text(there.read_text().replace("3.0", "4.0"))
    with caplog.at_level("INFO", "saepipe"):
        bench(entry.load_config("bench", [*TINY, *keys, f"bench.against={there}"]))
    assert "limit, wit  3.000 W          4.000 W" in caplog.text


def test_a_key_that_is_not_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from saepipe import bench_limits

    monkeypatch.setattr(bench_limits, "measure", lambda *_: [Figure("limit, wit", [3.0], {})])
    keys = ["bench.parts=[limits]", f"bench.dir={tmp_path}/x", "sae.k=4", "sae=topk"]
    bench(entry.load_config("bench", [*TINY, *keys]))
    assert "sae.k=4 has no effect on bench.parts=['limits'], which reads the bench group" in caplog.text
