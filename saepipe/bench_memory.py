"""What the stream takes of memory: by how much a process grows that streams one epoch, over the window's bytes.

Each store is streamed in a fresh process, which runs this file: the growth is the kernel's own peak of the resident
memory (VmHWM in /proc/self/status; not getrusage's, which a process inherits from the one that started it) less what
was resident right after the imports.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from saepipe.bench_figure import Figure
from saepipe.bench_store import LARGER, WIDTH, of_random_rows, synthetic
from saepipe.config import RunConfig, StreamConfig
from saepipe.errors import UserError
from saepipe.shard import DTYPES
from saepipe.store import Store
from saepipe.stream import Stream

STATUS = Path("/proc/self/status")


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Stream a store and one that is four times larger, which must not take more.

    Raises:
        UserError: The system has no /proc.
    """
    if not STATUS.exists():
        raise UserError("bench.parts=memory needs /proc/self/status, which only Linux has; leave memory out")
    item, figures, growths = DTYPES[config.store.dtype].itemsize, [], []
    for gb in (config.bench.gb, LARGER * config.bench.gb):
        store = synthetic(config, folder, gb)
        window = min(config.stream.window_tokens, store.rows) * WIDTH * item
        growths.append([_grown(config, store) for _ in range(config.bench.rounds)])
        figures.append(
            Figure(
                f"stream, memory over the window's bytes, {gb:g} GB store",
                [grown / window for grown in growths[-1]],
                {"window_bytes": window, "rows": store.rows},
                at_most=1.2,
            )
        )
    name = f"stream, memory of a {LARGER} times larger store over the first's"
    return [*figures, Figure(name, [b / a for a, b in zip(*growths, strict=True)], {}, at_most=1.05)]


def _grown(config: RunConfig, store: Store) -> int:
    """Stream in a process of its own, and return the bytes that it grew by."""
    wanted = json.dumps([asdict(of_random_rows(config.stream)), config.data.exclude_special_tokens])
    command = [sys.executable, "-m", "saepipe.bench_memory", str(store.folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise UserError(f"a process that streams a store ended with exit code {done.returncode}: {last}")
    return int(done.stdout)


def _resident(which: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def _stream(folder: str, wanted: str) -> int:
    """Be the process: stream an epoch."""
    before = _resident("VmRSS")
    stream_keys, exclude = json.loads(wanted)
    stream = Stream(Store.open(folder), StreamConfig(**stream_keys), exclude_special_tokens=exclude)
    batches = stream.iterate()
    for _ in islice(batches, stream.batches_per_epoch):
        pass
    batches.close()
    return _resident("VmHWM") - before


if __name__ == "__main__":
    sys.stdout.write(f"{_stream(*sys.argv[1:])}\n")
