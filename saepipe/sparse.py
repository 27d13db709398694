"""Sparse steps of an autoencoder with few active latents: a step's five dense products fall to one.

Only the product that finds the largest is dense. Decoding and every gradient touch a few rows of the weights per token,
as many for each or, with `offsets`, not: then the rows of all tokens stand one after the other, and `offsets` tells
where each token's begin. All of these are sums over bags of rows, so PyTorch's `embedding_bag` does them: its backward
sorts the indices and sums each segment in order, without atomics, so the result does not depend on the number of
threads. On 2 cores with d_in 512, d_sae 4096, 2048 tokens and k 32, where the dense product takes 57 ms, decoding took
2 ms, a gradient to the weights 9 ms and a gradient to the values 8 ms (`index_add_`: 33 ms; gathered rows and `einsum`:
72 ms). Float32 on CUDA has kernels of our own instead, in `saepipe.sparse_triton`, where Triton is installed.

Architectures that keep the largest latents are always sparse. Those with thresholds are where `few` finds few enough
above them, batch by batch: as both ways have the same sums, nothing but rounding depends on which it is.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_GROUP = 32
"""Columns that `largest` looks at as one: sqrt(d_sae / k) leaves the fewest maxima and columns to look at."""


def largest(values: Float[Tensor, "token d_sae"], k: int) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Find the k largest values of each token, in any order, and which they are; without a gradient.

    On CUDA they are looked for in the k groups of columns with the largest maxima: but for ties, no other group can
    hold one. 64 of 65,536 in bfloat16 for 4,096 tokens took 0.7 ms on an H100, `topk` 2.0 ms. On a CPU this takes 0.6
    to 0.85 of `topk`'s time, at most a tenth of a step, which is not worth it.

    Args:
        values: What to look at.
        k: How many.
    """
    d_sae = values.shape[1]
    if values.device.type != "cuda" or d_sae % _GROUP or d_sae < 4 * _GROUP * k:
        found = values.topk(k, sorted=False)
        return found.values, found.indices
    return largest_by_groups(values, k)


def largest_by_groups(
    values: Float[Tensor, "token d_sae"], k: int
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Do what `largest` does on CUDA.

    Args:
        values: What to look at; whole groups.
        k: How many; no more than there are groups.
    """
    # A group's columns lie far apart, so that neighbouring threads read neighbours: ten times as fast as rows of 32.
    grouped = values.unflatten(1, (_GROUP, -1))
    groups = grouped.amax(1).topk(k, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None, :].expand(-1, _GROUP, -1)).flatten(1)
    found = candidates.topk(k, sorted=False)
    return found.values, found.indices // k * grouped.shape[2] + groups.gather(1, found.indices % k)


FEW = 0.02
"""Share of the pre-activations, as a sample tells it, up to which a CPU is faster with sparse gradients: these take
time for each active latent, dense products for each latent (docs/training.md has a table)."""
_SAMPLED = 2**20
"""Pre-activations up to which all are counted, not a sample."""


@dataclass(frozen=True)
class Entries:
    """Some entries of a tensor [token, d_sae], one token's after the other's."""

    values: Float[Tensor, " entry"]
    """What stands there, without a gradient."""
    tokens: Int[Tensor, " entry"]
    """The token of each."""
    indices: Int[Tensor, " entry"]
    """The latent of each."""
    offsets: Int[Tensor, " token"]
    """Number of each token's first entry."""

    @classmethod
    def at(cls, values: Float[Tensor, "token d_sae"], places: Int[Tensor, " entry"]) -> "Entries":
        """Take those at ascending places of the flattened tensor."""
        n_tokens, d_sae = values.shape
        first = torch.arange(n_tokens, device=places.device) * d_sae
        return cls(
            values.detach().flatten()[places], places // d_sae, places % d_sae, torch.searchsorted(places, first)
        )

    def sum_by_token(self, each: Float[Tensor, " entry"]) -> Float[Tensor, " token"]:
        """Sum what belongs to each token's entries."""
        return each.new_zeros(len(self.offsets)).index_add(0, self.tokens, each)

    def sum_by_latent(self, each: Float[Tensor, " entry"], d_sae: int) -> Float[Tensor, " d_sae"]:
        """Sum what belongs to each latent's entries."""
        return each.new_zeros(d_sae).index_add(0, self.indices, each)


def few(values: Float[Tensor, "token d_sae"], least: float | Float[Tensor, " d_sae"] = 0.0) -> Entries | None:
    """Find what is above a threshold, where that is few enough for sparse gradients to be the faster ones.

    On CUDA, the host would have to wait for their number in every step, and a compiled loss has one way only. What is
    not a number counts as above, so that the loss is none either and is noticed.

    Args:
        values: Where to look.
        least: The threshold, or each latent's.

    Returns:
        The entries; None where a dense step is better.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    values = values.detach()
    step = _sample_step(values)
    sample, theirs = values.flatten()[::step], least
    if isinstance(theirs, Tensor):
        theirs = theirs[torch.arange(0, values.numel(), step) % len(theirs)]
    if len(sample) - int((sample <= theirs).sum()) > FEW * len(sample):
        return None
    above = (values <= least).logical_not_()
    return Entries.at(values, above.flatten().nonzero().squeeze(1))


def _sample_step(values: Tensor) -> int:
    """Choose a prime that does not divide d_sae, so that a sample does not keep to some latents."""
    if values.numel() <= _SAMPLED:
        return 1
    return 257 if values.shape[1] % 257 else 263


def scaled(
    rows: Float[Tensor, "d_sae width"], factors: Float[Tensor, " d_sae"], dtype: torch.dtype
) -> Float[Tensor, "d_sae width"]:
    """Multiply each row by a factor, into another type at once; without a gradient.

    Args:
        rows: The rows.
        factors: One for each.
        dtype: The result's type, to which it is rounded once.
    """
    if _has_kernels(rows):
        from saepipe import sparse_triton

        return sparse_triton.scaled(rows, factors, dtype)
    return torch.mul(rows, factors[:, None], out=torch.empty_like(rows, dtype=dtype))


def decode(
    values: Float[Tensor, "*kept"],
    indices: Int[Tensor, "*kept"],
    rows: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, " token"] | None = None,
) -> Float[Tensor, "token d_out"]:
    """Sum of `values` times the `indices`-th `rows`, differentiable in values and rows.

    Args:
        values: Activations of the latents, of the type of `rows` (autocast does not reach here).
        indices: Which latents they are: k for each token, or as many as `offsets` tells.
        rows: Decoder weights.
        offsets: Number of the first value of each token.
    """
    if _has_kernels(rows):
        from saepipe import sparse_triton

        return sparse_triton.decode(values, indices, rows, offsets)
    return functional.embedding_bag(indices, rows, offsets, per_sample_weights=values, mode="sum")


def product(
    x: Float[Tensor, "token d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"] | None,
    centre: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "token d_sae"]:
    """Return `x @ rows.T + bias`, with a gradient that spares a product.

    Args:
        x: Input of the encoder, which gets no gradient itself.
        rows: Encoder weights, one latent a row.
        bias: Encoder biases; None where there are none.
        centre: As `select` takes it.
    """
    return _Product.apply(x, rows, bias, centre)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, bias: Tensor | None, centre: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, rows)
        ctx.biased, ctx.centred = bias is not None, centre is not None
        kind = x.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        return functional.linear(x, rows, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows = ctx.saved_tensors
        with torch.autocast(rows.device.type, **ctx.autocast):
            grad_rows = (grad.T @ x).to(rows.dtype)
        grad_bias = grad.sum(0, dtype=rows.dtype)
        grad_centre = _of_centre(grad_bias, rows) if ctx.centred else None
        return None, grad_rows, grad_bias if ctx.biased else None, grad_centre


def _of_centre(grad_bias: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient of what was subtracted from every input.

    It is the sum of the tokens' own, to which each latent's row contributes as to its bias: one product of a vector,
    where a row for each token takes as long as decoding.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return -(grad_bias @ rows)


def select(
    pre: Float[Tensor, "*kept"],
    indices: Int[Tensor, "*kept"],
    x: Float[Tensor, "token d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"] | None,
    offsets: Int[Tensor, " token"] | None = None,
    centre: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, "*kept"]:
    """Give pre-activations, known already, the gradient of `x @ rows[indices].T + bias[indices]`.

    Args:
        pre: The pre-activations, found without a gradient.
        indices: Which latents they are.
        x: Input of the encoder, which gets no gradient itself.
        rows: Encoder weights, one latent a row.
        bias: Encoder biases; None where there are none.
        offsets: As `decode` takes them.
        centre: What was subtracted from every row of `x`, and gets its gradient.
    """
    return _Select.apply(pre, indices, x, rows, bias, offsets, centre)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        indices: Tensor,
        x: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        offsets: Tensor | None,
        centre: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(indices, x, rows, offsets)
        ctx.biased, ctx.centred = bias is not None, centre is not None
        return pre.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, x, rows, offsets = ctx.saved_tensors
        grad_rows, grad_bias = _sums_by_latent(grad, indices, x, rows, offsets)
        grad_centre = _of_centre(grad_bias, rows) if ctx.centred else None
        return None, None, None, grad_rows, grad_bias if ctx.biased else None, None, grad_centre


def _sums_by_latent(
    values: Tensor, indices: Tensor, x: Tensor, rows: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum values[t, i] * x[t], and the values alone, over the places with indices[t, i] = j, for each row j of `rows`.

    The sums are what the gradient of decoding is to its rows, whatever they are.
    """
    if _has_kernels(rows):
        from saepipe import sparse_triton

        places = sparse_triton.Places.of(indices, offsets, len(rows))
        return sparse_triton.sum_by_latent(values.flatten(), places, x)
    found: list[Tensor] = []
    for width, each in ((rows.shape[1], x), (1, torch.ones_like(x[:, :1]))):
        with torch.enable_grad():
            like = rows[:, :width].detach().requires_grad_()
            decoded = decode(values, indices, like, offsets)
        found += torch.autograd.grad(decoded, like, each)
    return found[0], found[1][:, 0]


def _has_kernels(rows: Tensor) -> bool:
    return rows.device.type == "cuda" and rows.dtype == torch.float32 and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
