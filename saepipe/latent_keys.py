"""The keys of the verbs that ask what a trained SAE's latents do: steer, attribute and contrast."""

from dataclasses import dataclass, field
from typing import Any

from saepipe.errors import UserError
from saepipe.keys import LARGEST, Group, key

_TEXTS = "name a file or folder with texts, or leave it out"


@dataclass
class SteerConfig(Group, group="steer"):
    """The steer verb's own keys."""

    latents: list[int] = field(default_factory=list)
    """Latents to steer with, all together, such as [12] or [12,40]."""
    mode: str = key("add", choices=("add", "clamp", "ablate"))
    """add: what a latent is, and the strength on top; clamp: held at the strength; ablate: held at 0."""
    strength: Any = 4.0
    """How strongly, in units of each latent's typical activation (its mean where it is active); may be negative. One
    number, or one for each latent, such as [3,-1]."""
    prompt: str = ""
    """What to go on from; empty is the beginning-of-sequence token alone."""
    samples: int = key(8, least=1)
    """Texts to generate, and as many without steering."""
    tokens: int = key(40, least=1)
    """Tokens of each, at most."""
    temperature: float = key(1.0, least=0)
    """What logits are divided by; 0 takes the likeliest token, and all samples are the same."""
    seed: int = key(0, least=-LARGEST)
    """Seed of the samples, with steering and without."""
    positions: list[int] | None = None
    """Positions of the text to steer at, counted from 0 with the beginning-of-sequence token, such as [3,4]; None: all
    but the first, those that are generated too."""
    typical: float | None = key(None, above=0)
    """Typical activation of the latents, where it is known; None measures it."""
    typical_tokens: int = key(50_000, least=1)
    """Held-out tokens of the run's store to measure it on."""
    texts: str | None = key(None, filled=_TEXTS, folder=True)
    """Local texts to measure it on instead (txt with paragraphs, or jsonl with a column `text`)."""
    batch_prompts: int = key(32, least=1)
    """Contexts per forward pass while it is measured."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        for one in self.strength if isinstance(self.strength, list) else [self.strength]:
            if isinstance(one, bool) or not isinstance(one, int | float) or not abs(one) <= LARGEST:
                raise UserError(f"steer.strength={self.strength} is no strength; give a number, or one for each latent")
        if len(self.strengths) != len(self.latents):
            raise UserError(
                f"steer.strength={self.strength} is {len(self.strengths)} numbers and steer.latents={self.latents} are "
                f"{len(self.latents)}; give one number for all, or as many"
            )
        if self.positions is not None and (not self.positions or min(self.positions) < 0):
            raise UserError(f"steer.positions={self.positions} is no list of positions; give some, counted from 0")

    @property
    def strengths(self) -> list[float]:
        """The strength of each latent."""
        return self.strength if isinstance(self.strength, list) else [self.strength] * len(self.latents)


@dataclass
class AttributeConfig(Group, group="attribute"):
    """The attribute verb's own keys."""

    prompt: str | None = key(None, filled="give a text, or leave it out")
    """Text whose next token is looked at; None where only `ablate` is asked for."""
    target: str | None = None
    """Token whose logit is divided up, such as " HTTP" (one token of the tokenizer); None: the likeliest."""
    against: str | None = None
    """Token whose logit is taken off it; None takes off nothing."""
    position: int = -1
    """Position of the prompt after which the token would come; -1 is the last."""
    steps: int | None = key(16, least=1)
    """Points of the integrated gradients; None takes one gradient, at the activations as they are."""
    latents: int = key(10, least=1)
    """Latents to show, those with the largest effect."""
    ablate: list[int] = field(default_factory=list)
    """Latents to ablate one at a time, to measure what it does to the cross-entropy."""
    tokens: int = key(50_000, least=1)
    """Held-out tokens of the run's store to measure that on."""
    texts: str | None = key(None, filled=_TEXTS, folder=True)
    """Local texts to measure it on instead (txt with paragraphs, or jsonl with a column `text`)."""
    batch_prompts: int = key(32, least=1)
    """Contexts per forward pass while it is measured."""


@dataclass
class ContrastConfig(Group, group="contrast"):
    """The contrast verb's own keys."""

    a: str | None = key(None, filled=_TEXTS, folder=True)
    """One set of texts: a local file or folder (txt with paragraphs between blank lines, jsonl, parquet ...)."""
    b: str | None = key(None, filled=_TEXTS, folder=True)
    """The other set."""
    column: str = key("text", filled="name the column with the text")
    """Column with the text, where the files have columns."""
    measure: str = key("mean", choices=("mean", "max"))
    """What a text counts as: the mean of a latent's activation over its tokens, or the largest."""
    truncate: bool = False
    """Cut texts that are longer than the model's context, which are refused else."""
    latents: int = key(20, least=1)
    """Latents to show, those that separate the sets best."""
    resamples: int = key(1000, least=100, most=1_000_000)
    """Times that texts are drawn anew for the intervals, and parted anew for the p-values."""
    seed: int = key(0, least=-LARGEST)
    """Seed of both."""
    batch_prompts: int = key(32, least=1)
    """Texts per forward pass."""
