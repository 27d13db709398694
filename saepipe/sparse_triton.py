"""The sparse step on CUDA: Triton kernels that gather rows, and sum them by token or by latent.

Every sum has one writer and a fixed order, whatever the device does first: pairs of a token and a latent are sorted by
latent (stably), and a latent's gradient row is the sum of its segment. No float is added atomically, no block size is
chosen by a timing, so a rerun gives the same bits. Sums are float32.

What limits these kernels is how often a row of the weights, which are larger than any cache, comes from memory. Tokens
are therefore worked through for a few columns at a time, as wide a part of all rows as the cache holds, and gradients
of activations in the order of the latents, so that each row is read once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, no_type_check

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

# Sizes were chosen on an H100 at d_in 2304, d_sae 65536, 4096 tokens, k 64; another choice gives other last bits.
_PLACES = 16
"""Rows that a program gathers at once, to hide how long each takes."""
_FEW_PLACES = 4
_COLUMNS = 128
_LATENT_COLUMNS = 256
_LATENT_PLACES = 8
"""Of a latent's rows, of which there are 4 on average, but thousands of a few latents: those take half as long as with
_FEW_PLACES at once; then the rest, _FEW_PLACES at once."""
_SCALED_COLUMNS = 4096


@dataclass(frozen=True)
class Places:
    """Which latents each token has: pairs of a token and a latent, token by token."""

    indices: Int[Tensor, " pair"]
    """The latent of each pair."""
    bounds: Int[Tensor, " token_and_one"]
    """Number of each token's first pair, and of pairs."""
    d_sae: int

    @classmethod
    def of(cls, indices: Int[Tensor, "*kept"], offsets: Int[Tensor, " token"] | None, d_sae: int) -> "Places":
        """Take them as `sparse.decode` does."""
        if offsets is None:
            bounds = torch.arange(0, indices.numel() + 1, indices.shape[1], device=indices.device)
        else:
            bounds = torch.cat([offsets, offsets.new_full((1,), indices.numel())])
        return cls(indices.flatten(), bounds, d_sae)

    @cached_property
    def tokens(self) -> Int[Tensor, " pair"]:
        """The token of each pair."""
        pairs = torch.arange(len(self.indices), device=self.indices.device)
        return torch.searchsorted(self.bounds, pairs, right=True) - 1

    @cached_property
    def by_latent(self) -> "ByLatent":
        """The pairs in the order of their latents."""
        latents, order = self.indices.int().sort(stable=True)
        wanted = torch.arange(self.d_sae + 1, dtype=torch.int32, device=latents.device)
        return ByLatent(order, latents, self.tokens[order], torch.searchsorted(latents, wanted))


class ByLatent(NamedTuple):
    """Pairs in the order of their latents, and of a latent's tokens."""

    order: Int[Tensor, " pair"]
    """Number of each among the pairs."""
    latents: Int[Tensor, " pair"]
    tokens: Int[Tensor, " pair"]
    starts: Int[Tensor, " latent_and_one"]
    """Where each latent's begin, and how many there are."""


def decode(
    values: Float[Tensor, "*kept"],
    indices: Int[Tensor, "*kept"],
    rows: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, " token"] | None = None,
) -> Float[Tensor, "token d_out"]:
    """Do what `sparse.decode` says."""
    return _Decode.apply(values, rows, Places.of(indices, offsets, len(rows)))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(values, rows)
        ctx.places = places
        return sum_by_token(values.flatten(), places, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, rows = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = products(grad, ctx.places, rows).view_as(values) if ctx.needs_input_grad[0] else None
        grad_rows = sum_by_latent(values.flatten(), ctx.places, grad)[0] if ctx.needs_input_grad[1] else None
        return grad_values, grad_rows, None


def sum_by_token(
    values: Float[Tensor, " pair"], places: Places, rows: Float[Tensor, "d_sae width"]
) -> Float[Tensor, "token width"]:
    """Sum of each token's values times their latents' rows."""
    tokens, width = len(places.bounds) - 1, rows.shape[1]
    out = rows.new_empty(tokens, width)
    _sum_by_token[tokens, triton.cdiv(width, _COLUMNS)](
        values.contiguous(),
        places.indices,
        places.bounds,
        rows.contiguous(),
        out,
        width,
        _COLUMNS,
        _FEW_PLACES,
        num_warps=2,
    )
    return out


def sum_by_latent(
    values: Float[Tensor, " pair"], places: Places, x: Float[Tensor, "token width"]
) -> tuple[Float[Tensor, "d_sae width"], Float[Tensor, " d_sae"]]:
    """Sum of each latent's values times their tokens' rows of `x`, and of the values alone."""
    pairs, width = places.by_latent, x.shape[1]
    out, sums = x.new_empty(places.d_sae, width), x.new_empty(places.d_sae)
    _sum_by_latent[places.d_sae, triton.cdiv(width, _LATENT_COLUMNS)](
        values[pairs.order],
        pairs.tokens,
        pairs.starts,
        x.contiguous(),
        out,
        sums,
        width,
        _LATENT_COLUMNS,
        _LATENT_PLACES,
        _FEW_PLACES,
        num_warps=1,
    )
    return out, sums


def products(
    x: Float[Tensor, "token width"], places: Places, rows: Float[Tensor, "d_sae width"]
) -> Float[Tensor, " pair"]:
    """Dot product of each pair's row of `x` and row of the weights."""
    pairs, width = places.by_latent, x.shape[1]
    out, n = x.new_empty(len(pairs.order)), len(pairs.order)
    _products[(triton.cdiv(n, _PLACES),)](
        x.contiguous(), *pairs[:3], rows.contiguous(), out, n, width, _COLUMNS, _PLACES
    )
    return out


def scaled(
    rows: Float[Tensor, "d_sae width"], factors: Float[Tensor, " d_sae"], dtype: torch.dtype
) -> Float[Tensor, "d_sae width"]:
    """Multiply each row by a factor, into another type: a pass at the rate of a copy, of which PyTorch reaches half."""
    out = torch.empty_like(rows, dtype=dtype)
    width = rows.shape[1]
    _scaled[len(rows), triton.cdiv(width, _SCALED_COLUMNS)](rows.contiguous(), factors, out, width, _SCALED_COLUMNS)
    return out


@triton.jit
@no_type_check
def _sum_by_token(values, indices, bounds, rows, out, width, COLUMNS: tl.constexpr, PLACES: tl.constexpr):  # noqa: ANN001, ANN202
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(bounds + token), tl.load(bounds + token + 1)
    total = tl.zeros((PLACES, COLUMNS), tl.float32)
    for first in range(begin, end, PLACES):
        pairs = first + tl.arange(0, PLACES)
        there = pairs < end
        value = tl.load(values + pairs, there, 0.0)
        latent = tl.load(indices + pairs, there, 0).to(tl.int64)
        mask = there[:, None] & (columns < width)[None, :]
        total += value[:, None] * tl.load(rows + latent[:, None] * width + columns[None, :], mask, 0.0)
    tl.store(out + token * width + columns, tl.sum(total, 0), columns < width)


@triton.jit
@no_type_check
def _sum_by_latent(  # noqa: ANN202
    values,  # noqa: ANN001
    tokens,  # noqa: ANN001
    starts,  # noqa: ANN001
    x,  # noqa: ANN001
    out,  # noqa: ANN001
    sums,  # noqa: ANN001
    width,  # noqa: ANN001
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    FEW_PLACES: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    whole = begin + (end - begin) // PLACES * PLACES
    total, plain = tl.zeros((COLUMNS,), tl.float32), 0.0
    for first in range(begin, whole, PLACES):
        at = first + tl.arange(0, PLACES)
        value, token = tl.load(values + at), tl.load(tokens + at)
        some = tl.load(x + token[:, None] * width + columns[None, :], (columns < width)[None, :], 0.0)
        total += tl.sum(value[:, None] * some, 0)
        plain += tl.sum(value, 0)
    for first in range(whole, end, FEW_PLACES):
        at = first + tl.arange(0, FEW_PLACES)
        value, token = tl.load(values + at, at < end, 0.0), tl.load(tokens + at, at < end, 0)
        mask = (at < end)[:, None] & (columns < width)[None, :]
        some = tl.load(x + token[:, None] * width + columns[None, :], mask, 0.0)
        total += tl.sum(value[:, None] * some, 0)
        plain += tl.sum(value, 0)
    tl.store(out + latent * width + columns, total, columns < width)
    if tl.program_id(1) == 0:
        tl.store(sums + latent, plain)


@triton.jit
@no_type_check
def _products(x, order, latents, tokens, rows, out, n, width, COLUMNS: tl.constexpr, PLACES: tl.constexpr):  # noqa: ANN001, ANN202
    at = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    token = tl.load(tokens + at, at < n, 0)
    latent = tl.load(latents + at, at < n, 0).to(tl.int64)
    total = tl.zeros((PLACES, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = (at < n)[:, None] & (columns < width)[None, :]
        left = tl.load(x + token[:, None] * width + columns[None, :], mask, 0.0)
        total += left * tl.load(rows + latent[:, None] * width + columns[None, :], mask, 0.0)
    tl.store(out + tl.load(order + at, at < n, 0), tl.sum(total, 1), at < n)


@triton.jit
@no_type_check
def _scaled(rows, factors, out, width, COLUMNS: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(rows + row * width + columns, columns < width, 0.0) * tl.load(factors + row)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), columns < width)
