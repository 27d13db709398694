"""Training steps of each architecture: over the one product that no step can do without, and over those of others.

All take their steps in turns on the same batches, each in a process of its own. The bars are promised for the sizes of
`PROMISED`, in float32 on a CPU; elsewhere figures are for information.
"""

import logging
import math
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from saepipe import saes
from saepipe.bench_figure import Figure, speed
from saepipe.config import RunConfig
from saepipe.contest import Contestant, Task, in_turns
from saepipe.errors import UserError, unknown
from saepipe.peer_steps import LIBRARIES, offered

log = logging.getLogger(__name__)

PROMISED = {"d_in": 512, "d_sae": 4096, "batch_tokens": 2048, "k": 32}
"""Keys of the bench group at which the bars hold."""
N_BATCHES = 4
"""Batches that contestants take in turn."""
_PRODUCT, _OURS = "product", "saepipe"


@dataclass(frozen=True)
class Case:
    """A step to measure."""

    architecture: str
    l0: float | None = None
    """Active latents of a token that biases or thresholds are set for; None: those of the start, or k."""
    bars: dict[str, float] = field(default_factory=dict)
    """Library -> how many times its tokens/s saepipe promises."""
    sae: dict[str, Any] = field(default_factory=dict)
    """More keys of the architecture."""

    @property
    def name(self) -> str:
        """What figures call it."""
        return self.architecture + (f" at L0 {self.l0:g}" if self.l0 else "")


def cases(config: RunConfig) -> list[Case]:
    """List what is measured.

    Raises:
        UserError: An architecture that there is not.
    """
    k, d_sae = config.bench.k, config.bench.d_sae
    widths = sorted({max(1, d_sae // 16), max(1, d_sae // 4)})
    found = [
        Case("topk", bars={"sparsify": 1.2, "SAELens": 3, "dictionary_learning": 3}),
        Case("batchtopk", bars={"SAELens": 3.5}),
        Case("matryoshka", bars={"SAELens": 3}, sae={"matryoshka_widths": widths}),
        Case("jumprelu", bars={"SAELens": 1.3}),
        Case("jumprelu", k, bars={"SAELens": 1.7}),
        Case("gated", bars={"SAELens": 1.3}),
        Case("gated", k, bars={"SAELens": 1.7}),
        Case("standard", bars={"SAELens": 1.0}),
        Case("standard", 2 * k, bars={"SAELens": 1.2}),
    ]
    for name in config.bench.architectures:
        if name not in saes.registered():
            raise unknown("bench.architectures", name, saes.registered())
    return [case for case in found if case.architecture in (config.bench.architectures or saes.registered())]


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Time the steps, and hold their memory beside each other.

    Raises:
        UserError: A process ended, such as one whose library is not there.
    """
    task = replace(first_task(config, folder), library=_OURS)
    found: list[Figure] = []
    for number, case in enumerate(cases(config)):
        log.info("measuring step, %s (%d of %d) ...", case.name, number + 1, len(cases(config)))
        found += _measured(config, case, task)
    return found


def check_peers(config: RunConfig) -> None:
    """Look for the peers' environment, and the libraries in it.

    Raises:
        UserError: They are not there.
    """
    if not config.bench.peers:
        return
    python, cure = config.bench.peers_python, "make it with `make peers`, or leave bench.peers out"
    if not Path(python).exists():
        raise UserError(f"bench.peers_python={python} is not there: {cure}")
    wanted = sorted({LIBRARIES[library] for case in cases(config) for library in offered(case.architecture)})
    code = f"import importlib.util; print(*(name for name in {wanted} if importlib.util.find_spec(name) is None))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"bench.peers_python={python} cannot be started ({error.strerror}): {cure}") from None
    if done.returncode:
        raise UserError(f"bench.peers_python={python} is no interpreter of Python: {cure}")
    if missing := done.stdout.strip():
        raise UserError(f"bench.peers_python={python} has no {missing.replace(' ', ', no ')}: {cure}")


def chosen_device(config: RunConfig) -> str:
    """Name the device that steps and limits are measured on."""
    return "cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu"


def promised(config: RunConfig) -> bool:
    """Tell whether what is promised of steps and the train verb holds for the run's keys and device."""
    plain = chosen_device(config) == "cpu" and config.trainer.precision == "32-true" and not config.train.compile
    return plain and all(getattr(config.bench, key) == value for key, value in PROMISED.items())


def first_task(config: RunConfig, folder: Path) -> Task:
    """Write the batches, and return the task of the encoder's product on them."""
    bench, path = config.bench, folder / "batches.safetensors"
    device = chosen_device(config)
    if not path.exists():
        save_batches(activations(bench.d_in, bench.batch_tokens, N_BATCHES, device), path)
    return Task(
        _PRODUCT,
        "topk",
        str(path),
        bench.d_in,
        bench.d_sae,
        bench.batch_tokens,
        k=bench.k,
        threads=torch.get_num_threads(),
        device=device,
        precision=config.trainer.precision,
    )


def save_batches(batches: Iterable[Tensor], path: Path) -> None:
    """Write batches for contestants, as they name them."""
    # Into memory first: of a full disk, safetensors' own writing has an error of its own.
    path.write_bytes(save({str(number): batch.cpu() for number, batch in enumerate(batches)}))


def activations(d_in: int, tokens: int, n: int, device: str) -> Iterator[Tensor]:
    """Draw batches of features of which some are common and most are rare, and noise; their mean norm is sqrt(d_in)."""
    draw = torch.Generator(device).manual_seed(0)
    n_features, active = 4 * d_in, 40
    features = torch.randn(n_features, d_in, device=device, generator=draw) / d_in**0.5
    commonness = 1 / torch.arange(1, n_features + 1, device=device) ** 0.8
    for _ in range(n):
        drawn = torch.multinomial(commonness.expand(tokens, -1), min(active, n_features), generator=draw)
        strength = torch.rand(drawn.shape, device=device, generator=draw) + 0.5
        noise = torch.randn(tokens, d_in, device=device, generator=draw)
        rows = torch.zeros(tokens, n_features, device=device).scatter_(1, drawn, strength)
        batch = rows @ features + 0.2 * noise / d_in**0.5
        yield batch * (d_in**0.5 / batch.norm(dim=1).mean())


def _measured(config: RunConfig, case: Case, task: Task) -> Iterator[Figure]:
    """Have all who can take a step take theirs in turns."""
    task = replace(task, architecture=case.architecture, l0=case.l0, sae=case.sae)
    tasks = {_PRODUCT: replace(task, library=_PRODUCT, sae={}), _OURS: replace(task, compile=config.train.compile)}
    for library in offered(case.architecture) if config.bench.peers else ():
        tasks[library] = replace(task, library=library)
        if task.device == "cuda":
            tasks[f"{library}, fused Adam"] = replace(task, library=library, fused=True)
    with ExitStack() as stack:
        started = {name: stack.enter_context(_started(config, name, each)) for name, each in tasks.items()}
        contestants = {name: contestant.ready() for name, contestant in started.items()}
        # Several in a turn on a GPU, whose host may be ahead of it, as in training.
        steps = N_BATCHES if task.device == "cuda" else 1
        seconds = in_turns(contestants, config.bench.steps, steps=steps)
        peaks = {name: each.ask(peak=N_BATCHES) for name, each in contestants.items() if name != _PRODUCT}
        l0 = {name: each.ask(l0=1) for name, each in contestants.items() if name != _PRODUCT}
    yield from _figures(config, case, task, seconds, peaks, l0)


def _started(config: RunConfig, name: str, task: Task) -> Contestant:
    if task.library in (_PRODUCT, _OURS):
        return Contestant(name, task.command())
    cure = "`make peers` installs it; bench.peers=false leaves it out"
    return Contestant(name, task.command(config.bench.peers_python), cure=cure)


def _figures(
    config: RunConfig,
    case: Case,
    task: Task,
    seconds: dict[str, list[float]],
    peaks: dict[str, float],
    l0: dict[str, float],
) -> Iterator[Figure]:
    """Make figures of the seconds of each turn."""

    def over(name: str) -> list[float]:
        return [theirs / mine for theirs, mine in zip(seconds[name], seconds[_OURS], strict=True)]

    ours = _speed(task, seconds[_OURS], peaks[_OURS], l0[_OURS])
    yield Figure(
        f"step, {case.name}, share of its time that the encoder's product takes alone",
        over(_PRODUCT),
        ours,
        told=_told(ours),
    )
    others = [name for name in seconds if name not in (_PRODUCT, _OURS)]
    for name in others:
        theirs = _speed(task, seconds[name], peaks[name], l0[name])
        bar = case.bars.get(name)
        yield Figure(
            f"step, {case.name}, tokens/s over {name}",
            over(name),
            theirs,
            at_least=bar,
            told=f"{name}: {_told(theirs)}",
        )
    if others and not math.isnan(peaks[_OURS]):
        best = min(others, key=lambda name: peaks[name])
        yield Figure(
            f"step, {case.name}, memory over the best peer's ({best})",
            [peaks[_OURS] / peaks[best]],
            {"peak_bytes": peaks[_OURS], "peer_peak_bytes": peaks[best]},
            at_most=1.0,
            told=f"{peaks[_OURS] / 1e6:,.0f} MB over {peaks[best] / 1e6:,.0f} MB",
        )


def _speed(task: Task, seconds: list[float], peak_bytes: float, l0: float) -> dict[str, float]:
    rate = task.batch_tokens / statistics.median(seconds)
    return {
        "step_s": statistics.median(seconds),
        "tokens_per_s": rate,
        "tokens_per_day": 86400 * rate,
        "encoder_flop_per_s": 2 * task.d_in * task.d_sae * rate,
        "l0": l0,
        **({} if math.isnan(peak_bytes) else {"peak_bytes": peak_bytes}),
    }


def _told(made_of: dict[str, float]) -> str:
    memory = f"{made_of['peak_bytes'] / 1e6:,.0f} MB, " if "peak_bytes" in made_of else ""
    return f"{speed(made_of['tokens_per_s'])}, {memory}L0 {made_of['l0']:,.0f}"
