"""The run's configuration on one page: one dataclass per group, one `RunConfig` for every verb.

Values live in `conf/*.yaml`; an architecture's own keys live beside it in `saepipe/saes/<architecture>.py`. Nothing
here imports torch or a language-model library, so `--help` and a typo answer at once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from saepipe.errors import UserError, unknown

LARGEST = 2**62
"""Largest number of any key: what PyTorch counts with."""
LR_SCHEDULERS = ("constant", "cosineannealing")
STORE_DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("32-true", "bf16-mixed")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown(key, value, choices)


def at_least(key: str, value: float | None, least: float, *, exclusive: bool = False) -> None:
    """Refuse a number below its bound; None means "derived" and passes.

    Args:
        key: Dotted key, for the message.
        value: What it is set to.
        least: The bound.
        exclusive: Refuse the bound itself, too.
    """
    if value is None:
        return
    if not math.isfinite(value) or value > LARGEST:
        raise UserError(f"{key}={value} is no number that can be used; give one up to {LARGEST}")
    if not (value > least if exclusive else value >= least):
        raise UserError(
            f"{key}={value} is out of range; give a value {'above' if exclusive else 'of at least'} {least}"
        )


@dataclass
class ModelConfig:
    """The language model whose activations are read."""

    name: str = "demo"
    """Hub id, local Hugging Face folder, or `demo` (the model that ships with saepipe)."""
    hooks: list[str] = field(default_factory=lambda: ["blocks.2.hook_resid_post"])
    """TransformerLens names of the hook points to cache, all from one forward pass."""
    dtype: str = "float32"
    """Type that the model computes in: float32, bfloat16 or float16."""
    device: str = "auto"
    """Torch device such as `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the first accelerator, else the CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None is its default branch."""
    compatibility_mode: bool = False
    """HookedTransformer numerics (LayerNorm folded, weights centred), as many published SAEs saw them; slower."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model; only for repositories that you trust."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if not self.name:
            raise UserError("model.name is empty; give a hub id, a local folder or 'demo'")
        if not self.hooks:
            raise UserError("model.hooks=[] names no hook point; give at least one, e.g. [blocks.2.hook_resid_post]")
        if len(set(self.hooks)) != len(self.hooks):
            raise UserError(f"model.hooks={self.hooks} names a hook point twice; name each once")


@dataclass
class DataConfig:
    """The text (or token ids) that the language model reads."""

    path: str = "demo"
    """Hub id, local file or folder (parquet, jsonl, txt, arrow), or `demo` (the corpus that ships with saepipe)."""
    name: str | None = None
    """Configuration of a hub data set, where it has several."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    column: str = "text"
    """Column with the text, with lists of token ids (taken as they are), or with conversations (see chat_template)."""
    chat_template: str | None = None
    """Read conversations (lists of messages, each with role and content), written with this template: `default` is the
    tokenizer's own, anything else the path of a jinja file. None: the column holds text or token ids."""
    streaming: bool = False
    """Read a hub data set over the network as needed, instead of downloading it first."""
    context_size: int = 128
    """Tokens per context, special tokens included."""
    prepend_bos: bool = True
    """Begin every context with the tokenizer's beginning-of-sequence token."""
    pack: bool = True
    """Join documents (with the end-of-sequence token between) to fill contexts; else a context holds one document's
    tokens only, and what does not fill a context is left out."""
    exclude_special_tokens: bool = True
    """Leave special tokens and position 0 out of training and of its metrics; evaluation always leaves them out."""
    held_out: float = 0.05
    """Fraction of the documents that are never trained on, 0 to 0.5; a document's text decides its side."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.path.strip():
            raise UserError("data.path is empty; give a hub id, a file, a folder, or 'demo'")
        if self.chat_template is not None and not self.chat_template.strip():
            raise UserError("data.chat_template is empty; give 'default' or the path of a jinja file, or leave it out")
        at_least("data.context_size", self.context_size, 3)  # position 0 is left out, the last has no target
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"data.held_out={self.held_out} is out of range; give a fraction from 0 to 0.5")


@dataclass
class StoreConfig:
    """The folder of activation shards on disk."""

    dir: str = "stores/${run.name}"
    """Folder of the store."""
    tokens: int = 2_000_000
    """Rows to store per hook for training (one row per token; held-out rows come on top)."""
    dtype: str = "bfloat16"
    """Type on disk: float32, bfloat16 or float16."""
    shard_tokens: int = 65_536
    """Rows per shard file."""
    shuffle_tokens: int = 262_144
    """Rows shuffled together before they are written: a multiple of shard_tokens. Costs twice the memory that they
    fill, since one part is written while the next is captured."""
    batch_prompts: int = 32
    """Contexts per forward pass of the language model."""
    seed: int = 0
    """Seed of the shuffle and of the held-out split."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("store.dtype", self.dtype, STORE_DTYPES)
        if not self.dir.strip():
            raise UserError("store.dir is empty; name a folder")
        for key in ("tokens", "shard_tokens", "shuffle_tokens", "batch_prompts"):
            at_least(f"store.{key}", getattr(self, key), 1)
        if self.shuffle_tokens % self.shard_tokens:
            nearest = max(1, round(self.shuffle_tokens / self.shard_tokens)) * self.shard_tokens
            raise UserError(
                f"store.shuffle_tokens={self.shuffle_tokens} is no multiple of store.shard_tokens={self.shard_tokens}; "
                f"the nearest is {nearest}"
            )


@dataclass
class StreamConfig:
    """The order and the pace in which training reads the store."""

    hook: str | None = None
    """Hook point to train on; None means the only one in the store."""
    batch_tokens: int = 4096
    """Rows per optimizer step, over all ranks (the global batch)."""
    window_tokens: int = 524_288
    """Rows shuffled in memory, over all lanes."""
    lanes: int | None = None
    """Independent sub-streams that ranks divide among themselves; divides batch_tokens. None: 24 where it divides, else
    the greatest common divisor of batch_tokens and 64."""
    prefetch_batches: int = 4
    """Batches made ready ahead of the step; 0 reads in the training thread."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("batch_tokens", "window_tokens", "lanes"):
            at_least(f"stream.{key}", getattr(self, key), 1)
        at_least("stream.prefetch_batches", self.prefetch_batches, 0)
        if self.lanes is not None and self.batch_tokens % self.lanes:
            nearest = max(1, round(self.batch_tokens / self.lanes)) * self.lanes
            raise UserError(
                f"stream.lanes={self.lanes} does not divide stream.batch_tokens={self.batch_tokens}; "
                f"the nearest batch is {nearest}"
            )


@dataclass
class OptimConfig:
    """Adam and its learning rate."""

    lr: float = 3e-4
    """Peak learning rate."""
    lr_end: float | None = None
    """Learning rate at the end of cosineannealing; None is lr / 10."""
    lr_scheduler_name: str = "constant"
    """Course of the rate between warm-up and decay: constant or cosineannealing."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    lr_warm_up_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    lr_decay_steps: int = 0
    """Last steps over which the rate falls linearly to 0."""
    grad_clip: float | None = None
    """Largest norm of the gradient; None leaves it alone."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("optim.lr_scheduler_name", self.lr_scheduler_name, LR_SCHEDULERS)
        at_least("optim.lr", self.lr, 0, exclusive=True)
        at_least("optim.lr_end", self.lr_end, 0)
        at_least("optim.eps", self.eps, 0, exclusive=True)
        at_least("optim.lr_warm_up_steps", self.lr_warm_up_steps, 0)
        at_least("optim.lr_decay_steps", self.lr_decay_steps, 0)
        at_least("optim.grad_clip", self.grad_clip, 0, exclusive=True)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas} is out of range; give two numbers from 0 to below 1")


@dataclass
class TrainConfig:
    """How long to train, and what to leave on the way."""

    tokens: int = 4_000_000
    """Rows to train on; more than the store holds means several epochs, each in its own order."""
    seed: int = 0
    """Seed of the SAE's initial weights."""
    log_every_steps: int = 25
    """Steps between two rows of metrics."""
    checkpoint_every_steps: int = 1000
    """Steps between two checkpoints, from which the same command resumes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("tokens", "log_every_steps", "checkpoint_every_steps"):
            at_least(f"train.{key}", getattr(self, key), 1)
        at_least("train.seed", self.seed, 0)


@dataclass
class TrainerConfig:
    """Lightning Trainer arguments."""

    accelerator: str = "auto"
    """cpu, cuda (or gpu), mps or auto."""
    precision: str = "32-true"
    """32-true, or bf16-mixed (master weights stay float32)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        _choice("trainer.precision", self.precision, PRECISIONS)


@dataclass
class RunFolder:
    """Where a run is kept."""

    name: str = "default"
    """Name of the run, and of its folder."""
    dir: str = "runs/${run.name}"
    """Folder of the run; in a sweep, each point has a folder in it."""

    def __post_init__(self) -> None:
        """Check that there is a folder: an empty name would be the current one."""
        for key in ("name", "dir"):
            if not getattr(self, key).strip():
                raise UserError(f"run.{key} is empty; give it a name")


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.csv, which is always written."""

    name: str = "csv"
    """csv, wandb or tensorboard."""
    project: str = "saepipe"
    """Project in Weights & Biases."""
    entity: str | None = None
    """Team in Weights & Biases; None is the account's default."""
    offline: bool = False
    """Write Weights & Biases files locally, for `wandb sync` later."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("logger.name", self.name, ("csv", "wandb", "tensorboard"))


@dataclass
class CacheConfig:
    """The cache verb's own keys."""

    dry_run: bool = False
    """Print the projected bytes and time and stop."""


@dataclass
class EvaluateConfig:
    """The evaluate verb's own keys."""

    tokens: int = 200_000
    """Held-out tokens to measure on, at most."""
    batch_prompts: int = 32
    """Contexts per forward pass."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least("evaluate.tokens", self.tokens, 1)
        at_least("evaluate.batch_prompts", self.batch_prompts, 1)


@dataclass
class AnalyzeConfig:
    """The analyze verb's own keys."""

    tokens: int = 200_000
    """Tokens to search for the contexts that activate each latent."""
    latents: int = 256
    """Latents to show, drawn evenly over the live ones."""
    contexts: int = 8
    """Top activating contexts to show per latent."""
    batch_prompts: int = 32
    """Contexts per forward pass."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("tokens", "latents", "contexts", "batch_prompts"):
            at_least(f"analyze.{key}", getattr(self, key), 1)


@dataclass
class RunConfig:
    """Everything that a run is made of; every verb takes the same groups and reads those it needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    sae: Any = None
    """The architecture's own dataclass (`saepipe.saes`), once the door has typed it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunFolder = field(default_factory=RunFolder)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    overrides: list[str] = field(default_factory=list)
    """What the user typed, set at the door. A verb that takes model and data from a store compares just these keys."""

    def typed(self, key: str) -> bool:
        """Say whether the user typed a value for a key (`model.name`) or chose its group (`model`)."""
        keys = {override.lstrip("+~").split("=")[0].split("@")[0] for override in self.overrides}
        return key in keys or key.split(".")[0] in keys
