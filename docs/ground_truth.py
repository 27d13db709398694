"""How much of known features saepipe's and SAELens's SAEs find, for docs/ground_truth.md: `make ground-truth`.

Both libraries train each architecture from the same weights on the same batches in the same order, SAELens with its own
trainer. Where a coefficient decides how many latents fire, each library has the same number of tries to find the one
with which as many fire as k says for the others. It needs sae-lens, so it runs in the environment of `make peers`; a
part of it is:

    PYTHONPATH=. .venv-peers/bin/python docs/ground_truth.py --out runs/ground_truth --seeds 1 topk batchtopk
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import torch
from torch import Tensor

from saepipe import saes
from saepipe.saes.base import SAE, Step
from saepipe.superposition import Features, Superposition, score

VARIANTS = ("saepipe", "SAELens", "saepipe from the mean")
"""Whose SAE: the last starts `b_dec` at the mean of the activations, as `saepipe.train` does, the others at 0."""


@dataclass(frozen=True)
class Scale:
    """How large it all is."""

    n_features: int = 1024
    d: int = 128
    roots: int = 8
    depth: int = 3
    d_sae: int = 256
    l0: float = 5
    batch_tokens: int = 512
    steps: int = 5000
    lr: float = 1e-3
    warm_up_steps: int = 500  # of the sparsity coefficients
    decay_steps: int = 1666  # of the learning rate
    dead_steps: int = 400  # without firing
    norm_batches: int = 100  # that tell the activations' scale
    tries: int = 4
    scored_tokens: int = 100_000

    def data(self, seed: int) -> Superposition:
        """Draw a world: its features, and its samples."""
        features = Features.drawn(self.n_features, self.d, seed=seed, roots=self.roots, depth=self.depth)
        return Superposition(features, seed, self.batch_tokens)


TINY = Scale(64, 16, 1, 2, 32, 3, 64, 30, 1e-3, 0, 10, 400, 10, 2, 1000)


@dataclass(frozen=True)
class Case:
    """An architecture: what SAELens calls it, and how the number of active latents is asked for."""

    theirs: str
    tuned: str = ""
    first: float = 1.0

    def keys(self, scale: Scale, coefficient: float) -> dict[str, Any]:
        """Keys that both libraries call the same."""
        if not self.tuned:
            return {"k": int(scale.l0)}
        return {self.tuned: coefficient, self.tuned.replace("coefficient", "warm_up_steps"): scale.warm_up_steps}


CASES = {
    "standard": Case("Standard", "l1_coefficient", 4.0),
    "gated": Case("Gated", "l1_coefficient", 4.0),
    "jumprelu": Case("JumpReLU", "l0_coefficient", 1.5),
    "topk": Case("TopK"),
    "batchtopk": Case("BatchTopK"),
    "matryoshka": Case("MatryoshkaBatchTopK"),
}


def their_start(name: str, scale: Scale, seed: int, coefficient: float = 1.0) -> Any:
    """Make an SAE of SAELens's, initialised as it does: both libraries' SAEs start from its weights."""
    import sae_lens

    case = CASES[name]
    keys: dict[str, Any] = {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": True}
    if name == "matryoshka":
        keys["matryoshka_widths"] = [*(scale.d_sae * part // 32 for part in (1, 3, 7, 15)), scale.d_sae]
    keys |= case.keys(scale, coefficient)
    torch.manual_seed(seed)
    cfg = getattr(sae_lens, f"{case.theirs}TrainingSAEConfig")(d_in=scale.d, d_sae=scale.d_sae, **keys)
    return getattr(sae_lens, f"{case.theirs}TrainingSAE")(cfg)


class Samples(Iterator[Tensor]):
    """The batches, which begin anew once SAELens has taken the scale of the first."""

    def __init__(self, batches: Tensor, norm_batches: int) -> None:
        self._batches, self._next, self._restart_at = batches, 0, norm_batches

    def __next__(self) -> Tensor:
        if self._next == self._restart_at:
            self._next, self._restart_at = 0, -1
        self._next += 1
        return self._batches[self._next - 1]


def train_theirs(sae: Any, batches: Tensor, scale: Scale) -> Any:
    """Train with SAELens's own trainer, and open what it saves for use."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    cfg = SAETrainerConfig(
        total_training_samples=scale.steps * scale.batch_tokens,
        train_batch_size_samples=scale.batch_tokens,
        lr=scale.lr,
        lr_end=scale.lr,
        lr_decay_steps=scale.decay_steps,
        dead_feature_window=scale.dead_steps,
        n_batches_for_norm_estimate=scale.norm_batches,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg, sae, Samples(batches, scale.norm_batches)).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return sae_lens.SAE.load_from_disk(folder, device="cpu")


def our_start(name: str, theirs: Any, batches: Tensor, scale: Scale, coefficient: float, from_mean: bool) -> SAE:
    """Make an SAE of saepipe's with the weights of one of SAELens's."""
    cls = saes.architecture(name)
    dead_after = (scale.dead_steps + 1) * scale.batch_tokens  # SAELens's window ends with the step after
    sae = cls(
        cls.config_class(d_sae=scale.d_sae, dead_after_tokens=dead_after, **CASES[name].keys(scale, coefficient)),
        scale.d,
    )
    first = batches[: scale.norm_batches]
    mean_norm = statistics.mean(batch.norm(dim=1).mean().item() for batch in first)
    sae.initialise(
        torch.Generator(), mean=first.mean((0, 1)) if from_mean else None, norm_scale=scale.d**0.5 / mean_norm
    )
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if key != "b_dec":
                sae.get_parameter(key).copy_(value)
    return sae


def train_ours(sae: SAE, batches: Tensor, scale: Scale) -> SAE:
    """Train as `saepipe.train` does, with the clipping that SAELens's trainer always has."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=scale.lr, fused=True)
    silent = torch.zeros(scale.d_sae, dtype=torch.int64)
    for number in range(scale.steps):
        dead = (silent >= sae.cfg.dead_after_tokens).nonzero().squeeze(1) if sae.revives else silent[:0]
        losses = sae.loss(batches[number], batches[number], Step(number, dead))
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = scale.lr * min(1.0, (scale.steps - number) / scale.decay_steps)
        optimizer.step()
        sae.after_step(losses)
        silent = (silent + scale.batch_tokens).masked_fill(losses.fired > 0, 0)
    return sae


def trained(variant: str, name: str, scale: Scale, seed: int, batches: Tensor, coefficient: float = 1.0) -> Any:
    """Start and train one SAE."""
    theirs = their_start(name, scale, seed, coefficient)
    if variant == "SAELens":
        return train_theirs(theirs, batches, scale)
    return train_ours(our_start(name, theirs, batches, scale, coefficient, "mean" in variant), batches, scale)


def tune(l0_of: Callable[[float], float], first: float, target: float, tries: int) -> float:
    """Find the coefficient whose L0 comes nearest to the target: a secant in logarithms, from a slope of -1."""
    points: list[tuple[float, float]] = []
    coefficient, slope = math.log(first), -1.0
    for _ in range(tries):
        points.append((coefficient, math.log(max(l0_of(math.exp(coefficient)), 0.1) / target)))
        nearest, second = (sorted(points, key=lambda point: abs(point[1])) * 2)[:2]
        if nearest[0] != second[0] and nearest[1] != second[1]:
            slope = min((nearest[1] - second[1]) / (nearest[0] - second[0]), -0.2)
        coefficient = nearest[0] - min(max(nearest[1] / slope, -1.0), 1.0)
    return math.exp(min(points, key=lambda point: abs(point[1]))[0])


def draw(scale: Scale, seed: int, folder: Path) -> None:
    """Put the batches of a world into a file."""
    torch.set_num_threads(1)
    data = scale.data(seed)
    torch.save(torch.stack([data.batch(number).x for number in range(scale.steps)]), folder / f"{seed}.pt")


def job(variant: str, name: str, scale: Scale, seeds: int, drawn: Path, out: Path, coefficient: float | None) -> None:
    """Tune in the first world where no coefficient is given, train in all of them, and write the scores."""
    torch.set_num_threads(1)
    worlds = [torch.load(drawn / f"{seed}.pt", mmap=True) for seed in range(seeds)]
    case = CASES[name]
    if not case.tuned:
        coefficient = 1.0
    elif coefficient is None:
        held_out, tokens = scale.data(0), scale.scored_tokens // 5
        coefficient = tune(
            lambda tried: score(trained(variant, name, scale, 0, worlds[0], tried), held_out, tokens=tokens)["l0"],
            *(case.first, scale.l0, scale.tries),
        )
    rows = []
    for seed, batches in enumerate(worlds):
        begin = time.perf_counter()
        sae = trained(variant, name, scale, seed, batches, coefficient)
        took_s = time.perf_counter() - begin
        rows.append({**score(sae, scale.data(seed), tokens=scale.scored_tokens), "seconds": took_s})
    found = {"variant": variant, "architecture": name, "coefficient": coefficient if case.tuned else None, "rows": rows}
    (out / f"{variant.replace(' ', '_')}-{name}.json").write_text(json.dumps(found, indent=1))
    print(f"{variant} {name}: {cell(found, 'mcc')} MCC, {cell(found, 'f1')} F1", flush=True)


def cell(found: dict[str, Any], measure: str) -> str:
    """Mean and standard deviation over the worlds."""
    values = [row[measure] for row in found["rows"]]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def difference(found: dict[str, Any], peer: dict[str, Any], measure: str) -> str:
    """Mean over the worlds of the difference from the peer, and its standard error."""
    pairs = zip(found["rows"], peer["rows"], strict=True)
    values = [row[measure] - other[measure] for row, other in pairs]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    return f"{statistics.mean(values):+.3f} ± {error:.3f}"


def table(out: Path) -> str:
    """Lay out what all jobs wrote."""
    found = {(one["variant"], one["architecture"]): one for one in map(json.loads, (p.read_text() for p in files(out)))}
    measures = ("explained_variance", "l0", "dead", "seconds")
    lines = [
        "| `sae=` | library | MCC | F1 | MCC against SAELens | F1 | explained variance | L0 | dead | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        peer = found.get(("SAELens", name))
        for one in [found[variant, name] for variant in VARIANTS if (variant, name) in found]:
            against = [difference(one, peer, of) if peer and one is not peer else "" for of in ("mcc", "f1")]
            means = [statistics.mean(row[of] for row in one["rows"]) for of in measures]
            figures = [f"{means[0]:.3f}", f"{means[1]:.2f}", f"{100 * means[2]:.1f} %", f"{means[3]:.0f}"]
            cells = [f"`{name}`", one["variant"], cell(one, "mcc"), cell(one, "f1"), *against, *figures]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def files(out: Path) -> list[Path]:
    """The files that jobs wrote."""
    return sorted(out.glob("*-*.json"))


def main() -> None:
    """Draw, train, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}; all")
    parser.add_argument("--out", type=Path, default=Path("runs/ground_truth"), help="folder for the scores")
    parser.add_argument("--seeds", type=int, default=3, help="worlds: features, samples and weights at the start")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="whose SAEs")
    parser.add_argument("--coefficient", type=float, help="of the penalty, for both libraries; None: tuned for each")
    parser.add_argument("--tiny", action="store_true", help="to see that it works, in a minute")
    given = parser.parse_args()
    scale = TINY if given.tiny else Scale()
    given.out.mkdir(parents=True, exist_ok=True)
    todo = [(variant, name) for name in given.architectures for variant in given.variants]
    with (
        tempfile.TemporaryDirectory(dir=given.out) as folder,
        ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool,
    ):
        drawn = Path(folder)
        list(pool.map(draw, *zip(*((scale, seed, drawn) for seed in range(given.seeds)), strict=True)))
        waiting = [pool.submit(job, *one, scale, given.seeds, drawn, given.out, given.coefficient) for one in todo]
        for done in waiting:
            done.result()
    print(table(given.out))


if __name__ == "__main__":
    main()
