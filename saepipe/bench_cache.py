"""Caching against the plain forward pass of the same model, which stops after the same block and keeps nothing."""

import dataclasses
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from saepipe.bench_figure import Figure, speed
from saepipe.bench_store import random_tokens
from saepipe.capturing import fill
from saepipe.config import ModelConfig, RunConfig
from saepipe.demo import MODEL_DIR
from saepipe.errors import UserError
from saepipe.language_model import LanguageModel
from saepipe.lock import hold
from saepipe.plan import Plan
from saepipe.store import Store
from saepipe.workers import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS, WIDTH, BLOCK = 8, 512, 5
"""The random model, and the block that is read."""
GROUPS = 4
"""Shuffle groups of a timing, at least: one is written while the next is captured, and the last one alone."""


def measure(config: RunConfig, folder: Path) -> list[Figure]:
    """Time a plain forward pass, capturing, and whole caching (captured, shuffled, hashed, written), in turns.

    The model is random (8 layers, d=512, read after block 5), or the user's own where `model.name` is given.

    Raises:
        UserError: The hooks of the user's model are not the residual stream after a block.
    """
    block = _deepest(config) if _own_model(config) else BLOCK
    hooks = [f"blocks.{number}.hook_resid_post" for number in sorted({block // 3, 2 * block // 3, block})]
    name = config.model.name if _own_model(config) else str(_random_model(folder / "model"))
    model = LanguageModel.open(dataclasses.replace(config.model, name=name, hooks=hooks))
    model.check_context(config.data.context_size)
    return _Comparison(config, folder, model, Plain(config.model, model, block), hooks).figures()


def _own_model(config: RunConfig) -> bool:
    return config.typed("model.name") or config.model.name != ModelConfig.name


def _deepest(config: RunConfig) -> int:
    found = [re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook) for hook in config.model.hooks]
    blocks = [int(match[1]) for match in found if match]
    if len(blocks) < len(found):
        raise UserError(
            f"model.hooks={config.model.hooks} cannot be compared with a forward pass that stops after a block; give "
            "blocks.N.hook_resid_post"
        )
    return max(blocks)


def _random_model(folder: Path) -> Path:
    """Save a model of Llama's architecture, with the demo's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.save_pretrained(folder)
    heads, vocab_size = WIDTH // 64, len(tokenizer)
    shape = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3 // 32 * 32,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


class _Enough(Exception):  # noqa: N818 - no error: it ends the forward pass
    """Raised after the block."""


class Plain:
    """The model as anybody would run it who wants no more than to reach a block: sdpa attention, and stop there."""

    def __init__(self, config: ModelConfig, model: LanguageModel, block: int) -> None:
        """Load the weights a second time, onto one device."""
        from transformers import AutoModelForCausalLM

        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            MODEL_DIR if model.name == "demo" else model.identity["name"],
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa",
        )
        self._model, self._device = loaded.to(model.device).eval(), model.device
        blocks = next(
            child
            for child in self._model.get_decoder().modules()
            if isinstance(child, torch.nn.ModuleList) and len(child) == model.n_layers
        )
        blocks[block].register_forward_hook(self._stop)

    @staticmethod
    def _stop(*_: Any) -> None:
        raise _Enough

    @torch.inference_mode()
    def run(self, ids: Int[Tensor, "batch seq"]) -> None:
        """Run as far as the block."""
        try:
            self._model(input_ids=ids.to(self._device), use_cache=False)
        except _Enough:
            return
        raise AssertionError("the forward pass did not come by the block")


class _Comparison:
    """The turns."""

    def __init__(self, config: RunConfig, folder: Path, model: LanguageModel, plain: Plain, hooks: list[str]) -> None:
        self._config, self._folder, self._model, self._plain, self._hooks = config, folder, model, plain, hooks
        store, seq = config.store, config.data.context_size
        batches = -(-config.bench.tokens // (store.batch_prompts * seq * GROUPS)) * GROUPS
        self._contexts = batches * store.batch_prompts
        self._batch = store.batch_prompts
        self._read = random_tokens(
            folder / "tokens", contexts=self._contexts, context_size=seq, vocab_size=model.vocab_size
        )
        shuffle = min(store.shuffle_tokens, self._contexts * seq // GROUPS)
        self._store = dataclasses.replace(
            store,
            tokens=self._contexts * seq,
            shuffle_tokens=shuffle,
            shard_tokens=store.shard_tokens if shuffle % store.shard_tokens == 0 else shuffle,
        )

    def figures(self) -> list[Figure]:
        """Do all rounds."""
        deepest = self._hooks[-1:]
        self._forwards(slice(0, 2))  # what is set up at the first call does not count
        rounds = [self._round(deepest) for _ in range(self._config.bench.rounds)]
        speeds: dict[str, float] = {}
        for name in rounds[0]:
            wall_s, processor_s = np.median([times[name] for times in rounds], axis=0).tolist()
            speeds |= {f"{name}_tokens_per_s": self._store.tokens / wall_s, f"{name}_processor_s": processor_s}

        def ratios(above: str, below: str) -> list[float]:
            return [float(times[above][0] / times[below][0]) for times in rounds]

        def told(name: str) -> str:
            return speed(speeds[f"{name}_tokens_per_s"])

        over, n = "tokens/s over a plain forward pass's", len(self._hooks)
        several = f"cache, time of {n} hooks over that of the deepest"
        found = [
            Figure(f"cache, capturing, {over}", ratios("plain", "capture"), speeds, told=told("capture")),
            Figure(f"cache, all of it, {over}", ratios("plain", "cache"), speeds, at_least=0.95, told=told("cache")),
        ]
        if n > 1:
            found += [
                Figure(f"{several}, capturing", ratios("capture_several", "capture"), speeds, at_most=1.15),
                Figure(f"{several}, all of it", ratios("cache_several", "cache"), speeds, at_most=1.15),
            ]
        return found

    def _round(self, deepest: list[str]) -> dict[str, Float64[np.ndarray, " 2"]]:
        """Time everything once: forward passes before and after the whole, so that drift counts for both sides."""
        batches = self._contexts // self._batch
        before = self._forwards(slice(0, batches // 2))
        cache = self._cached(deepest)
        after = self._forwards(slice(batches // 2, batches))
        return {
            **{name: before[name] + after[name] for name in before},
            "cache": cache,
            "cache_several": self._cached(self._hooks),
        }

    def _forwards(self, batches: slice) -> dict[str, Float64[np.ndarray, " 2"]]:
        """Time the plain pass and capturing in turns, batch by batch."""
        times = {name: np.zeros(2) for name in ("plain", "capture", "capture_several")}
        ids = torch.from_numpy(self._read.train.ids.astype("int64")).split(self._batch)
        ways: dict[str, Callable[[Tensor], object]] = {
            "plain": self._plain.run,
            "capture": lambda batch: self._model.capture(batch, self._hooks[-1:]),
            "capture_several": lambda batch: self._model.capture(batch, self._hooks),
        }
        for number, batch in enumerate(ids[batches]):
            names = [*ways][number % 3 :] + [*ways][: number % 3]  # whoever comes first warms the caches
            for name in names:
                times[name] += self._timed(lambda run=ways[name], batch=batch: run(batch))  # type: ignore[misc]
        return times

    def _cached(self, hooks: list[str]) -> Float64[np.ndarray, " 2"]:
        """Time the making of a store, with the code of the cache verb."""
        folder = self._folder / "store"
        plan = Plan.make(
            self._read,
            self._store,
            model=self._model.identity,
            hooks={hook: self._model.width(hook) for hook in hooks},
            capture=self._model.capture_path,
            device_kind=self._model.device.type,
            threads=torch.get_num_threads() if self._model.device.type == "cpu" else 0,
            data={},
        )
        with hold(folder, key="bench.dir"):
            store = Store.create(folder, plan, self._read)
            seconds = self._timed(lambda: fill(store, self._model, Worker()))
        shutil.rmtree(folder)
        return seconds

    def _timed(self, work: Callable[[], object]) -> Float64[np.ndarray, " 2"]:
        """Return the seconds, and those that the processor's cores worked: other processes show in the first only."""
        start = np.array([time.perf_counter(), time.process_time()])
        work()
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return np.array([time.perf_counter(), time.process_time()]) - start
