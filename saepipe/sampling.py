"""Choosing the next token, and adding tokens to prompts one by one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepipe import progress
from saepipe.errors import UserError

Logits = Callable[[Int[Tensor, "batch seq"]], Float[Tensor, "batch vocab"]]
"""Gives the logits of what follows a batch of equally long prompts."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        UserError: A value has no meaning.
    """

    do_sample: bool = True
    """Draw it; else it is the likeliest."""
    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest."""
    top_k: int | None = None
    """Draw from the likeliest only, so many."""
    top_p: float | None = None
    """Draw from the likeliest only, so that their probabilities add up to this."""
    freq_penalty: float = 0.0
    """What a token's logit loses for each time that the token is there already."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not self.temperature >= 0:
            raise UserError(
                f"temperature={self.temperature} is negative or no number; give 0 for the likeliest token, or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} leaves no token; give at least 1")
        if not math.isfinite(self.freq_penalty):
            raise UserError(f"freq_penalty={self.freq_penalty} leaves no logit that can be compared; give a number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is no probability; give more than 0 and at most 1")

    def choose(
        self,
        logits: Float[Tensor, "batch vocab"],
        ids: Int[Tensor, "batch seq"],
        generator: torch.Generator | None,
    ) -> Int[Tensor, " batch"]:
        """Choose the next token of each prompt.

        Args:
            logits: What the model says of it.
            ids: The tokens so far.
            generator: Source of chance, on the CPU; None is torch's own.

        Raises:
            UserError: The logits are no numbers.
        """
        logits = logits.float()
        if not bool((logits < torch.inf).all()):  # NaN is not either; banned tokens have minus infinity
            raise UserError(
                "the model's logits hold NaN or infinity, after which no token follows; look at what the functions and "
                "SAEs in place return, or load the model with dtype=float32"
            )
        if self.freq_penalty:
            seen = torch.zeros_like(logits).scatter_add_(1, ids, torch.ones_like(ids, dtype=logits.dtype))
            logits = logits - self.freq_penalty * seen
        if not self.do_sample or self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / max(self.temperature, 1e-30)  # below that, a quotient would be infinite
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ranked, order = logits.sort(descending=True)
            before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
            logits = logits.masked_fill((before >= self.top_p).gather(1, order.argsort()), -torch.inf)
        # On the CPU, so that a seed draws the same tokens wherever the model is
        return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(ids.device)


@torch.no_grad()
def extend(
    ids: Int[Tensor, "batch seq"],
    logits: Logits,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_at: list[int],
    seed: int | None,
    verbose: bool,
) -> Int[Tensor, "batch longer"]:
    """Extend equally long prompts by tokens, each chosen after those before it.

    Args:
        ids: The prompts.
        logits: Gives the logits of what follows.
        sampling: How tokens are chosen.
        max_new_tokens: Most tokens to add.
        stop_at: Ids of the tokens that end a text: behind one, a text is filled up with it until all have ended.
        seed: Makes the choice repeatable; None draws anew.
        verbose: Show a bar.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ended: Bool[Tensor, " batch"] = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    ends = torch.tensor(stop_at, dtype=ids.dtype, device=ids.device)
    bar = progress.bar("generate", max_new_tokens * len(ids)) if verbose else None
    for _ in range(max_new_tokens):
        chosen = sampling.choose(logits(ids).to(ids.device), ids, generator)
        chosen = torch.where(ended, ids[:, -1], chosen)
        ids = torch.cat([ids, chosen[:, None]], 1)
        ended |= torch.isin(chosen, ends)
        if bar is not None:
            bar.update(len(ids))
        if stop_at and bool(ended.all()):
            break
    if bar is not None:
        bar.close()
    return ids
