"""Laplacian pyramid L1 norm without the bands in memory: two fused Triton kernels per level forward, and two backward.

    sizes = pyramid_sizes(images, levels=5)      # [N, B, C, H, W] in fp32 -> [N]: sum over levels of the mean absolute value

Each level halves the size by a 5x5 binomial filter with reflected edges; its band is the detail lost by that. Of a band, only
the signs are kept for the backward pass, one byte each. A coarse pixel collects fine ones with weights that are products of a
row weight and a column weight, and is spread back to fine ones with other such weights. Both directions and their gradients
are gathers, so that every sum has a fixed order. Source: the Laplacian pyramid (Burt and Adelson, 1983).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vfi.ops.triton import launch_config

_DEFAULT = {"BLOCK": 512, "num_warps": 4}  # pixels of a program
_SIZES = ("H", "W", "h", "w", "images", "blocks", "first")  # a kernel is compiled once for all their values


def pyramid_sizes(images: Tensor, levels: int) -> Tensor:
    """Sum the mean absolute values of the bands and of the remaining coarse image: `[N, B, C, H, W]` in fp32 -> `[N]`.

    Sides are at least 2^(levels + 1).
    """
    if images.dtype != torch.float32 or images.dim() != 5:
        raise TypeError(f"pyramid_sizes takes [N, B, C, H, W] in fp32 and was given {list(images.shape)} in {images.dtype}")
    if min(images.shape[-2:]) < 2 ** (levels + 1):
        raise ValueError(f"{levels} levels need sides of at least {2 ** (levels + 1)}, not {list(images.shape[-2:])}")
    result: Tensor = _PyramidSizes.apply(images, levels)
    return result


def _kernel(function: Callable[..., None]) -> Any:
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _SIZES if name in names])


class _PyramidSizes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, levels: int) -> Tensor:
        fine, signs = images.contiguous(), list[Tensor]()
        planes = math.prod(images.shape[:3])
        shapes = [images.shape[-2:]]
        for _ in range(levels):
            shapes.append(torch.Size((side + 1) // 2 for side in shapes[-1]))
        shrink, band = (_options(kernel, images) for kernel in (pyramid_shrink, pyramid_band))
        blocks = [_blocks(shape, band) for shape in shapes]
        sums = images.new_empty(planes, sum(blocks))
        for level, (H, W) in enumerate(shapes):
            first, last = sum(blocks[:level]), level == levels
            h, w = shapes[min(level + 1, levels)]
            coarse = fine
            if not last:
                coarse = images.new_empty(planes, h, w)
                pyramid_shrink[_blocks((h, w), shrink), planes](fine, coarse, H, W, h, w, **shrink)
            signs.append(images.new_empty(planes, H, W, dtype=torch.int8))
            share = len(images) / (planes * H * W)  # weight of a pixel in the mean of its level
            pyramid_band[blocks[level], planes](
                fine, coarse, signs[-1], sums, share, H, W, h, w, sum(blocks), first, LAST=last, **band
            )
            fine = coarse
        ctx.save_for_backward(*signs)
        ctx.shape = images.shape
        return sums.view(len(images), -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        signs, grad = ctx.saved_tensors, grad.contiguous()
        planes, images = math.prod(ctx.shape[:3]), math.prod(ctx.shape[1:3])
        to_coarse, to_fine = (_options(kernel, grad) for kernel in (pyramid_coarse_gradient, pyramid_fine_gradient))
        coarse = grad  # not read at the last level
        for level in reversed(range(len(signs))):
            sign, last = signs[level], level == len(signs) - 1
            H, W = sign.shape[1:]
            h, w = (H, W) if last else signs[level + 1].shape[1:]
            share = len(grad) / (planes * H * W)
            if not last:
                pyramid_coarse_gradient[_blocks((h, w), to_coarse), planes](
                    sign, grad, coarse, share, H, W, h, w, images, **to_coarse
                )
            fine = grad.new_empty(planes, H, W)
            pyramid_fine_gradient[_blocks((H, W), to_fine), planes](
                sign, grad, coarse, fine, share, H, W, h, w, images, LAST=last, **to_fine
            )
            coarse = fine
        return coarse.view(ctx.shape), None


def _options(kernel: Any, given: Tensor) -> launch_config.Options:
    return launch_config.configuration(kernel.__name__, (), _DEFAULT, given.device)


def _blocks(shape: tuple[int, int] | torch.Size, options: launch_config.Options) -> int:
    return math.ceil(shape[0] * shape[1] / options["BLOCK"])


@triton.jit
def _tap(distance):
    """Return the filter weight, 1 4 6 4 1 sixteenths, at a distance in pixels; zero beyond two."""
    squared = distance * distance
    return tl.where(squared == 0, 0.375, tl.where(squared == 1, 0.25, tl.where(squared == 4, 0.0625, 0.0)))


@triton.jit
def _taken(coarse, fine, side):
    """Return the weight of `fine` in pixel `coarse` when downsampling an axis of `side` fine pixels.

    It includes the reflections of `fine` at both edges.
    """
    weight = _tap(fine - 2 * coarse)
    weight += tl.where(fine > 0, _tap(fine + 2 * coarse), 0.0)
    return weight + tl.where(fine < side - 1, _tap(2 * (side - 1) - fine - 2 * coarse), 0.0)


@triton.jit
def _given(coarse, fine, side):
    """Return the weight of `coarse` in pixel `fine` when upsampling: coarse pixels at even positions, zeros between them."""
    place = 2 * coarse
    weight = _tap(place - fine)
    weight += tl.where(place > 0, _tap(place + fine), 0.0)
    return 2 * (weight + tl.where(place < side - 1, _tap(2 * (side - 1) - place - fine), 0.0))


@triton.jit
def _mirrored(place, side):
    place = tl.abs(place)
    return tl.where(place >= side, 2 * (side - 1) - place, place)


@_kernel
def pyramid_shrink(fine, coarse, H, W, h, w, BLOCK: tl.constexpr):
    """Filter, and keep every second pixel of every second row. Program: (block of coarse pixels, plane)."""
    plane = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    i, j = pixel // w, pixel % w
    fine += plane * H * W
    total = tl.zeros([BLOCK], tl.float32)
    for down in tl.static_range(-2, 3):
        row = _mirrored(2 * i + down, H)
        for across in tl.static_range(-2, 3):
            value = tl.load(fine + row * W + _mirrored(2 * j + across, W), mask=inside, other=0.0)
            total += _tap(down + 0 * i) * _tap(across + 0 * j) * value
    tl.store(coarse + plane * h * w + pixel, total, mask=inside)


@_kernel
def pyramid_band(fine, coarse, signs, sums, share, H, W, h, w, blocks, first, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the band: fine pixels minus the upsampled coarse ones. Stores its signs and the sum of its absolute values.

    The sums are multiplied by `share` and stored in sums [planes, blocks] from block `first` on. LAST: the band is the image
    itself. Program: (block of fine pixels, plane).
    """
    plane = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < H * W
    i, j = pixel // W, pixel % W
    value = tl.load(fine + plane * H * W + pixel, mask=inside, other=0.0)
    if not LAST:
        value -= _from_coarse(coarse + plane * h * w, i, j, H, W, h, w, inside, False)
    sign = (value > 0).to(tl.int8) - (value < 0).to(tl.int8)
    tl.store(signs + plane * H * W + pixel, sign, mask=inside)
    size = tl.sum(tl.where(inside, tl.abs(value), 0.0))
    tl.store(sums + plane * blocks + first + tl.program_id(0), size * share)


@triton.jit
def _from_coarse(coarse, i, j, H, W, h, w, inside, BACK: tl.constexpr):
    """Sum the contributions of the coarse pixels around (i, j) to it; BACK: with the weights of downsampling instead."""
    total = tl.zeros_like(i).to(tl.float32)
    for down in tl.static_range(-1, 2):
        row = i // 2 + down
        of_row = _taken(row, i, H) if BACK else _given(row, i, H)
        for across in tl.static_range(-1, 2):
            column = j // 2 + across
            of_column = _taken(column, j, W) if BACK else _given(column, j, W)
            known = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            total += of_row * of_column * tl.load(coarse + row * w + column, mask=known, other=0.0)
    return total


@_kernel
def pyramid_coarse_gradient(signs, grad, coarse, share, H, W, h, w, images, BLOCK: tl.constexpr):
    """Subtract the gradient through this level's band from that through the coarser levels, in place, for coarse pixels.

    Program: (block of coarse pixels, plane).
    """
    plane = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    i, j = pixel // w, pixel % w
    total = tl.zeros([BLOCK], tl.float32)
    for down in tl.static_range(-2, 3):
        row = 2 * i + down
        of_row = _given(i, row, H)
        for across in tl.static_range(-2, 3):
            column = 2 * j + across
            known = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            sign = tl.load(signs + plane * H * W + row * W + column, mask=known, other=0)
            total += of_row * _given(j, column, W) * sign.to(tl.float32)
    at = coarse + plane * h * w + pixel
    value = tl.load(at, mask=inside, other=0.0) - tl.load(grad + plane // images) * share * total
    tl.store(at, value, mask=inside)


@_kernel
def pyramid_fine_gradient(signs, grad, coarse, fine, share, H, W, h, w, images, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the gradient of a level's image through its band and the coarse image. Program: (block of fine pixels, plane)."""
    plane = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < H * W
    sign = tl.load(signs + plane * H * W + pixel, mask=inside, other=0)
    value = tl.load(grad + plane // images) * share * sign.to(tl.float32)
    if not LAST:
        value += _from_coarse(coarse + plane * h * w, pixel // W, pixel % W, H, W, h, w, inside, True)
    tl.store(fine + plane * H * W + pixel, value, mask=inside)
