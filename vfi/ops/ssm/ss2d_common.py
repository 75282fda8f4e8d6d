"""Shared functions of the fused SS2D's Triton kernels (vfi/ops/ssm/fused_ss2d.py), and their mathematics.

A sequence n = order * sequences + sequence has L = TOGETHER * H * W tokens; `_rows` and `_at_spot` compute where in the map
of pixels `[frames * H * W, width]` each lies, so that the convolution reads pixels and the norm reads tokens without any
intermediate copy. Sums, decays and states are fp32; the operands of products are of type DOT, and products of fp32 run in
PRECISION: "tf32", "tf32x3" (three products, almost fp32) or "ieee".

    pixels  --convolve, time_steps-->  x [n, L, inner], keys [n, L, B | C], steps [n, heads, L]
            --scan-->  y [n, L, inner]  --gated_norm-->  pixels

With steps dt, decays a_i = A * (dt_1 + … + dt_i) counted from the start of a chunk, and h the state [S, P] before it:

    y_i  = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) dt_j x_j  +  exp(a_i) C_i h  +  D x_i
    h'   = exp(a_Q) h + sum_j exp(a_Q - a_j) B_j (dt_j x_j)^T

Source: Mamba-2 (arXiv 2405.21060), section 6; the backward pass is the derivative of these formulas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from vfi.ops.triton.math import sigmoid

TAPS = tl.constexpr(4)  # of the causal convolution
EPSILON = tl.constexpr(1e-5)  # of the norm
# A kernel is compiled once for all frame sizes, and not again where one of these is 1 or a multiple of 16.
_SIZES = ("L", "H", "W", "sequences", "chunks_each", "first_order", "segments", "size")


def _kernel(function: Callable[..., None]) -> Any:
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _SIZES if name in names])


@triton.jit
def _pixel(spot, order, H, W):
    """Return the pixel of a frame that is read at a spot, along rows or down columns."""
    if order % 2 == 1:  # a division only where it is needed
        spot = spot % H * W + spot // H
    return spot


@triton.jit
def _rows(place, L, order, sequence, sequences, H, W, TOGETHER: tl.constexpr):
    """Return the rows of the map with the tokens at `place` of a sequence; int64, as a map may have 2^31 elements or more."""
    place = tl.where(order >= 2, L - 1 - place, place)
    frame = place % TOGETHER * sequences + sequence
    return frame.to(tl.int64) * (H * W) + _pixel(place // TOGETHER, order, H, W)


@triton.jit
def _places(frame, pixel, L, order, sequences, H, W, TOGETHER: tl.constexpr):
    """Invert `_rows`: return the sequence of a direction that reads the pixels of a frame, and the positions in it."""
    spot = tl.where(order % 2 == 1, pixel % W * H + pixel // W, pixel)
    place = spot * TOGETHER + frame // sequences
    return frame % sequences, tl.where(order >= 2, L - 1 - place, place)


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)), precise for every x: log(1 + u) of a small u is u * log(1 + u) / ((1 + u) - 1)."""
    u = tl.exp(-tl.abs(x))
    one_more = 1.0 + u
    log1p = tl.where(one_more == 1.0, u, u * tl.log(one_more) / tl.where(one_more == 1.0, 1.0, one_more - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _at_spot(spot, spots, order, H, W, stride):
    """Return the offset in a frame of the map of the pixel that a direction reads at `spot`; int64."""
    return _pixel(tl.where(order >= 2, spots - 1 - spot, spot), order, H, W).to(tl.int64) * stride


@triton.jit
def _tokens(values, token, width, channel, inside):
    """Load [tokens, channels] from [n * L, width]; zero outside."""
    return tl.load(values + token[:, None] * width + channel[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _x(x_, token, head, heads, inside, P: tl.constexpr, S: tl.constexpr, ACTIVATED: tl.constexpr):
    """Load x of a head in fp32. If not ACTIVATED, B and C are stored next to it, and all are before their SiLU."""
    width = heads * P if ACTIVATED else heads * P + 2 * S
    x = _tokens(x_, token, width, head * P + tl.arange(0, P), inside).to(tl.float32)
    return x if ACTIVATED else x * sigmoid(x)
