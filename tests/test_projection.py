"""What a store will cost is said before anything is written, and refused where it cannot be."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_models

from saepipe import projection
from saepipe.config import CacheConfig, DataConfig, ModelConfig, RunConfig, StoreConfig
from saepipe.errors import UserError
from saepipe.language_model import LanguageModel
from saepipe.projection import Projection, can_reserve, memory_bytes, project, tokens_per_s

pytestmark = pytest.mark.usefixtures("short_timing")
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
MB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = small_models.make(tmp_path_factory.mktemp("model"), "gpt2")
    return LanguageModel.open(ModelConfig(name=str(folder), hooks=HOOKS, device="cpu"))


def configured(
    folder: Path, *, workers: int = 1, held_out: float = 0, chat: str | None = None, **store: object
) -> RunConfig:
    sizes = {"tokens": 100_000, "shard_tokens": 1024, "shuffle_tokens": 2048, "batch_prompts": 8}
    return RunConfig(
        model=ModelConfig(name="small", hooks=HOOKS, device="cpu"),
        data=DataConfig(path="text.txt", context_size=16, held_out=held_out, chat_template=chat),
        store=StoreConfig(dir=str(folder), **sizes | store),  # type: ignore[arg-type]
        cache=CacheConfig(workers=workers),
    )


def projected(model: LanguageModel, folder: Path, **keys: object) -> Projection:
    return project(configured(folder, **keys), model, workers=keys.get("workers", 1))  # type: ignore[arg-type]


# ---- a real file system


@pytest.fixture(scope="module")
def small_ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 16 MB in a file."""
    tools = [shutil.which(tool) for tool in ("mkfs.ext4", "mount", "umount")]
    if not all(tools) or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root, mkfs.ext4 and mount, to make a small file system")
    folder = tmp_path_factory.mktemp("ext4")
    image, disk = folder / "image", folder / "small disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(16 * MB)
    subprocess.run(["mkfs.ext4", "-F", "-q", "-m", "0", str(image)], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine does not let a test mount a file: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_real_file_system_is_asked_for_room(small_ext4: Path) -> None:
    free = shutil.disk_usage(small_ext4).free
    before = sorted(small_ext4.iterdir())
    assert can_reserve(small_ext4, MB)
    assert can_reserve(small_ext4, free // 2)
    assert not can_reserve(small_ext4, free + MB)
    assert not can_reserve(small_ext4, 1 << 40)  # more than a file of it may have
    assert can_reserve(small_ext4, 0)
    assert sorted(small_ext4.iterdir()) == before
    assert shutil.disk_usage(small_ext4).free == free


def test_a_quota_is_told_though_the_disk_has_room(
    model: LanguageModel, small_ext4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_free", lambda folder: 10**12)  # as with a quota
    with pytest.raises(
        UserError,
        match=r"needs 0.0306 GB more, which its disk does not give you although .* GB are free \(a quota\?\); try few",
    ):
        projected(model, small_ext4 / "store", tokens=200_000, dtype="bfloat16")
    projected(model, small_ext4 / "store", tokens=20_000)
    assert [path.name for path in small_ext4.iterdir()] == ["lost+found"]


def test_in_memory_nothing_is_asked(small_disk: Path) -> None:
    assert can_reserve(small_disk, 1 << 40)


def test_other_systems_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert can_reserve(tmp_path / "gone", 1 << 60)


def test_the_kind_of_a_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = (
        f"a / overlay rw 0 0\nb {tmp_path} ext4 rw 0 0\nc {tmp_path} tmpfs rw 0 0\nd {tmp_path}/a\\040b nfs rw 0 0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path: mounts)
    assert projection._kind(tmp_path / "x") == "tmpfs"  # mounted over the other
    assert projection._kind(tmp_path / "a b" / "c") == "nfs"
    assert projection._kind(Path("/")) == "overlay"


# ---- costs


def test_bytes_are_counted(model: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = projected(model, tmp_path / "store", dtype="float32")
    per_row = 2 * (32 * 4 + 4 + 4096 / 1024) + 9
    assert (found.rows, found.bytes, found.missing_bytes) == (100_000, 100_000 * per_row, 100_000 * per_row)
    assert found.seconds == pytest.approx(100_000 / found.tokens_per_s)
    assert f"store.dir={tmp_path / 'store'}: 100,000 tokens of {', '.join(HOOKS)}, about " in caplog.text
    assert "(huggingface on cpu), 0.0281 GB on disk (" in caplog.text
    assert projected(model, tmp_path, dtype="float32", chat="{{ messages }}").bytes == 100_000 * (per_row + 1)
    assert projected(model, tmp_path, dtype="int8").bytes == 100_000 * (2 * (32 + 8 + 4) + 9)
    assert projected(model, tmp_path, held_out=0.5, dtype="float32").bytes == (100_000 + 65_536) * per_row
    assert projected(model, tmp_path, held_out=0.2, dtype="float32").bytes == 125_000 * per_row


def test_what_is_there_is_not_missing(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "000000.safetensors").write_bytes(bytes(MB))
    found = projected(model, tmp_path)
    assert found.missing_bytes == found.bytes - MB
    (tmp_path / "hook" / "000001.safetensors").touch()
    os.truncate(tmp_path / "hook" / "000001.safetensors", 1 << 30)
    assert (projected(model, tmp_path).missing_bytes, projected(model, tmp_path).seconds) == (0, 0)


def test_workers_divide_the_time(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(projection, "tokens_per_s", lambda config, model: 100.0)
    caplog.set_level(logging.INFO)
    assert projected(model, tmp_path).seconds == pytest.approx(1000)
    assert "about 17 min at 100 tokens/s (hugging" in caplog.text
    found = projected(model, tmp_path, workers=4)
    assert (found.seconds, found.tokens_per_s, found.workers) == (pytest.approx(250), 100, 4)
    assert "about 4 min at 100 tokens/s for each of 4 workers (hugging" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.3, "0 s"), (80, "80 s"), (100, "2 min"), (3599, "60 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert projection.duration(seconds) == said


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("int8", 4)])
def test_memory_counts_every_worker(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, item: int
) -> None:
    one = 2 * 2048 * 64 * item  # int8 is rounded from what the model gives, float32
    monkeypatch.setattr(projection, "memory_bytes", lambda: 3.0 * one)
    projected(model, tmp_path, workers=3, dtype=dtype)
    with pytest.raises(
        UserError, match=r"store.shuffle_tokens=2048 needs .* GB of memory for cache.workers=4 and .*; halve it \(and"
    ):
        projected(model, tmp_path, workers=4, dtype=dtype)
    projected(model, tmp_path, workers=4, dtype=dtype, tokens=1500)  # less than a group


def test_a_disk_that_is_too_small(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_free", lambda folder: 10**6)
    with pytest.raises(
        UserError, match=r"needs .* GB more and its disk has 0.001 GB free; try store.tokens=(\d+), "
    ) as e:
        projected(model, tmp_path / "store")
    fitting = int(str(e.value).split("store.tokens=")[1].split(",")[0])
    assert projected(model, tmp_path / "store", tokens=fitting).rows == fitting
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(projection, "_kind", lambda folder: "ext4")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"store.dir={tmp_path}/store cannot be written \(Permission denied"):
        projected(model, tmp_path / "store")


def test_speed_and_memory_are_measured(model: LanguageModel, tmp_path: Path) -> None:
    assert tokens_per_s(configured(tmp_path), model) > 1
    assert memory_bytes() > 1e8
