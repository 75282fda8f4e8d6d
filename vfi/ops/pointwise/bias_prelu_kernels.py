"""Convolution bias, skip connection and PReLU in one pass over the map: one fused Triton kernel in each direction.

A channels-last map is a matrix of pixels and channels, read once and written once, 16 bytes at a time. The backward pass needs
only the inputs. A bounded number of programs compute the partial sums of the gradients of bias and slope, each over its own
pixels in a fixed order: the results are bitwise reproducible.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vfi.ops.triton import launch_config
from vfi.ops.triton.availability import multiprocessors

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# 54 registers on an H100: nine programs on a multiprocessor, each with 64 bytes of each map in flight per thread
_FORWARD = {"num_warps": 4, "TOGETHER": 4}
# a single warp, so that no warp waits for another: measured 4 to 20 % faster than four
_BACKWARD = {"num_warps": 1, "TOGETHER": 4, "PROGRAMS": 8}


def bias_prelu(x: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """Return PReLU(x + bias + residual), computed in fp32.

    Args:
        x: `[B, C, H, W]` in bf16, fp16 or fp32. It and `residual` are copied unless they are dense and channels-last.
        bias, slope: `[C]`. The slope of each channel applies below zero.
        residual: like `x`.
        overwrite: write the result to the memory of `x`, which becomes invalid; without gradients only.

    Returns:
        `[B, C, H, W]` in x's dtype, channels-last.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"fused PReLU takes bf16, fp16 or fp32 and was given {x.dtype}")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"fused PReLU was given a residual in {residual.dtype} for a map in {x.dtype}")
    if x.ndim != 4 or not bias.shape == slope.shape == x.shape[1:2] or (residual is not None and residual.shape != x.shape):
        shapes = [tuple(t.shape) for t in (x, bias, slope, residual) if t is not None]
        raise ValueError(f"map, bias, slope and residual must be [B, C, H, W], [C], [C] and like the map, not {shapes}")
    if isinstance(bias_prelu_forward, triton.JITFunction) and not x.is_cuda:
        raise ValueError(f"fused PReLU runs on a GPU and was given a map on {x.device}")
    if not overwrite:
        return _Fused.apply(x, bias, slope, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, slope, residual)):
        raise ValueError("fused PReLU can't overwrite what its gradients need")
    x = _channels_last(x)
    return _forward(x, bias.contiguous(), slope.contiguous(), None if residual is None else _channels_last(residual), x)


def _forward(x: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None, y: Tensor) -> Tensor:
    """Fill y, which may be x."""
    tile, rows = _tile(bias_prelu_forward, x, residual, _FORWARD), _rows(x)
    programs = -(-rows // (tile.rows * tile.together)) * tile.blocks
    _launch(bias_prelu_forward, programs, tile, x, bias, slope, residual, y, rows)
    return y


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None) -> Tensor:
        x, bias, slope = _channels_last(x), bias.contiguous(), slope.contiguous()
        residual = None if residual is None else _channels_last(residual)
        ctx.save_for_backward(x, bias, slope, residual)
        return _forward(x, bias, slope, residual, torch.empty_like(x, memory_format=torch.channels_last))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, slope, residual = ctx.saved_tensors
        to_x, to_bias, to_slope, to_residual = ctx.needs_input_grad
        tile, rows = _tile(bias_prelu_backward, x, residual, _BACKWARD), _rows(x)
        most = multiprocessors(x.device) * tile.programs
        programs = min(max(1, -(-rows // (tile.rows * tile.together))), -(-most // tile.blocks))
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        sums = x.new_empty(2, programs, x.shape[1], dtype=torch.float32)
        tensors = x, bias, slope, residual, _channels_last(grad), dx, sums
        _launch(bias_prelu_backward, programs * tile.blocks, tile, *tensors, rows, programs)
        d_bias, d_slope = sums.sum(dim=1).unbind()  # unpacking a tensor in Python takes longer than the kernel
        return (
            dx if to_x else None,
            d_bias.to(bias.dtype) if to_bias else None,
            d_slope.to(slope.dtype) if to_slope else None,
            dx if to_residual else None,
        )


class Tile(NamedTuple):
    """Data of a program at a time: rows x channels, `together` times what its threads read with one instruction each."""

    channels: int
    blocks: int  # of channels
    rows: int
    together: int
    num_warps: int
    programs: int
    """Programs for each multiprocessor, in the backward pass."""


def _tile(kernel: Any, x: Tensor, residual: Tensor | None, default: launch_config.Options) -> Tile:
    """Return the Tile of a launch."""
    C = x.shape[1]
    channels, vector = _in_a_row(C, x.dtype)
    options = launch_config.configuration(kernel.__name__, (x.dtype, channels, vector, residual is not None), default, x.device)
    rows = max(1, options["num_warps"] * 32 * vector // channels)
    return Tile(channels, -(-C // channels), rows, options["TOGETHER"], options["num_warps"], options.get("PROGRAMS", 0))


@functools.cache
def _in_a_row(C: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the channels of a program, and those that a thread reads with one instruction.

    A program has the channels of a cache line or two: with fewer channels it stores fewer partial sums.
    """
    return min(64, triton.next_power_of_2(C)), math.gcd(C, 16 // dtype.itemsize)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _launch(kernel: Any, programs: int, tile: Tile, x: Tensor, *others: Tensor | int | None) -> None:
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            x,
            *others,
            C=x.shape[1],
            CHANNELS=tile.channels,
            ROWS=tile.rows,
            TOGETHER=tile.together,
            num_warps=tile.num_warps,
        )


@triton.jit
def _lanes(C: tl.constexpr, CHANNELS: tl.constexpr):
    """Return this program's channels `[CHANNELS]`, and which of them exist. Blocks of channels are adjacent."""
    lane = tl.program_id(0) % tl.cdiv(C, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    return lane, lane < C


@triton.jit
def _places(lane, known, left, C: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr):
    """Return offsets `[TOGETHER, ROWS, CHANNELS]` from a row on, and which of them exist if `left` rows remain.

    A thread always reads the same channels of the same row of ROWS: sums over TOGETHER need no other thread.
    """
    row = tl.arange(0, TOGETHER)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    return row * C + lane[None, None, :], (row < left) & known[None, None, :]


@triton.jit
def _sum(x, bias, residual, start, at, inside):
    """Return x + bias + residual in fp32. `start` is int64, because a map may have 2^31 elements or more."""
    v = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32) + bias
    if residual is not None:
        v += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def _per_channel(values, lane, known):
    return tl.load(values + lane, mask=known, other=0.0).to(tl.float32)[None, None, :]


@triton.jit(do_not_specialize=["rows"])
def bias_prelu_forward(
    x,
    bias,
    slope,
    residual,
    y,
    rows,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    lane, known = _lanes(C, CHANNELS)
    row = (tl.program_id(0) // tl.cdiv(C, CHANNELS)).to(tl.int64) * (ROWS * TOGETHER)
    at, inside = _places(lane, known, rows - row, C, ROWS, TOGETHER)
    v = _sum(x, _per_channel(bias, lane, known), residual, row * C, at, inside)
    v = tl.where(v > 0, v, v * _per_channel(slope, lane, known))
    tl.store(y + row * C + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def bias_prelu_backward(
    x,
    bias,
    slope,
    residual,
    grad,
    dx,
    sums,
    rows,
    programs,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Compute dx, and in sums `[2, programs, C]` each program's part of the gradients of bias and slope."""
    lane, known = _lanes(C, CHANNELS)
    program = tl.program_id(0) // tl.cdiv(C, CHANNELS)
    bias_, slope_ = _per_channel(bias, lane, known), _per_channel(slope, lane, known)
    d_bias = tl.full((ROWS, CHANNELS), 0.0, tl.float32)
    d_slope = tl.full((ROWS, CHANNELS), 0.0, tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS * TOGETHER), programs):
        row = tl.cast(tile, tl.int64) * (ROWS * TOGETHER)
        at, inside = _places(lane, known, rows - row, C, ROWS, TOGETHER)
        g = tl.load(grad + row * C + at, mask=inside, other=0.0).to(tl.float32)
        v = _sum(x, bias_, residual, row * C, at, inside)
        d = tl.where(v > 0, g, g * slope_)
        tl.store(dx + row * C + at, d.to(dx.dtype.element_ty), mask=inside)
        d_bias += tl.sum(d, axis=0)
        d_slope += tl.sum(tl.where(v > 0, 0.0, g * v), axis=0)
    tl.store(sums + program * C + lane, tl.sum(d_bias, axis=0), mask=known)
    tl.store(sums + (programs + program) * C + lane, tl.sum(d_slope, axis=0), mask=known)
