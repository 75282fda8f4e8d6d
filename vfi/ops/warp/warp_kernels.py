"""Backward warping without copies to fp32 and back: one fused Triton kernel forward and one backward.

A program handles a small rectangle of pixels of one frame, whose source pixels overlap and therefore come from the cache, and
loops over all of their channels. Backward, it gathers the gradient of the flow, which is written once and bitwise
reproducible, and scatters that of the frames by atomic additions in fp32, whose last bits depend on their order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vfi.ops.triton import launch_config
from vfi.ops.warp.warp import check_flow

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def backward_warp_fused(x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
    """Compute `backward_warp`: `[B, C, H, W]`, y[p] = x[p + flow[p]], bilinear, the border replicated beyond the frame.

    Args:
        x: bf16, fp16 or fp32; read in place if it is channels-last.
        flow: `[B, 2, H, W]` in bf16, fp16 or fp32, in pixels, with any strides. NaN samples the first column or row.
        top: if given, flow has only some rows of the frame, from `top` on, and so has the result; without gradients.

    Returns:
        `[B, C, H, W]`, with `top` fewer rows, in the dtype of `x`, channels-last. Coordinates, weights and sums are fp32.
    """
    check_flow(x, flow, top)
    if x.dtype not in DTYPES or flow.dtype not in DTYPES:
        raise TypeError(f"fused warping takes bf16, fp16 or fp32 and was given {x.dtype} and a flow in {flow.dtype}")
    pixels = x.permute(0, 2, 3, 1)
    if top is None:
        return _Fused.apply(pixels, flow).permute(0, 3, 1, 2)
    if torch.is_grad_enabled() and (x.requires_grad or flow.requires_grad):
        raise NotImplementedError("fused warping of some rows has no gradients: warp the whole map")
    return _warp(pixels, flow, top).permute(0, 3, 1, 2)


def _warp(x: Tensor, flow: Tensor, top: int = 0) -> Tensor:
    """Warp frames `[B, H, W, C]` to `[B, rows, W, C]`, with the rows of the flow."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], flow.shape[2], *x.shape[2:])
    _launch(warp_forward, _options(warp_forward, y, 2048), y, flow, x, x.shape[1], top)
    return y


class _Fused(torch.autograd.Function):
    """Autograd function of the fused warp; frames and results are `[B, H, W, C]` here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flow: Tensor) -> Tensor:
        x = x.contiguous()
        y = _warp(x, flow)
        ctx.save_for_backward(flow, *((x,) if ctx.needs_input_grad[1] else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flow, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        x = kept[0] if kept else None
        d_x = grad.new_zeros(grad.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        d_flow = flow.new_empty(flow.shape) if kept else None
        options = _options(warp_backward, grad, 1024, d_x is not None, d_flow is not None)
        _launch(warp_backward, options, grad, flow, x, d_x, d_flow)
        return None if d_x is None else d_x.to(grad.dtype), d_flow


def _options(kernel: Any, given: Tensor, elements: int, *gradients: bool) -> launch_config.Options:
    """Return the launch options of a kernel; by default a program handles about `elements` elements."""
    shape_class, default = _tiles(given.shape[-1], given.dtype, elements)
    return launch_config.configuration(kernel.__name__, (*shape_class, *gradients), default, given.device)


@functools.cache
def _tiles(C: int, dtype: torch.dtype, elements: int) -> tuple[launch_config.ShapeClass, launch_config.Options]:
    """Return a number of channels that leaves few lanes idle, and a rectangle of pixels that together are `elements`.

    Where pixels do not start at multiples of 16 bytes, every element needs registers for its own four addresses: two per
    thread.
    """
    channels = max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if triton.cdiv(C, n) * n <= 1.15 * C)
    in_vectors = C * dtype.itemsize % 16 == 0
    pixels = min(256, (elements if in_vectors else 512) // channels)
    rows = 2 ** ((pixels.bit_length() - 1) // 2)
    default = {"ROWS": rows, "COLUMNS": pixels // rows, "CHANNELS": channels, "num_warps": 4 if in_vectors else 8}
    return (dtype, channels, in_vectors), default


def _launch(kernel: Any, options: launch_config.Options, given: Tensor, flow: Tensor, *others: Tensor | int | None) -> None:
    """Run a kernel over all pixels. `given`: `[B, H, W, C]` of the flow's size, contiguous as all others except the flow."""
    B, H, W, C = given.shape
    down, across = triton.cdiv(H, options["ROWS"]), triton.cdiv(W, options["COLUMNS"])
    with torch.cuda.device_of(given):
        kernel[(B * down * across,)](
            given,
            flow,
            *others,
            *flow.stride(),
            *(H, W, down, across),
            C=C,
            **options,
            num_stages=1,
        )


@triton.jit
def _place(H, W, down, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's frame, and rows and columns `[ROWS * COLUMNS]` of its pixels. Programs of a row are adjacent."""
    place = tl.program_id(0)
    left, place = (place % across) * COLUMNS, place // across
    top, frame = (place % down) * ROWS, place // down
    pixel = tl.arange(0, ROWS * COLUMNS)
    return frame.to(tl.int64), top + pixel // COLUMNS, left + pixel % COLUMNS


@triton.jit
def _looked_at(start, by, size):
    """Return, on one axis, the pixels around the sampled position, its fraction between them, and whether it moves.

    It doesn't move on the border and beyond, as in `grid_sample`. Comparisons with NaN are false, so NaN stays at the first
    pixel.
    """
    last = size - 1
    at = start.to(tl.float32) + by.to(tl.float32)
    moves = (at > 0) & (at < last)
    at = tl.where(at > 0, at, 0.0)
    at = tl.where(at < last, at, last.to(tl.float32))
    before = at.to(tl.int32)
    return before, tl.minimum(before + 1, last), at - before.to(tl.float32), moves


@triton.jit
def _at(row, column, W, C: tl.constexpr):
    """Return the offsets `[pixels, 1]` of pixels in their frame."""
    return (row.to(tl.int64) * W + column)[:, None] * C


@triton.jit
def _read(at, channel, C: tl.constexpr, CHANNELS: tl.constexpr):
    if C % CHANNELS == 0:
        value = tl.load(at + channel)
    else:
        value = tl.load(at + channel, mask=channel < C, other=0.0)
    return value.to(tl.float32)


_SIZES = ["frame_stride", "part_stride", "row_stride", "column_stride", "H", "W", "down", "across"]


@triton.jit(do_not_specialize=["height", "top", *_SIZES])
def warp_forward(
    y,
    flow,
    x,
    height,
    top,
    frame_stride,
    part_stride,
    row_stride,
    column_stride,
    H,
    W,
    down,
    across,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Warp H rows from `top` on, of frames that have `height` rows."""
    frame, row, column = _place(H, W, down, across, ROWS, COLUMNS)
    inside = (row < H) & (column < W)
    flow += frame * frame_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    # upper left to lower right; even for pixels outside the frame, the sampled positions are inside
    left, right, a, _ = _looked_at(column, tl.load(flow, mask=inside, other=0.0), W)
    upper, lower, d, _ = _looked_at(top + row, tl.load(flow + part_stride, mask=inside, other=0.0), height)
    a, d = a[:, None], d[:, None]
    x += frame * height * W * C
    ul, ur = x + _at(upper, left, W, C), x + _at(upper, right, W, C)
    ll, lr = x + _at(lower, left, W, C), x + _at(lower, right, W, C)
    out = y + frame * H * W * C + _at(row, column, W, C)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        value = _read(ul, channel, C, CHANNELS) * ((1 - d) * (1 - a))
        value += _read(ur, channel, C, CHANNELS) * ((1 - d) * a)
        value += _read(ll, channel, C, CHANNELS) * (d * (1 - a))
        value += _read(lr, channel, C, CHANNELS) * (d * a)
        tl.store(out + channel, value.to(y.dtype.element_ty), mask=inside[:, None] & (channel < C))


@triton.jit(do_not_specialize=_SIZES)
def warp_backward(
    grad,
    flow,
    x,
    d_x,
    d_flow,
    frame_stride,
    part_stride,
    row_stride,
    column_stride,
    H,
    W,
    down,
    across,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute the gradients. Either of `d_x` (fp32, initialised to zero) and `d_flow` may be None, and `x` with the latter."""
    frame, row, column = _place(H, W, down, across, ROWS, COLUMNS)
    inside = (row < H) & (column < W)
    flow += frame * frame_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    left, right, across_by, moves_across = _looked_at(column, tl.load(flow, mask=inside, other=0.0), W)
    top, bottom, down_by, moves_down = _looked_at(row, tl.load(flow + part_stride, mask=inside, other=0.0), H)
    asked, a, d = inside[:, None], across_by[:, None], down_by[:, None]
    first = frame * H * W * C
    ul, ur = first + _at(top, left, W, C), first + _at(top, right, W, C)
    ll, lr = first + _at(bottom, left, W, C), first + _at(bottom, right, W, C)
    grad += first + _at(row, column, W, C)
    d_across = tl.full((ROWS * COLUMNS, CHANNELS), 0.0, tl.float32)
    d_down = tl.full((ROWS * COLUMNS, CHANNELS), 0.0, tl.float32)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        known = asked & (channel < C)
        dy = tl.load(grad + channel, mask=known, other=0.0).to(tl.float32)
        if d_flow is not None:
            x_ul = _read(x + ul, channel, C, CHANNELS)
            x_ur = _read(x + ur, channel, C, CHANNELS)
            x_ll = _read(x + ll, channel, C, CHANNELS)
            x_lr = _read(x + lr, channel, C, CHANNELS)
            d_across += dy * ((1 - d) * (x_ur - x_ul) + d * (x_lr - x_ll))
            d_down += dy * ((1 - a) * (x_ll - x_ul) + a * (x_lr - x_ur))
        if d_x is not None:
            _add(d_x + ul + channel, dy, (1 - d) * (1 - a), known)
            _add(d_x + ur + channel, dy, (1 - d) * a, known)
            _add(d_x + ll + channel, dy, d * (1 - a), known)
            _add(d_x + lr + channel, dy, d * a, known)
    if d_flow is not None:
        d_flow += frame * 2 * H * W + row.to(tl.int64) * W + column
        d_across = tl.where(moves_across, tl.sum(d_across, axis=1), 0.0)
        d_down = tl.where(moves_down, tl.sum(d_down, axis=1), 0.0)
        tl.store(d_flow, d_across.to(d_flow.dtype.element_ty), mask=inside)
        tl.store(d_flow + H.to(tl.int64) * W, d_down.to(d_flow.dtype.element_ty), mask=inside)


@triton.jit
def _add(at, dy, weight, known):
    """Add atomically; the corners of a whole-pixel position that have zero weight are skipped."""
    tl.atomic_add(at, dy * weight, mask=known & (weight > 0), sem="relaxed")
