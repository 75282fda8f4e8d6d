"""Layer norm that keeps a half-precision map in half precision: one fused Triton kernel in each direction, sums in fp32.

With autocast it takes three passes: a copy in fp32, the norm, and a copy back. Source: Layer Normalization (arXiv 1607.06450).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vfi.ops.triton import launch_config

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PROGRAMS = 1024  # of the backward pass: each stores a partial sum for every parameter


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Apply `F.layer_norm` over the last dimension: x `[..., C]` in bf16, fp16 or fp32, weight, bias `[C]`; result like x."""
    if x.dtype not in DTYPES:
        raise TypeError(f"the fused layer norm takes bf16, fp16 or fp32 and was given {x.dtype}")
    if not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(f"weight and bias must be {list(x.shape[-1:])}; given {list(weight.shape)} and {list(bias.shape)}")
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps)
    return result


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        C = x.shape[-1]
        rows, tile = x.numel() // C, _tile(layer_norm_forward, x)
        layer_norm_forward[(math.ceil(rows / tile["ROWS"]),)](
            x, weight.contiguous(), bias.contiguous(), y, eps, rows, C=C, **tile
        )
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        C = x.shape[-1]
        rows, tile = x.numel() // C, _tile(layer_norm_backward, x)
        each = math.ceil(rows / (tile["ROWS"] * _PROGRAMS))  # blocks of rows for each program
        programs = math.ceil(rows / (tile["ROWS"] * each)) if rows else 0
        dx = torch.empty_like(x)
        sums = x.new_empty(2, programs, C, dtype=torch.float32)
        if programs:
            arguments = x, weight.contiguous(), grad.contiguous(), dx, sums, ctx.eps, rows, each
            layer_norm_backward[(programs,)](*arguments, C=C, **tile)
        d_weight, d_bias = sums.sum(dim=1).unbind()
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None


def _tile(kernel: Any, x: Tensor) -> launch_config.Options:
    """Return the rows of a program, about 2048 elements, and the channels of a row rounded up to a power of two."""
    channels = triton.next_power_of_2(x.shape[-1])
    default = {"ROWS": max(1, 2048 // channels), "num_warps": 4}
    return launch_config.configuration(kernel.__name__, (x.dtype, channels), default, x.device) | {"CHANNELS": channels}


@triton.jit
def _normed(x, at, known, C: tl.constexpr, eps):
    """Return rows with mean 0 and variance 1, and the factor that scaled them."""
    value = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    value = tl.where(known, value - (tl.sum(value, 1) / C)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1) / C + eps)
    return value * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def layer_norm_forward(x, weight, bias, y, eps, rows, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Normalise rows. Program: a block of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    at = row[:, None] * C + channel[None, :]
    known = (row < rows)[:, None] & (channel < C)[None, :]
    normed, _ = _normed(x, at, known, C, eps)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    tl.store(y + at, (normed * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["rows", "each"])
def layer_norm_backward(
    x, weight, grad, dx, sums, eps, rows, each, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Compute dx, and in sums [2, programs, C] this program's part of the gradients of weight and bias.

    Program: `each` blocks of rows.
    """
    program = tl.program_id(0)
    channel = tl.arange(0, CHANNELS)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    d_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    for block in range(each):
        row = (program.to(tl.int64) * each + block) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * C + channel[None, :]
        known = (row < rows)[:, None] & (channel < C)[None, :]
        normed, scale = _normed(x, at, known, C, eps)
        g = tl.load(grad + at, mask=known, other=0.0).to(tl.float32)
        d_weight += g * normed
        d_bias += g
        g *= w[None, :]
        mean, along = tl.sum(g, 1) / C, tl.sum(g * normed, 1) / C
        d = (g - mean[:, None] - normed * along[:, None]) * scale[:, None]
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=known)
    out = sums + program * C + channel
    tl.store(out, tl.sum(d_weight, 0), mask=channel < C)
    tl.store(out + tl.num_programs(0) * C, tl.sum(d_bias, 0), mask=channel < C)
