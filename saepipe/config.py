"""The run's configuration on one page: one dataclass per group, one `RunConfig` for every verb.

Values live in `conf/*.yaml`; an architecture's own keys live beside it in `saepipe/saes/<architecture>.py`, those of a
cluster in `saepipe/cluster.py`, those of steer, attribute and contrast in `saepipe/latent_keys.py`, those of the bench
in `saepipe/bench_keys.py`. Nothing here imports torch or a language-model library, so `--help` and a typo answer at
once.
"""

from dataclasses import dataclass, field
from typing import Any

from saepipe.bench_keys import BenchConfig
from saepipe.cluster import SlurmConfig
from saepipe.errors import UserError
from saepipe.keys import LARGEST, Group, key
from saepipe.latent_keys import AttributeConfig, ContrastConfig, SteerConfig

LR_SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
DTYPES = ("float32", "bfloat16", "float16")
STORE_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Types on disk -> bytes of a number."""
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
DEVICE_MAPS = ("auto", "balanced", "sequential")
PRECISIONS = ("32-true", "bf16-mixed", "64-true")
STRATEGIES = ("auto", "ddp")


@dataclass
class ModelConfig(Group, group="model"):
    """The language model whose activations are read."""

    name: str = "demo"
    """Hub id, local Hugging Face folder, or `demo` (the model that ships with saepipe)."""
    hooks: list[str] = field(default_factory=lambda: ["blocks.2.hook_resid_post"])
    """Hook points to cache, all from one forward pass: TransformerLens names (with `.head.3` behind for one head), or
    paths of modules such as `model.layers.5.mlp` for their output (with `.input` behind for their input)."""
    dtype: str = key("float32", choices=DTYPES)
    """Type that the model computes in: float32, bfloat16 or float16."""
    device: str = "auto"
    """Torch device such as `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes an accelerator, else the CPU. With `auto` or
    `cuda`, each worker of a machine takes the next GPUs."""
    n_devices: int = key(1, least=1)
    """GPUs per worker. Several share the layers of one model; they work one after the other."""
    device_map: str | None = key(None, choices=DEVICE_MAPS)
    """How transformers spreads the layers over these GPUs: `auto`, `balanced` or `sequential`. None is `auto` where
    there are several."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None is its default branch."""
    compatibility_mode: bool = False
    """HookedTransformer numerics (LayerNorm folded, weights centred), as many published SAEs saw them; slower."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model; only for repositories that you trust."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        if not self.name:
            raise UserError("model.name is empty; give a hub id, a local folder or 'demo'")
        if not self.hooks:
            raise UserError("model.hooks=[] names no hook point; give at least one, e.g. [blocks.2.hook_resid_post]")
        if len(set(self.hooks)) != len(self.hooks):
            raise UserError(f"model.hooks={self.hooks} names a hook point twice; name each once")


@dataclass
class DataConfig(Group, group="data"):
    """The text (or token ids) that the language model reads."""

    path: str = key("demo", filled="give a hub id, a file, a folder, or 'demo'")
    """Hub id, local file or folder (parquet, jsonl, txt, arrow), or `demo` (the corpus that ships with saepipe)."""
    name: str | None = None
    """Configuration of a hub data set, where it has several."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    column: str = "text"
    """Column with the text, with lists of token ids (taken as they are), or with conversations (see chat_template)."""
    chat_template: str | None = key(None, filled="give 'default' or the path of a jinja file, or leave it out")
    """Read conversations (lists of messages, each with role and content), written with this template: `default` is the
    tokenizer's own, anything else the path of a jinja file. None: the column holds text or token ids."""
    streaming: bool = False
    """Read a hub data set over the network as needed, instead of downloading it first."""
    context_size: int = key(128, least=3)  # position 0 is left out, the last has no target
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
        """Check what a range cannot say."""
        super().__post_init__()
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"data.held_out={self.held_out} is out of range; give a fraction from 0 to 0.5")


@dataclass
class StoreConfig(Group, group="store"):
    """The folder of activation shards on disk."""

    dir: str = key("stores/${run.name}", filled="name a folder", folder=True)
    """Folder of the store."""
    tokens: int = key(2_000_000, least=1)
    """Rows to store per hook for training (one row per token; held-out rows come on top)."""
    dtype: str = key("bfloat16", choices=tuple(STORE_DTYPES))
    """Type on disk: float32, bfloat16, float16, or int8 (centred, and scaled by channel and by row)."""
    shard_tokens: int = key(65_536, least=1)
    """Rows per shard file."""
    shuffle_tokens: int = key(262_144, least=1)
    """Rows shuffled together before they are written: a multiple of shard_tokens. Costs twice the memory that they
    fill, since one part is written while the next is captured."""
    batch_prompts: int = key(32, least=1)
    """Contexts per forward pass of the language model."""
    seed: int = 0
    """Seed of the shuffle and of the held-out split."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        if self.shuffle_tokens % self.shard_tokens:
            nearest = max(1, round(self.shuffle_tokens / self.shard_tokens)) * self.shard_tokens
            raise UserError(
                f"store.shuffle_tokens={self.shuffle_tokens} is no multiple of store.shard_tokens={self.shard_tokens}; "
                f"the nearest is {nearest}"
            )


@dataclass
class StreamConfig(Group, group="stream"):
    """The order and the pace in which training reads the store."""

    hook: str | None = None
    """Hook point to train on; None means the only one in the store."""
    target_hook: str | None = None
    """Hook point to predict from the other, which makes every sae a transcoder; None means the same."""
    positions: list[int] | None = None
    """First and last position in the context to train on, such as [1, 63]; None means all."""
    max_norm: float | None = key(None, above=0)
    """Leave out rows longer than this many times the hook's mean norm, such as attention sinks; 10 is usual."""
    roles: list[str] | None = None
    """Roles whose tokens to train on, such as [assistant], where the data is chats; None means all."""
    batch_tokens: int = key(4096, least=1)
    """Rows per optimizer step, over all ranks (the global batch)."""
    window_tokens: int = key(524_288, least=1)
    """Rows shuffled in memory, over all lanes."""
    lanes: int | None = key(None, least=1)
    """Independent sub-streams that ranks divide among themselves; divides batch_tokens. None: 24 where it divides, else
    the greatest common divisor of batch_tokens and 64."""
    prefetch_batches: int = key(4, least=0, most=1024)
    """Batches made ready ahead of the step; 0 reads in the training thread."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        if self.positions is not None and (len(self.positions) != 2 or not 0 <= self.positions[0] <= self.positions[1]):
            raise UserError(f"stream.positions={self.positions} is no range; give [first, last], counted from 0")
        if self.roles is not None and not self.roles:
            raise UserError("stream.roles=[] keeps no token; name a role, or leave it null")
        if self.lanes is not None and self.batch_tokens % self.lanes:
            nearest = max(1, round(self.batch_tokens / self.lanes)) * self.lanes
            raise UserError(
                f"stream.lanes={self.lanes} does not divide stream.batch_tokens={self.batch_tokens}; "
                f"the nearest batch is {nearest}"
            )


@dataclass
class OptimConfig(Group, group="optim"):
    """Adam and its learning rate."""

    lr: float = key(3e-4, above=0)
    """Peak learning rate."""
    lr_end: float | None = key(None, least=0)
    """Learning rate at the end of a cosine; None is lr / 10. A decay goes on from there."""
    lr_scheduler_name: str = key("constant", choices=LR_SCHEDULERS)
    """Course of the rate between warm-up and decay: constant, cosineannealing or cosineannealingwarmrestarts."""
    n_restart_cycles: int = key(1, least=1)
    """How many times cosineannealingwarmrestarts falls to lr_end."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two decay rates."""
    eps: float = key(1e-8, above=0)
    """Adam's epsilon."""
    lr_warm_up_steps: int = key(0, least=0)
    """Steps over which the rate rises linearly from 0."""
    lr_decay_steps: int = key(0, least=0)
    """Last steps over which the rate falls linearly to 0."""
    grad_clip: float | None = key(None, above=0)
    """Largest norm of the gradient; None leaves it alone."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas} is out of range; give two numbers from 0 to below 1")


@dataclass
class TrainConfig(Group, group="train"):
    """How long to train, and what to leave on the way."""

    tokens: int = key(4_000_000, least=1)
    """Rows to train on; more than the store holds means several epochs, each in its own order."""
    seed: int = key(0, least=0)
    """Seed of the SAE's initial weights."""
    store_copy: str | None = key(None, folder=True)
    """Folder of a copy of the store to read, such as one on a node's own disk; None reads store.dir itself."""
    log_every_steps: int = key(25, least=1)
    """Steps between two rows of metrics."""
    checkpoint_every_steps: int = key(1000, least=1)
    """Steps between two checkpoints, from which the same command resumes."""
    evaluate_every_steps: int | None = key(None, least=1)
    """Steps between two measurements on the store's held-out rows; None measures never."""
    n_checkpoints: int = key(0, least=0)
    """Intermediate SAEs to export on the way, at even distances, to `sae_steps/` in the run's folder."""
    init_from: str | None = key(None, filled="name the folder of an exported SAE, or leave it out", folder=True)
    """Folder of an exported SAE to start from, with a fresh optimizer; None starts anew."""
    micro_batches: int = key(1, least=1)
    """Parts that a rank takes its share of a batch in, one after the other: less memory, the same batch."""
    compile: bool = False
    """Compile the loss with torch.compile; its rounding is another, so a run keeps to what it began with."""


@dataclass
class TrainerConfig(Group, group="trainer"):
    """Lightning Trainer arguments."""

    accelerator: str = key("auto", choices=ACCELERATORS)
    """cpu, cuda (or gpu), mps or auto."""
    devices: int = key(1, least=1)
    """Ranks on each machine: processes that share each batch, each on a GPU or on a part of the CPU's cores."""
    num_nodes: int = key(1, least=1)
    """Machines. With more than one, srun or torchrun starts the ranks."""
    strategy: str = key("auto", choices=STRATEGIES)
    """ddp, or auto, which is ddp where there are several ranks."""
    precision: str = key("32-true", choices=PRECISIONS)
    """32-true, bf16-mixed (master weights stay float32), or 64-true (to prove that something is exact)."""


@dataclass
class RunFolder(Group, group="run"):
    """Where a run is kept; an empty name would be the current folder."""

    name: str = key("default", filled="give it a name")
    """Name of the run, and of its folder."""
    dir: Any = key("runs/${run.name}", filled="give it a name", folder=True)  # noqa: RUF009  (it is a field)
    """Folder of the run; in a sweep, each point has a folder in it. `evaluate` takes a list of folders, too."""

    def __post_init__(self) -> None:
        """Check each of several folders as one is checked."""
        if self.dir == []:
            raise UserError("run.dir=[] names no run; give one, or several")
        if isinstance(self.dir, list):
            if nested := [folder for folder in self.dir if isinstance(folder, list)]:
                raise UserError(f"run.dir={nested[0]} is no text; give each folder as a string")
            self.dir = [type(self)(self.name, folder).dir for folder in self.dir]
        else:
            super().__post_init__()


@dataclass
class LoggerConfig(Group, group="logger"):
    """Where metrics go besides metrics.csv, which is always written."""

    name: str = key("csv", choices=("csv", "wandb", "tensorboard"))
    """csv, wandb or tensorboard."""
    project: str = "saepipe"
    """Project in Weights & Biases."""
    entity: str | None = None
    """Team in Weights & Biases; None is the account's default."""
    group: str | None = None
    """Group in Weights & Biases; None is the sweep's folder, of a run that is a point of one."""
    offline: bool = False
    """Write Weights & Biases files locally, for `wandb sync` later; where its server cannot be reached, so anyway."""


@dataclass
class CacheConfig(Group, group="cache"):
    """The cache verb's own keys."""

    dry_run: bool = False
    """Print the projected bytes and time and stop."""
    tokens_only: bool = False
    """Stop once the text is tokenised, which needs no weights and no GPU."""
    workers: int = key(1, least=1)
    """Processes on this machine that divide the work, each on model.n_devices GPUs of its own; the same command on
    other machines helps, too."""
    poor_shuffle: str = key("refuse", choices=("refuse", "warn"))
    """What to do about a shuffle too small for its contexts: refuse or warn."""


@dataclass
class EvaluateConfig(Group, group="evaluate"):
    """The evaluate verb's own keys."""

    tokens: int = key(200_000, least=1)
    """Held-out tokens to measure on, at most."""
    batch_prompts: int = key(32, least=1)
    """Contexts per forward pass."""
    workers: int = key(1, least=1)
    """Processes on this machine that divide the contexts, each on model.n_devices GPUs of its own."""
    inclusive: bool = False
    """Give the figures that count special tokens and position 0 too, as SAELens does; it takes twice as long."""
    step: int | None = key(None, least=1)
    """Step whose SAE to measure (train.n_checkpoints exports them), while the run goes on too; None: the final one."""


@dataclass
class AnalyzeConfig(Group, group="analyze"):
    """The analyze verb's own keys."""

    tokens: int = key(200_000, least=1)
    """Tokens to search for the contexts that activate each latent."""
    latents: Any = None
    """How many latents to show, drawn evenly over the live ones, or a list of those to show, such as [12,40]; None
    shows all live ones."""
    contexts: int = key(8, least=1)
    """Top activating contexts to show per latent."""
    labels: str | None = key(None, filled="name a JSON file, or leave it out", folder=True)
    """JSON file of names for latents, `{"12": "HTTP requests"}`; the others are called by their strongest tokens."""
    batch_prompts: int = key(32, least=1)
    """Contexts per forward pass."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        value, cure = self.latents, "give how many, or a list such as [12,40]"
        numbers = value if isinstance(value, list) else [1 if value is None else value]
        if value == [] or not all(type(number) is int for number in numbers):
            raise UserError(f"analyze.latents={value} is neither a number of latents nor a list of some; {cure}")
        if min(numbers) < (0 if isinstance(value, list) else 1) or max(numbers) > LARGEST:
            raise UserError(f"analyze.latents={value} is out of range; {cure}, counted from 0")
        if len(set(numbers)) < len(numbers):
            raise UserError(f"analyze.latents={value} names a latent twice; name each once")


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
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Key of the sae or optim group, or `hook` -> values: one SAE for each combination, all trained from one stream."""
    run: RunFolder = field(default_factory=RunFolder)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    fused: bool = False
    """Have `launch` train all points of a sweep in one job, from one stream, as a grid does."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    steer: SteerConfig = field(default_factory=SteerConfig)
    attribute: AttributeConfig = field(default_factory=AttributeConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    overrides: list[str] = field(default_factory=list)
    """What the user typed, set at the door. A verb that takes model and data from a store compares just these keys."""

    def named(self, key: str) -> bool:
        """Say whether the user typed a value for this very key."""
        return any(override.lstrip("+").startswith(f"{key}=") for override in self.overrides)

    def typed(self, key: str) -> bool:
        """Say whether the user typed a value for a key (`model.name`) or chose its group (`model`)."""
        keys = {override.lstrip("+~").split("=")[0].split("@")[0] for override in self.overrides}
        return key in keys or key.split(".")[0] in keys
