"""Text from a language model, token by token, with every function and SAE in place at every step.

Every step runs the model over all tokens so far, so that a function means at each step what it says, also where it
counts positions or looks at the last. Keeping keys and values from step to step is as exact only without functions, and
then it is done where the model runs without TransformerLens' bridge: each position is computed once, as it was then,
and a function would see the new positions only.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import not_taken
from saepipe.activations import BridgeHooks, Hooks
from saepipe.errors import UserError
from saepipe.hooking import ForwardPass, FunctionsAt, Put
from saepipe.prompts import Batch, Input, Prompts
from saepipe.sampling import Logits, Sampling, extend
from saepipe.splicing import Splice

Generated = Tensor | str | list[str]


class Generates(Prompts):
    """The part of a model that writes."""

    hooks: Callable[..., AbstractContextManager[Any]]
    _hooks: Hooks
    _splices: list[Splice]
    _puts: list[Put]
    _run: Callable[..., Float[Tensor, "batch seq vocab"]]
    _passing: Callable[..., ForwardPass]

    def generate(
        self,
        input: Input = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool | None = None,
        prepend_bos: bool | None = None,
        return_type: str = "input",
        verbose: bool = False,
        fwd_hooks: FunctionsAt = (),
        seed: int | None = None,
        **others: Any,
    ) -> Generated:
        """Extend prompts, with everything that is attached to the model in place at every step.

        Prompts of unequal length are extended apart, each length by itself, so that no position is one of padding.

        Args:
            input: A prompt, several, or token ids.
            max_new_tokens: Most tokens to add.
            stop_at_eos: End a text at an end-of-sequence token.
            eos_token_id: Id, or ids, of that token; None is the tokenizer's.
            do_sample: Draw each token; else take the likeliest.
            top_k: Draw from the likeliest only, so many.
            top_p: Draw from the likeliest only, so that their probabilities add up to this.
            temperature: What logits are divided by; 0 takes the likeliest.
            freq_penalty: What a token's logit loses for each time that the token is there already.
            use_past_kv_cache: Keep keys and values from step to step. None does so where it is exact: where no function
                and no SAE is in place. With True, they see the new positions only, at each step.
            prepend_bos: Whether text begins with the beginning-of-sequence token; None is the model's habit.
            return_type: `str`, `tokens` (shorter ones padded on the left), or `input` for what the input is.
            verbose: Show a bar.
            fwd_hooks: Functions at hook points, beside those that are there already; see `hooks`.
            seed: Makes the choice repeatable; None draws anew.
            **others: Arguments of TransformerLens' that have no meaning here, which say what to do instead.

        Returns:
            Prompts and what follows; text without the beginning-of-sequence token, and up to its end.

        Raises:
            UserError: Prompt and new tokens are longer than the context, or a value has no meaning.
        """
        not_taken.refuse("generate", others, not_taken.GENERATE, _OWN)
        if return_type not in ("input", "str", "tokens"):
            raise UserError(f"return_type={return_type} is not known; give input, str or tokens")
        sampling = Sampling(do_sample, temperature, top_k, top_p, freq_penalty)
        batch = self.read(input, prepend_bos=prepend_bos)
        self._check_room(batch, max_new_tokens)
        ends = self._ends(eos_token_id) if stop_at_eos else []
        rows: dict[int, list[int]] = {}
        with self.hooks(fwd_hooks=fwd_hooks):
            keeps = self._keeps(use_past_kv_cache)
            for length in sorted(set(batch.lengths)):  # one token first: `Steer` takes it for a next one elsewhere
                which = [row for row, its in enumerate(batch.lengths) if its == length]
                logits = self._going_on() if keeps else lambda ids: self._run(ids)[:, -1]
                longer = extend(
                    batch.ids[which, :length],
                    logits,
                    sampling,
                    max_new_tokens=max_new_tokens,
                    stop_at=ends,
                    seed=seed,
                    verbose=verbose,
                )
                rows |= dict(zip(which, longer.tolist(), strict=True))
        ordered = [rows[row] for row in range(len(rows))]
        is_text = not isinstance(input, Tensor) and (isinstance(input, str) or isinstance(input[0], str))
        if return_type == "tokens" or (return_type == "input" and not is_text):
            return self._padded(ordered)
        begin = self.tokenizer.bos_token_id
        texts = [
            self.tokenizer.decode(_ended(row, length, ends)[int(row[0] == begin) :])
            for row, length in zip(ordered, batch.lengths, strict=True)
        ]
        return texts[0] if isinstance(input, str) or (len(texts) == 1 and not is_text) else texts

    def _check_room(self, batch: Batch, max_new_tokens: int) -> None:
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens={max_new_tokens} is negative; give 0 or more")
        longest = max(batch.lengths)
        if self.context_limit is not None and longest + max_new_tokens > self.context_limit:
            raise UserError(
                f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens is more than the "
                f"{self.context_limit} that {self.model_name} can read; give at most {self.context_limit - longest}"
            )

    def _ends(self, given: int | Sequence[int] | None) -> list[int]:
        ends = self.tokenizer.eos_token_id if given is None else given
        if ends is None:
            raise UserError(
                "stop_at_eos=True needs an end-of-sequence token, which the tokenizer lacks; give eos_token_id, or "
                "stop_at_eos=False"
            )
        return [ends] if isinstance(ends, int) else list(ends)

    def _keeps(self, wanted: bool | None) -> bool:
        """Say whether keys and values are kept."""
        bridged = isinstance(self._hooks, BridgeHooks)
        if wanted and bridged:
            raise UserError(
                "use_past_kv_cache=True is not for a model that runs through TransformerLens' bridge; leave it out, or "
                "use load_model without compatibility_mode"
            )
        return not (bridged or self._puts or self._splices) if wanted is None else wanted

    def _going_on(self) -> Logits:
        """Return what gives the logits of each next token, and keeps keys and values from one to the next."""
        past: Any = None
        done = 0

        def logits(ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch vocab"]:
            nonlocal past, done
            new = ids[:, done:]
            assert not isinstance(self._hooks, BridgeHooks)
            out, past = self._hooks.go_on(new, self._passing(new).functions(), past)
            done = ids.shape[1]
            return out[:, -1]

        return logits

    def _padded(self, rows: list[list[int]]) -> Int[Tensor, "batch longest"]:
        """Put texts side by side, so that all end at once."""
        longest = max(len(row) for row in rows)
        padded = [[*[self.padding_id] * (longest - len(row)), *row] if len(row) < longest else row for row in rows]
        return torch.tensor(padded, device=self._hooks.device)


_OWN = [name for name in Generates.generate.__annotations__ if name not in ("others", "return")]


def _ended(row: list[int], length: int, ends: Sequence[int]) -> list[int]:
    """Cut what a text that ended early was filled up with."""
    stop = next((place for place in range(length, len(row)) if row[place] in ends), len(row))
    return row[: stop + 1]
