"""The keys of the bench: what it measures, how large, and beside whom."""

from dataclasses import dataclass, field

from saepipe.errors import UserError, unknown
from saepipe.keys import Group, key

BY_DEFAULT = ("limits", "cache", "stream", "step", "train", "start", "grid", "evaluate")
PARTS = (*BY_DEFAULT, "memory", "ranks", "experiment")


@dataclass
class BenchConfig(Group, group="bench"):
    """The bench verb's own keys."""

    parts: list[str] = field(default_factory=lambda: [*BY_DEFAULT])
    """What to measure: limits (of the machine), cache, stream, step (of each architecture), train (the whole verb over
    its step), start (of a train job), grid (of four points beside one), evaluate; and on request memory (of the
    stream), ranks, and experiment: how long all verbs will take, which `+experiment=` adds."""
    dir: str = key("stores/bench", filled="name a folder", folder=True)
    """Where to make stores, in a folder of their own that is deleted at the end: this disk is measured."""
    tokens: int = key(16_384, least=1)
    """Tokens in each timing of the cache part, and four times those of the evaluate part; a GPU wants a million or
    more."""
    gb: float = key(1.0, above=0)
    """Size in GB of the smaller store that the memory part streams; its larger one, which the stream part streams too,
    is four times that. The disk's limits are measured with a file of this size."""
    rounds: int = key(3, least=1)
    """Rounds in which both sides of each ratio are measured; their median counts."""
    d_in: int = key(512, least=1)
    """Width of the activations that training steps are measured on."""
    d_sae: int = key(4096, least=1)
    """Latents of the SAEs whose steps are measured."""
    batch_tokens: int = key(2048, least=1)
    """Rows of a step."""
    k: int = key(32, least=1)
    """Active latents of a token; those of the standard architecture are twice as many."""
    architectures: list[str] = field(default_factory=list)
    """Architectures whose steps to measure; [] means all of them."""
    steps: int = key(9, least=1)
    """Steps of each library that are timed, in turns."""
    peers: bool = False
    """Measure SAELens, dictionary_learning and sparsify beside saepipe's steps; `make peers` installs them."""
    peers_python: str = key(".venv-peers/bin/python", filled="name the interpreter of `make peers`", folder=True)
    """Interpreter of the environment that they are in."""
    out: str | None = key(None, filled="name a file, or leave it out")
    """JSON file for the figures and the machine; None prints the table alone."""
    against: str | None = key(None, filled="name a file, or leave it out")
    """JSON file of another run or machine, whose values the table shows beside these."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        if not self.parts:
            raise UserError(f"bench.parts=[] measures nothing; name some of {', '.join(PARTS)}")
        for part in self.parts:
            if part not in PARTS:
                raise unknown("bench.parts", part, PARTS)
        if 2 * self.k > self.d_sae:
            raise UserError(
                f"bench.k={self.k} is more than half of bench.d_sae={self.d_sae}, and a step is measured with 2 k "
                "active latents; lower bench.k"
            )
