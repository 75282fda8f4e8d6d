"""Gated window attention without copies: one fused Triton kernel forward and one backward, in place on the map.

The windows are index arithmetic: tokens outside the frame are masked, and nothing is padded or rearranged. Every sum is
computed inside one program, in a fixed order, and every gradient is written once, so the results are bitwise reproducible. A
program handles a whole window of one head, and the backward pass needs only the input. A window of more than 64 tokens would
not fit into registers: several programs share it, for which the output and the logarithms of the softmax sums are kept.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vfi.ops.triton import launch_config
from vfi.ops.triton.math import LOG2_E, sigmoid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gated_window_attention_fused(projected: Tensor, heads: int, head_dim: int, window: int, shift: int) -> Tensor:
    """Compute `gated_window_attention` of the parts of one projection.

    Args:
        projected: `[B, H, W, 3 * C + g]` in bf16, fp16 or fp32, with C = heads * head_dim: queries, keys, values and logits of
            the gate one after another, each `[heads, d]`. g is 0 (no gate), heads (headwise) or C (elementwise). It is read in
            place, also as a slice of the last dimension of a wider map.
        head_dim: 16, 32 or 64.
        shift: the grid of windows starts this many tokens above and left of the frame, 0 … window - 1.

    Returns:
        `[B, H, W, C]`.
    """
    if projected.dtype not in DTYPES:
        raise TypeError(f"fused window attention takes bf16, fp16 or fp32 and was given {projected.dtype}")
    gate_width, rest = divmod(projected.shape[-1] - 3 * heads * head_dim, heads)
    if rest or gate_width not in (0, 1, head_dim):
        raise ValueError(f"{projected.shape[-1]} channels are not q, k, v and a gate of {heads} heads of {head_dim}")
    return _Fused.apply(projected, heads, head_dim, window, shift)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, heads: int, head_dim: int, window: int, shift: int) -> Tensor:
        ctx.layout = heads, head_dim, window, shift
        out = projected.new_empty(*projected.shape[:3], heads * head_dim)
        in_parts = ctx.needs_input_grad[0] and backward_tiles(window, head_dim, projected.dtype).tokens < window**2
        log_sums = projected.new_empty(*projected.shape[:3], heads, dtype=torch.float32) if in_parts else None
        tiles = forward_tiles(window, head_dim, projected.dtype)
        _launch(window_attention_forward, tiles, (projected, out), (log_sums,), *ctx.layout)
        ctx.save_for_backward(projected, *((out, log_sums) if in_parts else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, *kept = ctx.saved_tensors
        _, head_dim, window, _ = ctx.layout
        d_projected = projected.new_empty(projected.shape)
        tiles = backward_tiles(window, head_dim, projected.dtype)
        if kept:
            out, log_sums = kept
            _launch(window_attention_backward_in_parts, tiles, (projected, grad, d_projected, out), (log_sums,), *ctx.layout)
        else:
            _launch(window_attention_backward, tiles, (projected, grad, d_projected), (), *ctx.layout)
        return d_projected, None, None, None, None


class Tiles(NamedTuple):
    """Default launch of a kernel on a GPU without tuned configurations: a program handles `tokens` of a window at a time."""

    tokens: int
    num_warps: int
    num_stages: int


def forward_tiles(window: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Return the default launch of the forward kernel.

    fp32 without TF32 has no tensor cores and holds whole operands in registers: it gets more warps or fewer tokens.
    """
    if dtype != torch.float32:
        return Tiles(_tokens_up_to(64, window), num_warps=4, num_stages=2)
    if head_dim < 64:
        return Tiles(_tokens_up_to(64, window), num_warps=8, num_stages=1)
    return Tiles(_tokens_up_to(32, window), num_warps=4, num_stages=1)


def backward_tiles(window: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Return the default launch of the backward kernels.

    Whole windows of up to 64 tokens if they fit into registers, else parts. No program needs 64 KiB of shared memory.
    """
    if dtype != torch.float32:
        in_registers = window <= 8 or head_dim < 64
        return Tiles(_tokens_up_to(64 if in_registers else 32, window), num_warps=4, num_stages=2)
    if window <= 8 and head_dim < 64:
        return Tiles(_tokens_up_to(64, window), num_warps=8, num_stages=1)
    return Tiles(_tokens_up_to(32, window), num_warps=4 if head_dim < 64 else 8, num_stages=1)


def _tokens_up_to(most: int, window: int) -> int:
    """Return a power of two, at most `most` and at least 16, the minimum for a tensor core."""
    return min(most, max(16, triton.next_power_of_2(window**2)))


def _launch(
    kernel: Any,
    tiles: Tiles,
    maps: tuple[Tensor, ...],
    others: tuple[Tensor | None, ...],
    heads: int,
    head_dim: int,
    window: int,
    shift: int,
) -> None:
    """Run a kernel over the parts of every head of every window. `maps`: `[B, H, W, …]` each, the projection first."""
    B, H, W, channels = maps[0].shape
    gate_width = channels // heads - 3 * head_dim
    tf32 = maps[0].dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    shape_class = maps[0].dtype, window, head_dim, gate_width, tf32
    default = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if kernel is not window_attention_backward:  # that one handles a whole window
        default["TOKENS"] = tiles.tokens
    options = launch_config.configuration(kernel.__name__, shape_class, default, maps[0].device)
    tokens = options.get("TOKENS", tiles.tokens)
    pixels = [_pixels(t) for t in maps]
    strides = [t.stride(0) for t in pixels]
    unit = math.gcd(16, *strides)  # a compile-time constant, so that the compiler can use 16-byte loads
    down, across = -(-(H + shift) // window), -(-(W + shift) // window)
    parts = -(-(window**2) // tokens)
    with torch.cuda.device_of(maps[0]):
        kernel[(B * down * across * heads * parts,)](
            *pixels,
            *others,
            *(stride // unit for stride in strides),
            *(heads, H, W, down, across, shift),
            UNIT=unit,
            WINDOW=window,
            HEAD_DIM=head_dim,
            GATE_WIDTH=gate_width,
            SCALE=head_dim**-0.5,
            PRECISION="tf32" if tf32 else "ieee",
            **options | {"TOKENS": tokens},
        )


def _pixels(t: Tensor) -> Tensor:
    """Reshape `[B, H, W, channels]` to `[B * H * W, channels]`: a view if pixels are evenly spaced and channels adjacent."""
    pixels = t.flatten(0, 2)
    return pixels if pixels.stride(-1) == 1 else pixels.contiguous()


@triton.jit
def _place(heads, H, W, down, across, shift, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    """Return this program's first token, head, first pixel of the frame, and top left of its window. Heads are adjacent."""
    PARTS: tl.constexpr = (WINDOW * WINDOW + TOKENS - 1) // TOKENS
    place = tl.program_id(0)
    start, place = (place % PARTS) * TOKENS, place // PARTS
    head, place = place % heads, place // heads
    left, place = (place % across) * WINDOW - shift, place // across
    top, frame = (place % down) * WINDOW - shift, place // down
    return start, head, frame.to(tl.int64) * H * W, top, left


@triton.jit
def _pixel(start, first, top, left, H, W, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    """Return the pixels `[TOKENS]` of tokens of a window, from its token `start` on, and whether they are in the frame."""
    token = start + tl.arange(0, TOKENS)
    row, column = top + token // WINDOW, left + token % WINDOW
    inside = (token < WINDOW * WINDOW) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return first + row.to(tl.int64) * W + column, inside


@triton.jit
def _read(at, inside):
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def _write(at, value, inside):
    tl.store(at, value.to(at.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _read_gate(row, C, head, lane, inside, GATE_WIDTH: tl.constexpr):
    """Load the gate's logits, `[TOKENS, 1]` or `[TOKENS, HEAD_DIM]`."""
    if GATE_WIDTH == 1:
        gate = tl.load(row + 3 * C + head, mask=inside, other=0.0)[:, None]
    else:
        gate = _read(row[:, None] + 3 * C + lane, inside)
    return gate


@triton.jit
def _scores(q, k, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """Compute the scores `[queries, keys]` in fp32, scaled for exp2, which is a hardware instruction."""
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2_E)


@triton.jit(do_not_specialize=["heads", "H", "W", "down", "across", "shift"])
def window_attention_forward(
    projected,
    out,
    log_sums,
    projected_stride,
    out_stride,
    heads,
    H,
    W,
    down,
    across,
    shift,
    UNIT: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, head, first, top, left = _place(heads, H, W, down, across, shift, WINDOW, TOKENS)
    C = heads * HEAD_DIM
    lane = head * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    pixel, asked = _pixel(start, first, top, left, H, W, WINDOW, TOKENS)
    row = projected + pixel * (projected_stride * UNIT)
    if GATE_WIDTH > 0:
        gate = _read_gate(row, C, head, lane, asked, GATE_WIDTH)
    q = _read(row[:, None] + lane, asked)
    highest = tl.full((TOKENS,), -1e38, tl.float32)  # not -inf, which would remain for a part of a window without any token
    total = tl.full((TOKENS,), 0.0, tl.float32)
    y = tl.full((TOKENS, HEAD_DIM), 0.0, tl.float32)
    for other in range(0, WINDOW * WINDOW, TOKENS):
        key, inside = _pixel(other, first, top, left, H, W, WINDOW, TOKENS)
        at = projected + key[:, None] * (projected_stride * UNIT) + lane
        k, v = _read(at + C, inside), _read(at + 2 * C, inside)
        scores = tl.where(inside[None, :], _scores(q, k, SCALE, PRECISION), float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(scores, axis=1))
        p, keep = tl.exp2(scores - highest[:, None]), tl.exp2(before - highest)
        total = total * keep + tl.sum(p, axis=1)
        y = tl.dot(p.to(v.dtype), v, y * keep[:, None], input_precision=PRECISION)
    y /= total[:, None]
    if GATE_WIDTH > 0:
        y *= sigmoid(gate.to(tl.float32))
    _write(out + pixel[:, None] * (out_stride * UNIT) + lane, y, asked)
    if log_sums is not None:
        tl.store(log_sums + pixel * heads + head, highest + tl.log2(total), mask=asked)


@triton.jit(do_not_specialize=["heads", "H", "W", "down", "across", "shift"])
def window_attention_backward(
    projected,
    grad,
    d_projected,
    projected_stride,
    grad_stride,
    d_projected_stride,
    heads,
    H,
    W,
    down,
    across,
    shift,
    UNIT: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of a whole window in each program.

    y = s o, o = P v, s = sigmoid(gate): dv = P^T s dy, dscores = P (s dy v^T - s dy . o).
    """
    start, head, first, top, left = _place(heads, H, W, down, across, shift, WINDOW, TOKENS)
    C = heads * HEAD_DIM
    lane = head * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    pixel, inside = _pixel(start, first, top, left, H, W, WINDOW, TOKENS)
    row = projected + pixel * (projected_stride * UNIT)
    d_row = d_projected + pixel * (d_projected_stride * UNIT)
    at, d_at = row[:, None] + lane, d_row[:, None] + lane
    q, k, v = _read(at, inside), _read(at + C, inside), _read(at + 2 * C, inside)
    dy = _read(grad + pixel[:, None] * (grad_stride * UNIT) + lane, inside)
    if GATE_WIDTH > 0:
        gate = _read_gate(row, C, head, lane, inside, GATE_WIDTH)

    scores = tl.where(inside[None, :], _scores(q, k, SCALE, PRECISION), float("-inf"))
    p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    p /= tl.sum(p, axis=1)[:, None]
    if GATE_WIDTH > 1:
        s = sigmoid(gate.to(tl.float32))
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        _write(d_at + 3 * C, dy * o * s * (1 - s), inside)
        dy = (dy * s).to(v.dtype)
    dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
    mean = tl.sum(p * dp, axis=1)[:, None]  # the product of dy and o
    if GATE_WIDTH == 1:
        s = sigmoid(gate.to(tl.float32))
        _write(d_row[:, None] + 3 * C + head, mean * s * (1 - s), inside)
        p *= s
    d_scores = (p * (dp - mean)).to(v.dtype)
    dq = tl.dot(d_scores, k, input_precision=PRECISION) * SCALE
    dk = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION) * SCALE
    dv = tl.dot(tl.trans(p.to(v.dtype)), dy, input_precision=PRECISION)
    _write(d_at, dq, inside)
    _write(d_at + C, dk, inside)
    _write(d_at + 2 * C, dv, inside)


@triton.jit(do_not_specialize=["heads", "H", "W", "down", "across", "shift"])
def window_attention_backward_in_parts(
    projected,
    grad,
    d_projected,
    out,
    log_sums,
    projected_stride,
    grad_stride,
    d_projected_stride,
    out_stride,
    heads,
    H,
    W,
    down,
    across,
    shift,
    UNIT: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute `window_attention_backward` for some tokens of a window: as queries and as keys of all others."""
    start, head, first, top, left = _place(heads, H, W, down, across, shift, WINDOW, TOKENS)
    C = heads * HEAD_DIM
    lane = head * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    pixel, asked = _pixel(start, first, top, left, H, W, WINDOW, TOKENS)
    row = projected + pixel * (projected_stride * UNIT)
    d_row = d_projected + pixel * (d_projected_stride * UNIT)
    at, d_at = row[:, None] + lane, d_row[:, None] + lane
    q, k, v = _read(at, asked), _read(at + C, asked), _read(at + 2 * C, asked)
    log_sum = tl.load(log_sums + pixel * heads + head, mask=asked, other=0.0)[:, None]
    do = _read(grad + pixel[:, None] * (grad_stride * UNIT) + lane, asked)
    product = do * _read(out + pixel[:, None] * (out_stride * UNIT) + lane, asked).to(tl.float32)
    mean = tl.sum(product, axis=1)[:, None]
    if GATE_WIDTH > 0:
        s = sigmoid(_read_gate(row, C, head, lane, asked, GATE_WIDTH).to(tl.float32))
        if GATE_WIDTH == 1:
            _write(d_row[:, None] + 3 * C + head, mean * (1 - s), asked)
        else:
            _write(d_at + 3 * C, product * (1 - s), asked)
        do = (do * s).to(v.dtype)

    dq = tl.full((TOKENS, HEAD_DIM), 0.0, tl.float32)
    dk = tl.full((TOKENS, HEAD_DIM), 0.0, tl.float32)
    dv = tl.full((TOKENS, HEAD_DIM), 0.0, tl.float32)
    for other in range(0, WINDOW * WINDOW, TOKENS):
        far, inside = _pixel(other, first, top, left, H, W, WINDOW, TOKENS)
        far_row = projected + far * (projected_stride * UNIT)
        far_at = far_row[:, None] + lane
        far_k, far_v = _read(far_at + C, inside), _read(far_at + 2 * C, inside)
        p = tl.where(inside[None, :], tl.exp2(_scores(q, far_k, SCALE, PRECISION) - log_sum), 0.0)
        dp = tl.dot(do, tl.trans(far_v), input_precision=PRECISION)
        dq = tl.dot((p * (dp - mean)).to(v.dtype), far_k, dq, input_precision=PRECISION)

        far_q = _read(far_at, inside)
        far_log_sum = tl.load(log_sums + far * heads + head, mask=inside, other=0.0)[None, :]
        far_do = _read(grad + far[:, None] * (grad_stride * UNIT) + lane, inside)
        far_y = _read(out + far[:, None] * (out_stride * UNIT) + lane, inside)
        far_mean = tl.sum(far_do * far_y.to(tl.float32), axis=1)[None, :]
        if GATE_WIDTH > 0:
            far_gate = _read_gate(far_row, C, head, lane, inside, GATE_WIDTH)
            far_do = (far_do * sigmoid(far_gate.to(tl.float32))).to(v.dtype)
        # transposed; queries outside the frame have do = 0 and contribute nothing
        p = tl.exp2(_scores(k, far_q, SCALE, PRECISION) - far_log_sum)
        dp = tl.dot(v, tl.trans(far_do), input_precision=PRECISION)
        dk = tl.dot((p * (dp - far_mean)).to(v.dtype), far_q, dk, input_precision=PRECISION)
        dv = tl.dot(p.to(v.dtype), far_do, dv, input_precision=PRECISION)
    _write(d_at, dq * SCALE, asked)
    _write(d_at + C, dk * SCALE, asked)
    _write(d_at + 2 * C, dv, asked)
