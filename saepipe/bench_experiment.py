"""How long an experiment will take on this machine: the rate of each verb at its own sizes, for its tokens."""

import logging
import statistics
import time
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from saepipe import grid
from saepipe.bench_evaluate import pair, untrained
from saepipe.bench_figure import Figure, speed
from saepipe.bench_step import activations, first_task, save_batches
from saepipe.bench_store import of_random_rows, random_tokens, synthetic
from saepipe.config import RunConfig
from saepipe.contest import WARM_UP_STEPS, Contestant, Task
from saepipe.language_model import LanguageModel
from saepipe.measure import Subject
from saepipe.projection import duration, room, tokens_per_s
from saepipe.stream import Stream

log = logging.getLogger(__name__)


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Time the language model, the SAE's step, the stream and an evaluation, and say what they add up to.

    The figures are for one worker and one rank; of a grid, for the steps of all points and the evaluation of one. A
    batch is evaluated with an untrained SAE.

    Raises:
        UserError: A model that cannot be loaded, or a disk too small for the store.
    """
    model = LanguageModel.open(config.model)
    hook = config.stream.hook or config.model.hooks[0]
    d_in = model.width(hook)
    needed = room(config, model)
    tokens = needed.rows
    step, stream = step_tokens_per_s(config, folder, d_in), stream_tokens_per_s(config, folder, d_in)
    rates = {
        "caching": (tokens, tokens_per_s(config, model)),
        "training": (config.train.tokens, min(step, stream)),
        "evaluation": (config.evaluate.tokens, evaluate_tokens_per_s(config, folder, model, hook)),
    }
    seconds = {verb: tokens / rate for verb, (tokens, rate) in rates.items()}
    log.info(
        "your experiment will take about %s, and %.3g GB of disk: %s; of training, the step alone takes %s tokens/s, "
        "the stream gives %s",
        duration(sum(seconds.values())),
        needed.bytes / 1e9,
        ", ".join(f"{verb} {duration(each)} ({rates[verb][0]:,} tokens)" for verb, each in seconds.items()),
        f"{step:,.0f}",
        f"{stream:,.0f}",
    )
    parts = {"training": {"step_tokens_per_s": step, "stream_tokens_per_s": stream}}
    return [
        Figure(
            f"experiment, {verb}",
            [each],
            {
                "tokens": float(rates[verb][0]),
                "tokens_per_s": rates[verb][1],
                **parts.get(verb, {}),
            },
            unit="s",
            told=speed(rates[verb][1]),
        )
        for verb, each in seconds.items()
    ]


def step_tokens_per_s(config: RunConfig, folder: Path, d_in: int) -> float:
    """Time the steps of all points, which take the same batch in turn."""
    path, tokens = folder / "experiment.safetensors", config.stream.batch_tokens
    task = first_task(config, folder)
    save_batches(activations(d_in, tokens, 2, task.device), path)
    seconds = 0.0
    for point in grid.points(config):
        one = Task(
            "saepipe",
            point.sae.architecture,
            str(path),
            d_in,
            point.sae.resolve(d_in),
            tokens,
            threads=task.threads,
            device=task.device,
            precision=config.trainer.precision,
            compile=config.train.compile,
            sae={key: value for key, value in asdict(point.sae).items() if key not in ("d_sae", "dead_after_tokens")},
        )
        with Contestant("saepipe's step", one.command()) as contestant:
            contestant.ready().ask(steps=WARM_UP_STEPS)
            seconds += statistics.median(contestant.ask(steps=1) for _ in range(config.bench.rounds))
    return tokens / seconds


def stream_tokens_per_s(config: RunConfig, folder: Path, d_in: int) -> float:
    """Time the stream on rows of the experiment's width and type."""
    store = synthetic(config, folder, config.bench.gb, d_in)
    stream = Stream(store, of_random_rows(config.stream), exclude_special_tokens=config.data.exclude_special_tokens)
    with closing(stream.iterate()) as batches:
        next(batches)  # the first window is read before it
        begin, n = time.perf_counter(), stream.batches_per_epoch
        for _ in islice(batches, n):
            continue
        return n * config.stream.batch_tokens / (time.perf_counter() - begin)


def evaluate_tokens_per_s(config: RunConfig, folder: Path, model: LanguageModel, hook: str) -> float:
    """Time the evaluation of an untrained SAE on one batch of contexts, after a first one that does not count."""
    side = random_tokens(
        folder / "evaluated-here",
        contexts=config.evaluate.batch_prompts,
        context_size=config.data.context_size,
        vocab_size=model.vocab_size,
    ).train
    subject = Subject(untrained(config, model.width(hook)).to(model.device), hook, hook)
    seconds = [pair(config, model, subject, side)[1] for _ in range(1 + config.bench.rounds)][1:]
    return side.ids.size / statistics.median(seconds)
