"""Measure saepipe on this machine: `python -m saepipe.bench bench.out=bench.json`.

Each figure is a ratio of two things that are measured in turns within one run, such as saepipe over the plain way to do
the same, or over another library (`bench.peers=true`); or a limit of the machine, or a time. The stores that it makes
lie in `bench.dir`, whose disk is the one that is measured, and are deleted at the end. A promise that is missed is said
and is no error: the exit code is 0.
"""

import json
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import durable, entry
from saepipe.config import RunConfig
from saepipe.durable import disk_errors
from saepipe.errors import UserError

if TYPE_CHECKING:
    from saepipe.bench_figure import Figure

log = logging.getLogger(__name__)


def bench(config: RunConfig) -> dict[str, Any]:
    """Measure, print a table, and write it to `bench.out`.

    Args:
        config: The run; `bench` says what is measured and how large, `stream` and `store` how.

    Returns:
        machine; seconds that each part took; and figures: for each its name, ratio (or value, with its unit), bar, met,
        rounds and what it was made of.

    Raises:
        UserError: A disk that is too small, sizes too small for a batch, a model whose hooks cannot be compared, or
            peers that are not installed.
    """
    from saepipe.bench_figure import table
    from saepipe.bench_step import check_peers

    document: dict[str, Any] = {"machine": _machine(), "overrides": config.overrides, "seconds": {}, "figures": []}
    figures: list[Figure] = []
    with scratch(Path(config.bench.dir)) as folder:
        _check_room(config, folder)
        if "step" in config.bench.parts:
            check_peers(config)
        for part in parts_of(config):
            log.info("measuring %s ...", part)
            began = time.perf_counter()
            figures += _part(part)(config, folder)
            document["seconds"][part] = round(time.perf_counter() - began, 1)
    document["figures"] = [figure.document() for figure in figures]
    log.info("%s", table(figures))
    if config.bench.out is not None:
        with disk_errors("bench.out", Path(config.bench.out)):
            durable.write_text(Path(config.bench.out), json.dumps(document, indent=1) + "\n")
    return document


def parts_of(config: RunConfig) -> list[str]:
    """List what is measured: an experiment that was typed is timed as well, first, since its model may not be there."""
    parts = config.bench.parts
    return ["experiment", *parts] if config.typed("experiment") and "experiment" not in parts else parts


def _part(name: str) -> "Callable[[RunConfig, Path], list[Figure]]":
    from importlib import import_module

    measure: Callable[[RunConfig, Path], list[Figure]] = import_module(f"saepipe.bench_{name}").measure
    return measure


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent` that is gone when the block ends, also after Ctrl-C or SIGTERM."""
    new = [path for path in (parent, *parent.parents) if not path.exists()]
    alone = threading.current_thread() is threading.main_thread()  # no other thread may set signals
    before = signal.signal(signal.SIGTERM, _terminate) if alone else None
    try:
        with disk_errors("bench.dir", parent):
            parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix="bench-", dir=parent, ignore_cleanup_errors=True)
        with made as folder:
            yield Path(folder)
    finally:
        for path in new:
            with suppress(OSError):  # not empty: somebody else has put something there
                path.rmdir()
        if alone:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _check_room(config: RunConfig, folder: Path) -> None:
    from saepipe.bench_store import LARGER
    from saepipe.bench_train import store_gb

    parts, free = parts_of(config), shutil.disk_usage(folder).free / 1e9
    stores = LARGER * bool({"stream", "memory"} & {*parts}) + ("memory" in parts)
    need = config.bench.gb * (stores + bool({"limits", "experiment"} & {*parts}))
    if {"train", "start", "grid"} & {*parts}:
        checkpoint_gb = 3 * 2 * 4 * config.bench.d_in * config.bench.d_sae / 1e9  # of weights and Adam's moments
        need += store_gb(config) + 3 * checkpoint_gb  # two are kept while one is written
    if need * 1.05 > free:
        raise UserError(
            f"bench.gb={config.bench.gb} needs {need:.3g} GB in bench.dir={config.bench.dir} and its disk has "
            f"{free:.3g} GB free; lower it, or give a bench.dir on another disk"
        )


def _machine() -> dict[str, Any]:
    """Describe where it is measured, and how busy that was before."""
    import torch

    from saepipe.projection import memory_bytes
    from saepipe.provenance import git_commit, versions

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions("torch", "transformers", "numpy"),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": memory_bytes() / 1e9,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Run the verb from the command line."""
    entry.main("bench", bench)


if __name__ == "__main__":
    main()
