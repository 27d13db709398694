"""What caching promises under faults, with the real command, real workers, real SIGKILL and a really full disk."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import small_models
from small_store import files

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("PROVE_KILLS", "20"))
pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]

# Two processes that take every claim, as two do that were paused or share a disk without a common clock.
GREEDY = """
import sys
from saepipe import claims
take = claims.Claims.take
def always(self, name):
    (self._folder / name).unlink(missing_ok=True)
    return take(self, name)
claims.Claims.take = always
claims.Claims.release = lambda self, name: self._mine.pop(name, None)
sys.argv = ["saepipe.cache", *sys.argv[1:]]
from saepipe.cache import main
main()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    small_models.make(folder / "model", "llama")
    words = small_models.WORDS
    (folder / "text.txt").write_text("\n\n".join(" ".join(words[n % 7 :]) + f" {n}" for n in range(6000)))
    return folder


def command(inputs: Path, store: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "saepipe.cache"),
        *(f"model.name={inputs / 'model'}", "model.hooks=[blocks.0.hook_mlp_out,blocks.1.hook_resid_post]"),
        *("model.device=cpu", f"data.path={inputs / 'text.txt'}", "data.context_size=32", "data.held_out=0.1"),
        *(f"store.dir={store}", "store.tokens=60000", "store.shard_tokens=1024", "store.shuffle_tokens=4096"),
        *("store.batch_prompts=8", *more),
    ]


def run(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one undisturbed worker makes."""
    store = tmp_path_factory.mktemp("expected") / "store"
    done = run(command(inputs, store))
    assert done.returncode == 0, done.stderr
    return files(store)


def test_sigkills_at_random_moments_of_two_workers(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"\n{KILLS} SIGKILLs, seed {seed}")
    chance = random.Random(seed)
    store = tmp_path / "store"
    killed: list[str] = []
    while len(killed) < KILLS:
        log = tmp_path / "log"
        with log.open("w") as out:
            child = subprocess.Popen(
                command(inputs, store, "cache.workers=2"), cwd=ROOT, stdout=out, stderr=out, start_new_session=True
            )
            killed += disturb(child, store, chance)
            status = child.wait(timeout=300)
        if status == 0:
            assert files(store) == expected
            again = chance.sample(sorted(store.rglob("0*.json")), 30)  # more to do for what kills are left
            for path in [*again, store / "manifest.json"]:
                path.unlink(missing_ok=True)
    done = run(command(inputs, store, "cache.workers=2"))
    assert done.returncode == 0, done.stderr
    assert files(store) == expected
    print(f"killed: {', '.join(f'{killed.count(kind)} x {kind}' for kind in sorted(set(killed)))}")
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(store) in str(process.info["cmdline"])]


def disturb(child: "subprocess.Popen[bytes]", store: Path, chance: random.Random) -> list[str]:
    """Kill all, the parent, or one helper, some time after the first claim or in the middle of tokenising."""
    deadline = time.monotonic() + 60
    while child.poll() is None and not (store / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 8))
    if child.poll() is not None:
        return []
    victim = chance.choice(["all", "parent", "helper"])
    helpers = [
        process for process in psutil.Process(child.pid).children() if "spawn_main" in " ".join(process.cmdline())
    ]
    if victim == "helper":
        if not helpers:
            return []
        os.kill(helpers[0].pid, signal.SIGKILL)
    elif victim == "parent":
        child.kill()
        psutil.wait_procs(helpers, timeout=30)
        assert not any(helper.is_running() for helper in helpers)  # a helper ends with its parent
    else:
        os.killpg(child.pid, signal.SIGKILL)
    return [victim]


def test_two_workers_that_both_own_every_shard(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", GREEDY, *command(inputs, tmp_path / "store")[3:]]
    pair = [
        subprocess.Popen(
            arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=600)[1] for one in pair]
    assert [one.returncode for one in pair] == [0, 0], said
    assert files(tmp_path / "store") == expected


def test_a_disk_that_is_full_and_freed_later(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(map(len, expected.values()))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * size}", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine does not let a test mount a small disk: {mounted.stderr.strip()}")
    store, others = disk / "store", disk / "others"
    try:
        for _ in range(2):
            there = len(list(store.rglob("0*.json")))
            child = subprocess.Popen(
                command(inputs, store, "cache.workers=2"), cwd=ROOT, stderr=subprocess.PIPE, text=True
            )
            while child.poll() is None and len(list(store.rglob("0*.json"))) < there + 4:
                time.sleep(0.01)
            with suppress(OSError):  # somebody else fills the disk, faster than the workers
                others.write_bytes(b"x" * 2 * size)
            _, said = child.communicate(timeout=300)
            assert child.returncode == 2, said
            assert "no space left on its disk" in said
            assert "Traceback" not in said
            assert not list(disk.rglob("*.tmp"))
            full = run(command(inputs, store, "cache.workers=2"))
            assert full.returncode == 2, full.stderr  # refused before anything is computed
            assert "GB more and its disk has" in full.stderr
            others.unlink()
        done = run(command(inputs, store, "cache.workers=2"))
        assert done.returncode == 0, done.stderr
        assert files(store) == expected
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
