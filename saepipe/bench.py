"""Measure saepipe on this machine: `python -m saepipe.bench bench.out=bench.json`.

Each figure is a ratio of two things that are measured in turns within one run, such as saepipe over the plain way to do
the same, or over another library (`bench.peers=true`); or a limit of the machine, or a time. The stores that it makes
lie in `bench.dir`, whose disk is the one that is measured, and are deleted at the end. A promise that is missed is said
and is no error: the exit code is 0. What was measured until an interruption is printed and written.
"""

import json
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import durable, entry
from saepipe.bench_keys import BenchConfig
from saepipe.config import RunConfig
from saepipe.durable import disk_errors
from saepipe.errors import UserError
from saepipe.lock import LOCK, can_hold, hold

if TYPE_CHECKING:
    from saepipe.bench_figure import Figure

log = logging.getLogger(__name__)

_OF_STEPS = {"step", "train", "start", "grid", "ranks"}
"""Parts that are judged at the sizes of steps."""
_SIZE = {"cache": "tokens", "stream": "gb", "memory": "gb"}
"""Other parts -> key of the bench group that they need the default of, or more, to be judged."""
_PREFIX = "saepipe-bench-"
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_TILL_THEN = "the parts that were finished are above, and in bench.out where one was given"


def bench(config: RunConfig) -> dict[str, Any]:
    """Measure, print a table, and write it to `bench.out`; also what there is of it when an error or a signal ends it.

    Args:
        config: The run; `bench` says what is measured and how large, `stream` and `store` how.

    Returns:
        machine; seconds that each part took; and figures: for each its name, value (a ratio where unit is empty), bar,
        met, rounds and what it was made of.

    Raises:
        UserError: A disk that is too small, sizes too small for a batch, a model whose hooks cannot be compared, peers
            that are not installed, or a key that the bench would have to ignore.
    """
    from saepipe.bench_figure import table

    there = _values(config.bench.against)
    document: dict[str, Any] = {"machine": _machine(), "overrides": config.overrides, "seconds": {}, "figures": []}
    figures: list[Figure] = []
    with scratch(Path(config.bench.dir)) as folder:
        _check(config, folder)
        _say_where(config, document["machine"])
        try:
            with _quiet(), disk_errors("bench.dir", folder):
                for part in parts_of(config):
                    log.info("measuring %s ...", part)
                    began = time.perf_counter()
                    found = _part(part)(config, folder)
                    figures += found if judged(config, part) else [figure.for_information() for figure in found]
                    document["seconds"][part] = round(time.perf_counter() - began, 1)
                    document["figures"] = [figure.document() for figure in figures]
                    _write(document, config.bench.out)
        finally:
            if figures:
                log.info("%s", table(figures, there))
    return document


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no bars, nor what each of many streams and models says of itself."""
    from transformers.utils import logging as of_transformers

    from saepipe import progress

    shown = of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()
    of_streams = logging.getLogger("saepipe.stream")
    level = of_streams.level
    of_streams.setLevel(logging.WARNING)
    try:
        with progress.hidden():
            yield
    finally:
        of_streams.setLevel(level)
        if shown:
            of_transformers.enable_progress_bar()


def _write(document: dict[str, Any], out: str | None) -> None:
    if out is not None:
        with disk_errors("bench.out", Path(out)):
            durable.write_text(Path(out), json.dumps(document, indent=1) + "\n")


def _values(path: str | None) -> dict[str, float] | None:
    """Read the values that a bench wrote, perhaps on another machine.

    Raises:
        UserError: It is no file of the bench's.
    """
    if path is None:
        return None
    try:
        return {figure["figure"]: float(figure["value"]) for figure in json.loads(Path(path).read_text())["figures"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"bench.against={path} is no file that bench.out={path} would have written ({error}); name one"
        ) from None


def _check(config: RunConfig, folder: Path) -> None:
    """Refuse what would be found out late, or ignored."""
    from saepipe.bench_step import cases, check_peers, chosen_device

    parts, trainer = parts_of(config), config.trainer
    _check_room(config, folder)
    if config.bench.out is not None and Path(config.bench.out).is_dir():
        raise UserError(f"bench.out={config.bench.out} is a folder; name a file")
    if trainer.accelerator in ("gpu", "cuda", "mps") and chosen_device(config) == "cpu":
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: there is no CUDA device, and steps are measured on one or on "
            "the CPU; leave the key out"
        )
    if trainer.precision == "64-true":
        raise UserError("trainer.precision=64-true is not measured; give 32-true or bf16-mixed")
    if config.typed("trainer.devices") or config.typed("trainer.num_nodes"):
        raise UserError(
            "the bench measures one rank; leave trainer.devices and trainer.num_nodes out, or give ranks a "
            "part of their own: bench.parts=[ranks] (2 and 4 ranks)"
        )
    if "step" in parts:
        check_peers(config)
        cases(config)
    if not {"evaluate", "experiment"} & {*parts}:
        for text in config.overrides:
            if text.startswith("sae"):
                log.warning("%s has no effect on bench.parts=%s, which reads the bench group", text, parts)


def _say_where(config: RunConfig, machine: dict[str, Any]) -> None:
    """Say what is measured, and where that is too busy to be measured well."""
    from saepipe.bench_step import PROMISED, chosen_device, promised

    cores, load = machine["cores"] or 1, machine["load_before"] or 0.0
    log.info(
        "%s, %s cores, %.0f GB; steps on %s, %s threads",
        machine["cpu"],
        machine["cores"],
        machine["memory_gb"],
        ", ".join(machine["gpus"]) if chosen_device(config) == "cuda" else "the CPU",
        machine["threads"],
    )
    if load > 0.75 * cores:
        log.warning(
            "the machine is busy (load %.1f on %s cores): times are longer and ratios less sure than on an idle one",
            *(load, cores),
        )
    if _OF_STEPS & {*parts_of(config)} and not promised(config):
        sizes = ", ".join(f"bench.{key}={value}" for key, value in PROMISED.items())
        log.info("promises about steps are for %s, in float32 on a CPU: here they are not judged", sizes)


def judged(config: RunConfig, part: str) -> bool:
    """Tell whether what is promised of a part holds at the run's sizes; elsewhere its figures are for information."""
    from saepipe.bench_step import promised

    if part in _OF_STEPS:
        return promised(config)
    size = _SIZE.get(part)
    return size is None or getattr(config.bench, size) >= getattr(BenchConfig, size)


def parts_of(config: RunConfig) -> list[str]:
    """List what is measured: an experiment that was typed is timed as well, first, since its model may not be there."""
    parts = [*dict.fromkeys(config.bench.parts)]
    return ["experiment", *parts] if config.typed("experiment") and "experiment" not in parts else parts


def _part(name: str) -> "Callable[[RunConfig, Path], list[Figure]]":
    from importlib import import_module

    measure: Callable[[RunConfig, Path], list[Figure]] = import_module(f"saepipe.bench_{name}").measure
    return measure


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent` that is gone when the block ends, also after Ctrl-C, SIGTERM or SIGHUP."""
    _remove_left(parent)
    new = [path for path in (parent, *parent.parents) if not path.exists()]
    alone = threading.current_thread() is threading.main_thread()  # no other thread may set signals
    heard = [number for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, _terminate) for number in heard} if alone else {}
    try:
        with disk_errors("bench.dir", parent):
            parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True)
        with made as folder, hold(folder, key="bench.dir"):
            yield Path(folder)
    finally:
        for path in new:
            with suppress(OSError):  # not empty: somebody else has put something there
                path.rmdir()
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_left(parent: Path) -> None:
    """Delete what a bench that was killed has left, and no other holds."""
    if not can_hold():
        return
    for left in parent.glob(f"{_PREFIX}*/{LOCK}"):
        with suppress(UserError), hold(left.parent, key="bench.dir"):
            shutil.rmtree(left.parent, ignore_errors=True)


def _terminate(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _check_room(config: RunConfig, folder: Path) -> None:
    from saepipe.bench_step import N_BATCHES
    from saepipe.bench_store import LARGER
    from saepipe.bench_train import store_gb

    parts, free = parts_of(config), shutil.disk_usage(folder).free / 1e9
    stores = LARGER * bool({"stream", "memory"} & {*parts}) + ("memory" in parts)
    need = config.bench.gb * (stores + bool({"limits", "experiment"} & {*parts}))
    keys = [f"bench.gb={config.bench.gb}"] if need else []
    if _OF_STEPS & {*parts}:
        need += 2 * N_BATCHES * 4 * config.bench.batch_tokens * config.bench.d_in / 1e9
        keys += [f"bench.{key}={getattr(config.bench, key)}" for key in ("batch_tokens", "d_in")]
    if {"train", "start", "grid"} & {*parts}:
        keys += [f"bench.d_sae={config.bench.d_sae}", f"stream.window_tokens={config.stream.window_tokens}"]
        checkpoint_gb = 3 * 2 * 4 * config.bench.d_in * config.bench.d_sae / 1e9  # of weights and Adam's moments
        need += store_gb(config) + 3 * checkpoint_gb  # two are kept while one is written
    if need * 1.05 > free:
        raise UserError(
            f"{', '.join(keys)}: this needs {need:.3g} GB in bench.dir={config.bench.dir}, whose disk has {free:.3g} "
            "GB free; lower what is large, or give a bench.dir on another disk"
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
    entry.main("bench", _interruptible)


def _interruptible(config: RunConfig) -> None:
    try:
        bench(config)
    except KeyboardInterrupt:
        entry.interrupted(_TILL_THEN)
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128:
            sys.stderr.write(f"saepipe: {signal.Signals(ended.code - 128).name}; {_TILL_THEN}\n")
        raise


if __name__ == "__main__":
    main()
