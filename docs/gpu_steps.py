"""Times of a training step on a CUDA device beside SAELens's and sparsify's, for docs/gpu.md.

The steps of an architecture take turns in one process, a few each, on the same activations, so that noise hits all
alike; times are medians of CUDA events around them: loss, backward pass, optimizer. A peer that is not installed is
left out. With `pip install sae-lens==6.54.0 eai-sparsify==1.3.3` beside saepipe:

    python docs/gpu_steps.py
    python docs/gpu_steps.py --only topk --profile
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saepipe import saes
from saepipe.config import OptimConfig
from saepipe.point import Point

NEVER = 10**12  # tokens without firing after which a latent is dead: none is, for anybody


@dataclass(frozen=True)
class Sizes:
    """What a step works on."""

    d_in: int = 2304
    d_sae: int = 65536
    batch_tokens: int = 4096
    k: int = 64

    @property
    def widths(self) -> list[int]:
        """Inner widths of Matryoshka."""
        return [self.d_sae * part // 32 for part in (1, 3, 7, 15)]

    def batches(self, n: int) -> list[Tensor]:
        """Activations of features of which some are common and most are rare, and noise."""
        draw = torch.Generator("cuda").manual_seed(0)
        n_features, active = 4 * self.d_in, 40
        features = torch.randn(n_features, self.d_in, device="cuda", generator=draw) / self.d_in**0.5
        commonness = 1 / torch.arange(1, n_features + 1, device="cuda") ** 0.8
        found = []
        for _ in range(n):
            drawn = torch.multinomial(commonness.expand(self.batch_tokens, -1), active, generator=draw)
            strength = torch.rand(self.batch_tokens, active, device="cuda", generator=draw) + 0.5
            noise = torch.randn(self.batch_tokens, self.d_in, device="cuda", generator=draw)
            rows = torch.zeros(self.batch_tokens, n_features, device="cuda").scatter_(1, drawn, strength)
            found.append(rows @ features + 0.2 * noise / self.d_in**0.5)
        return found


Taken = Callable[[Tensor], object]
"""One training step on a batch."""


def ours(name: str, sizes: Sizes, *, compiled: bool = False, **keys: Any) -> Taken:
    """A step as the train verb takes it: clipping's norm, counters and dead latents are in it."""
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=sizes.d_sae, dead_after_tokens=NEVER, **keys), sizes.d_in)
    sae.initialise(torch.Generator().manual_seed(0), norm_scale=sizes.d_in**0.5)
    point = Point(sae, OptimConfig(lr=1e-4), total_steps=NEVER, compile=compiled).cuda()
    point.make_optimizer()
    number = 0

    def step(x: Tensor) -> None:
        nonlocal number
        with torch.autocast("cuda", torch.bfloat16):
            point.take_step(x, x, number, measure=False)
        number += 1

    return step


def of_saelens(architecture: str, sizes: Sizes, *, fused: bool = False, **keys: Any) -> Taken:
    """Loss, backward pass and Adam, without its trainer's clipping and counters."""
    import sae_lens
    from sae_lens.saes.sae import TrainStepInput

    cfg = getattr(sae_lens, f"{architecture}TrainingSAEConfig")(
        d_in=sizes.d_in, d_sae=sizes.d_sae, device="cuda", normalize_activations="none", **keys
    )
    torch.manual_seed(0)
    sae = getattr(sae_lens, f"{architecture}TrainingSAE")(cfg).cuda()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=fused or None)
    dead = torch.zeros(sizes.d_sae, dtype=torch.bool, device="cuda")
    coefficients = {"l0": 1.0, "l1": 1.0}
    scale = sizes.d_in**0.5

    def step(x: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            done = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x * scale,
                    coefficients=coefficients,
                    dead_neuron_mask=dead,
                    n_training_steps=0,
                    is_logging_step=False,
                )
            )
        done.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_sparsify(sizes: Sizes, *, fused: bool = False) -> Taken:
    """What its trainer does in a step, with its own way of holding decoder rows at norm 1."""
    from sparsify import Sae, SaeConfig

    torch.manual_seed(0)
    sae = Sae(sizes.d_in, SaeConfig(num_latents=sizes.d_sae, k=sizes.k), device="cuda", dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=fused or None)
    scale = sizes.d_in**0.5

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x * scale).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def contestants(sizes: Sizes) -> dict[str, dict[str, Callable[[], Taken]]]:
    """List architectures -> every kind of step that can be had here, by name -> how to make it."""
    k, inner, whole = {"k": sizes.k}, sizes.widths, [*sizes.widths, sizes.d_sae]
    found: dict[str, dict[str, Callable[[], Taken]]] = {
        "topk": {"saepipe topk": lambda: ours("topk", sizes, **k)},
        "batchtopk": {"saepipe batchtopk": lambda: ours("batchtopk", sizes, **k)},
        "matryoshka": {"saepipe matryoshka": lambda: ours("matryoshka", sizes, **k, matryoshka_widths=inner)},
    }
    for name in ("jumprelu", "standard", "gated"):
        found[name] = {
            f"saepipe {name}": lambda name=name: ours(name, sizes),
            f"saepipe {name}, train.compile": lambda name=name: ours(name, sizes, compiled=True),
        }
    if importlib.util.find_spec("sae_lens"):
        found["topk"] |= {
            "SAELens topk": lambda: of_saelens("TopK", sizes, **k),
            "SAELens topk, fused Adam": lambda: of_saelens("TopK", sizes, fused=True, **k),
        }
        found["batchtopk"]["SAELens batchtopk"] = lambda: of_saelens("BatchTopK", sizes, **k)
        found["matryoshka"]["SAELens matryoshka"] = lambda: of_saelens(
            "MatryoshkaBatchTopK", sizes, **k, matryoshka_widths=whole
        )
        for name, theirs in (("jumprelu", "JumpReLU"), ("standard", "Standard"), ("gated", "Gated")):
            found[name][f"SAELens {name}"] = lambda theirs=theirs: of_saelens(theirs, sizes)
    if importlib.util.find_spec("sparsify"):
        found["topk"] |= {
            "sparsify topk": lambda: of_sparsify(sizes),
            "sparsify topk, fused Adam": lambda: of_sparsify(sizes, fused=True),
        }
    return found


def time_ms(work: Callable[[], object]) -> float:
    """Time some work on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_ms(work: Callable[[], object], n: int = 20) -> float:
    """Time some work often, after a few times that do not count."""
    for _ in range(3):
        work()
    return statistics.median(time_ms(work) for _ in range(n))


def ceilings(sizes: Sizes) -> dict[str, float]:
    """Measure what the device can do: products in bfloat16, and copies in its memory."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=draw).bfloat16()

    a, b = normal(8192, 8192), normal(8192, 8192)
    x, rows = normal(sizes.batch_tokens, sizes.d_in), normal(sizes.d_sae, sizes.d_in)
    source, target = torch.empty(2**30, device="cuda"), torch.empty(2**30, device="cuda")
    flop = 2 * sizes.batch_tokens * sizes.d_in * sizes.d_sae
    found = {
        "matmul_tflops": 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9,
        "copy_tb_per_s": 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e9,
        "encoder_product_ms": median_ms(lambda: x @ rows.T),
    }
    found["encoder_product_tflops"] = flop / found["encoder_product_ms"] / 1e9
    return found


def measured(made: dict[str, Callable[[], Taken]], batches: list[Tensor], rounds: int) -> Iterator[dict[str, Any]]:
    """Take a step of each on every batch in turn, and yield their figures."""
    taken, held, peaks, times = {}, {}, {}, {name: [] for name in made}
    for name, make in made.items():
        before = torch.cuda.memory_allocated()
        taken[name] = make()
        for batch in batches:
            taken[name](batch)
        held[name] = torch.cuda.memory_allocated() - before
    for _ in range(rounds):
        for name, step in taken.items():
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - held[name]
            # Several at once: the host may be ahead of the device, as in training.
            times[name].append(time_ms(lambda step=step: [step(x) for x in batches]) / len(batches))
            peaks[name] = torch.cuda.max_memory_allocated() - others
    for name, each in times.items():
        quartiles = statistics.quantiles(each, n=4)
        yield {
            "step": name,
            "ms": statistics.median(each),
            "ms_quartiles": [quartiles[0], quartiles[2]],
            "tokens_per_s": len(batches[0]) / statistics.median(each) * 1000,
            "peak_gib": peaks[name] / 2**30,
        }


def profile(name: str, step: Taken, batches: list[Tensor]) -> None:
    """Print which kernels a step's time goes to."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for batch in batches:
            step(batch)
        torch.cuda.synchronize()
    kernels = [
        event for event in found.key_averages() if event.self_device_time_total and not event.self_cpu_time_total
    ]
    print(f"\n{name}: ms a step, times a step, kernel")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:40]:
        ms = event.self_device_time_total / len(batches) / 1000
        print(f"{ms:8.3f} {event.count / len(batches):6.1f} {event.key[:150]}")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="architectures to time")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="show the kernels of saepipe's steps too")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    for key, value in vars(Sizes()).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=value)
    asked = parser.parse_args()
    sizes = Sizes(asked.d_in, asked.d_sae, asked.batch_tokens, asked.k)
    device = torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "sizes": vars(sizes), **ceilings(sizes)}
    torch.cuda.empty_cache()
    print({name: round(value, 3) for name, value in found.items() if isinstance(value, float)})
    batches, made = sizes.batches(4), contestants(sizes)
    found["steps"] = []
    print(f"\n{device}, torch {torch.__version__}, {sizes}\n\n| step | ms | tokens/s | peak GiB |\n|---|---|---|---|")
    for name in asked.only or made:
        for row in measured(made[name], batches, asked.rounds):
            print(
                f"| {row['step']} | {row['ms']:.2f} | {row['tokens_per_s']:,.0f} | {row['peak_gib']:.1f} |", flush=True
            )
            found["steps"].append(row)
        torch.cuda.empty_cache()
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))
    for name in asked.only or made if asked.profile else ():
        profile(f"saepipe {name}", made[name][f"saepipe {name}"](), batches)


if __name__ == "__main__":
    main()
