"""Concatenation of maps along channels: one fused Triton kernel forward and one backward.

`torch.cat` first copies maps of other types and strides, a pixel shuffle is another copy, and cuDNN then copies maps whose
number of channels is not a multiple of 8. Here a program moves all channels of some pixels, or shares them with adjacent
programs: with a separate launch for each map, most memory sectors would be written in two parts. Where 8 channels (16 bytes in
half precision) are adjacent in one map, they are moved as rows; the others are read one by one, each for many pixels, and
assembled. The backward pass makes the same moves in the other direction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vfi.ops.triton import launch_config

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of a program: pixels, one for each thread, so that a thread has all 8 channels that it assembles; and the approximate number
# of channels
_DEFAULT = {"stack_maps": {"PIXELS": 32, "CHANNELS": 32}, "unstack_maps": {"PIXELS": 128, "CHANNELS": 128}}
_WIDEST = 32  # maximum channels of a row that are moved at once


class Strides(NamedTuple):
    """Memory layout of a map: frames are `frame_areas` times the pixels of a frame plus `frame` apart, for any frame size."""

    frame_areas: int
    frame: int
    channel_areas: int
    channel: int
    pixel: int


class Owner(NamedTuple):
    """Source of an output channel."""

    map_: int
    channel: int


class Row(NamedTuple):
    """Channels that are moved as one row."""

    start: int
    width: int
    map_: int
    first: int
    """First channel in the map."""


_NOBODY = Owner(-1, 0)


def concat_channels(parts: Sequence[Tensor], dtype: torch.dtype, shuffled: Tensor | None = None, multiple: int = 8) -> Tensor:
    """Concatenate maps like `torch.cat`, optionally after a pixel shuffle of another map, padded with zero channels.

    Args:
        parts: `[B, C_i, H, W]` each, in bf16, fp16 or fp32, with any strides. They are read in place if their pixels are evenly
            spaced, as in channels-last maps, contiguous ones, slices of either's frames or channels, and expanded scalars.
        dtype: of the output, bf16, fp16 or fp32.
        shuffled: `[B, 4 * C_0, H / 2, W / 2]`, the input of `F.pixel_shuffle(shuffled, 2)`.
        multiple: the number of output channels is a multiple of this.

    Returns:
        `[B, C, H, W]`, channels-last: `torch.cat((F.pixel_shuffle(shuffled, 2), *parts), 1).to(dtype)` and the zeros, bit for
        bit. The gradient of a part of the same dtype is a view of the output's.
    """
    maps = [*parts] if shuffled is None else [shuffled, *parts]
    for wrong in {dtype, *(t.dtype for t in maps)}.difference(DTYPES):
        raise TypeError(f"concat_channels takes bf16, fp16 or fp32 and was given {wrong}")
    if multiple < 1:
        raise ValueError(f"concat_channels was asked for a multiple of {multiple} channels")
    sizes = {_size(t, t is shuffled) for t in maps}
    if len(sizes) != 1 or None in sizes:
        before = "" if shuffled is None else "[B, 4 * C, H / 2, W / 2] and "
        shapes = ", ".join(str(list(t.shape)) for t in maps)
        raise ValueError(f"concat_channels takes {before}maps [B, C, H, W] of one size and was given {shapes or 'none'}")
    return _Stack.apply(dtype, multiple, shuffled is not None, *maps)


def _size(t: Tensor, is_shuffled: bool) -> tuple[int, int, int] | None:
    """Return (B, H, W) of a map after the shuffle; None if it is not a valid map."""
    if t.dim() != 4 or (is_shuffled and t.shape[1] % 4):
        return None
    B, _, H, W = t.shape
    return (B, 2 * H, 2 * W) if is_shuffled else (B, H, W)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, multiple: int, first_is_shuffled: bool, *maps: Tensor) -> Tensor:
        B, _, H, W = maps[0].shape
        widths = [t.shape[1] for t in maps]
        layouts = [torch.contiguous_format if t.is_contiguous() else torch.channels_last for t in maps]
        if first_is_shuffled:
            H, W, widths[0], layouts[0] = 2 * H, 2 * W, widths[0] // 4, torch.channels_last
        channels = -(-sum(widths) // multiple) * multiple
        out = torch.empty((B, channels, H, W), dtype=dtype, device=maps[0].device, memory_format=torch.channels_last)
        _launch(stack_maps, out, maps, widths, first_is_shuffled)
        ctx.first_is_shuffled, ctx.widths = first_is_shuffled, widths
        ctx.kinds = [(t.shape, t.dtype, layout) for t, layout in zip(maps, layouts, strict=True)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous(memory_format=torch.channels_last)
        gradients: list[Tensor | None] = [None] * len(ctx.kinds)
        written: list[Tensor | None] = [None] * len(ctx.kinds)
        for i, (shape, dtype, layout) in enumerate(ctx.kinds):
            if not ctx.needs_input_grad[3 + i]:
                continue
            if dtype == grad.dtype and not (ctx.first_is_shuffled and i == 0):
                gradients[i] = grad.narrow(1, sum(ctx.widths[:i]), ctx.widths[i])
            else:
                written[i] = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=layout)
                gradients[i] = written[i]
        if any(t is not None for t in written):
            _launch(unstack_maps, grad, written, ctx.widths, ctx.first_is_shuffled)
        return None, None, None, *gradients


def _launch(kernel: Any, stacked: Tensor, maps: Sequence[Tensor | None], widths: list[int], first_is_shuffled: bool) -> None:
    """Copy between channels of `stacked`, channels-last, and maps with `widths` channels each. None entries are skipped."""
    B, channels, H, W = stacked.shape
    places = [None if t is None else _place_in_memory(t) for t in maps]
    strides = tuple(None if place is None else place[1] for place in places)
    rows, eights, owners = moves(tuple(widths), strides, channels, keep_zeros=kernel is stack_maps)
    shuffled = first_is_shuffled and maps[0] is not None
    shape_class, name = (stacked.dtype, channels, shuffled), kernel.__name__
    options = launch_config.configuration(name, shape_class, _DEFAULT[name], stacked.device)
    pixels, shares = options["PIXELS"], -(-channels // options["CHANNELS"])
    blocks = -(-H * W // pixels)
    with torch.cuda.device_of(stacked):
        kernel[(B * blocks * shares,)](
            stacked,
            tuple(place[0] for place in places if place is not None),
            *(H * W, W, blocks),
            STRIDES=tuple(stride for stride in strides if stride is not None),
            ROWS=rows,
            EIGHTS=eights,
            OWNERS=owners,
            CHANNELS=channels,
            SHUFFLED=shuffled,
            PIXELS=pixels,
            SHARES=shares,
            num_warps=max(1, pixels // 32),
        )


def _place_in_memory(t: Tensor) -> tuple[Tensor, Strides]:
    """Return a map and its Strides; those of a copy if its pixels are not evenly spaced."""
    B, C, H, W = t.shape
    frame, channel, down, across = t.stride()
    frames, channels = divmod(frame, H * W or 1), divmod(channel, H * W or 1) if C > 1 else (0, 0)
    pixel = across if W > 1 else down
    if (H > 1 and down != W * pixel) or (B > 1 and all(frames)) or all(channels):
        return _place_in_memory(t.contiguous(memory_format=torch.channels_last))
    return t, Strides(*frames, *channels, pixel)


@functools.lru_cache(1024)
def moves(
    widths: tuple[int, ...], strides: tuple[Strides | None, ...], channels: int, keep_zeros: bool
) -> tuple[tuple[Row, ...], tuple[int, ...], tuple[Owner, ...]]:
    """Plan the moves: rows, starts of groups of 8 channels that are assembled, and their owners, 8 for each group.

    Maps without strides are skipped and not counted, and so are groups of 8 channels without an owner unless `keep_zeros`.
    """
    known = [stride for stride in strides if stride is not None]
    owners: list[Owner] = []
    taken = 0
    for width, stride in zip(widths, strides, strict=True):
        owners += [_NOBODY if stride is None else Owner(taken, channel) for channel in range(width)]
        taken += stride is not None
    owners += [_NOBODY] * (-(-channels // 8) * 8 - len(owners))
    rows: list[Row] = []
    eights: list[int] = []
    for start in range(0, len(owners), 8):
        owner, *others = owners[start : start + 8]
        follow = others == [Owner(owner.map_, owner.channel + i) for i in range(1, 8)]
        if follow and (known[owner.map_].channel_areas, known[owner.map_].channel) == (0, 1):
            rows.append(Row(start, 8, *owner))
            while len(rows) > 1 and _is_half(rows[-2], rows[-1]):
                half = rows.pop()
                rows[-1] = rows[-1]._replace(width=2 * half.width)
        elif keep_zeros or any(o != _NOBODY for o in (owner, *others)):
            eights.append(start)
    return tuple(rows), tuple(eights), tuple(owner for start in eights for owner in owners[start : start + 8])


def _is_half(left: Row, right: Row) -> bool:
    """Return whether the rows are the two halves of a row that may be moved at once."""
    follows = (left.start + left.width, left.map_, left.first + left.width) == (right.start, right.map_, right.first)
    return follows and left.width == right.width < _WIDEST


class _Place(NamedTuple):
    """Pixels of a program."""

    frame: Any
    start: Any
    """Number of pixels in the frame before those of this program."""
    pixel: Any
    """`[PIXELS]` positions in the frame."""
    inside: Any
    """`[PIXELS]`, whether they are in the frame."""
    spot: Any
    """`[PIXELS]` positions of their source pixels before the shuffle."""
    corner: Any
    """`[PIXELS]`, which of the 4 pixels of the shuffle they are."""


@triton.jit
def _pixels(program, area, W, blocks, SHUFFLED: tl.constexpr, PIXELS: tl.constexpr):
    """Return the _Place of a program. If SHUFFLED, its pixels lie in two rows of the frame."""
    frame = (program // blocks).to(tl.int64)
    start = program % blocks * PIXELS
    place = tl.arange(0, PIXELS)
    if SHUFFLED:
        spot = start // 4 + place // 2 % (PIXELS // 4)
        below, right = place // (PIXELS // 2), place % 2
        pixel = (2 * (spot // (W // 2)) + below) * W + 2 * (spot % (W // 2)) + right
        corner = 2 * below + right
        inside = spot < area // 4
    else:
        pixel = start + place
        spot, corner = pixel, pixel
        inside = pixel < area
    return _Place(frame, start, pixel.to(tl.int64), inside, spot.to(tl.int64), corner)


@triton.jit
def _at(
    map_, frame, channel, pixel, area,
    FRAME_AREAS: tl.constexpr, FRAME: tl.constexpr, CHANNEL_AREAS: tl.constexpr, CHANNEL: tl.constexpr, PIXEL: tl.constexpr,
):  # fmt: skip
    """Return the address of a channel of a pixel in a map with such Strides."""
    frame_stride = area.to(tl.int64) * FRAME_AREAS + FRAME
    channel_stride = area.to(tl.int64) * CHANNEL_AREAS + CHANNEL
    return map_ + frame * frame_stride + channel * channel_stride + pixel * PIXEL


@triton.jit
def _shuffled_row(map_, place, area, FIRST: tl.constexpr, WIDTH: tl.constexpr, STRIDES: tl.constexpr, PIXELS: tl.constexpr):
    """Return the addresses of the channels `[PIXELS / 4, 4 * WIDTH]` that become WIDTH, and which of them are in the frame."""
    spot = place.start // 4 + tl.arange(0, PIXELS // 4)
    row = _at(map_, place.frame, 4 * FIRST, spot.to(tl.int64), area // 4, *STRIDES[0])
    return row[:, None] + tl.arange(0, 4 * WIDTH)[None, :], (spot < area // 4)[:, None]


@triton.jit
def _column(maps, place, area, MAP: tl.constexpr, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, SHUFFLED: tl.constexpr):
    """Return the addresses `[PIXELS]` of a channel of a map in all pixels."""
    if SHUFFLED and MAP == 0:
        at = _at(maps[MAP], place.frame, 4 * CHANNEL + place.corner, place.spot, area // 4, *STRIDES[MAP])
    else:
        at = _at(maps[MAP], place.frame, CHANNEL, place.pixel, area, *STRIDES[MAP])
    return at


@triton.jit
def _read(
    maps, place, area,
    MAP: tl.constexpr, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, SHUFFLED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    if MAP < 0:
        value = tl.zeros(place.pixel.shape, TYPE)
    else:
        value = tl.load(_column(maps, place, area, MAP, CHANNEL, STRIDES, SHUFFLED), mask=place.inside, other=0.0).to(TYPE)
    return value


@triton.jit
def _write(maps, value, place, area, MAP: tl.constexpr, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, SHUFFLED: tl.constexpr):
    if MAP >= 0:
        at = _column(maps, place, area, MAP, CHANNEL, STRIDES, SHUFFLED)
        tl.store(at, value.to(at.dtype.element_ty), mask=place.inside)


@triton.jit
def _stack_row(
    out, maps, place, area,
    START: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, FIRST: tl.constexpr,
    STRIDES: tl.constexpr, SHUFFLED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, WIDTH)[None, :]
    if SHUFFLED and MAP == 0:
        at, known = _shuffled_row(maps[0], place, area, FIRST, WIDTH, STRIDES, PIXELS)
        value = tl.load(at, mask=known, other=0.0).to(out.dtype.element_ty)
        value = tl.permute(tl.reshape(value, (PIXELS // 4, WIDTH, 2, 2)), (2, 0, 3, 1))
        value = tl.reshape(value, (PIXELS, WIDTH))
    else:
        row = _at(maps[MAP], place.frame, FIRST, place.pixel, area, *STRIDES[MAP])
        value = tl.load(row[:, None] + lane, mask=place.inside[:, None], other=0.0).to(out.dtype.element_ty)
    tl.store(out + START + lane, value, mask=place.inside[:, None])


@triton.jit
def _stack_eight(
    out, maps, place, area,
    START: tl.constexpr, OWNERS: tl.constexpr, N: tl.constexpr,
    STRIDES: tl.constexpr, CHANNELS: tl.constexpr, SHUFFLED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = out.dtype.element_ty
    c0 = _read(maps, place, area, *OWNERS[8 * N + 0], STRIDES, SHUFFLED, TYPE)
    c1 = _read(maps, place, area, *OWNERS[8 * N + 1], STRIDES, SHUFFLED, TYPE)
    c2 = _read(maps, place, area, *OWNERS[8 * N + 2], STRIDES, SHUFFLED, TYPE)
    c3 = _read(maps, place, area, *OWNERS[8 * N + 3], STRIDES, SHUFFLED, TYPE)
    c4 = _read(maps, place, area, *OWNERS[8 * N + 4], STRIDES, SHUFFLED, TYPE)
    c5 = _read(maps, place, area, *OWNERS[8 * N + 5], STRIDES, SHUFFLED, TYPE)
    c6 = _read(maps, place, area, *OWNERS[8 * N + 6], STRIDES, SHUFFLED, TYPE)
    c7 = _read(maps, place, area, *OWNERS[8 * N + 7], STRIDES, SHUFFLED, TYPE)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    value = tl.reshape(tl.join(even, odd), (PIXELS, 8))
    at, known = _eight(out, place.inside, START, CHANNELS)
    tl.store(at, value, mask=known)


@triton.jit
def _eight(row, inside, START: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the addresses of 8 channels from START on, and which of them are in the frame and the map."""
    channel = START + tl.arange(0, 8)[None, :]
    known = inside[:, None]
    if START + 8 > CHANNELS:
        known &= channel < CHANNELS
    return row + channel, known


@triton.jit(do_not_specialize=["area", "W", "blocks"])
def stack_maps(
    stacked, maps, area, W, blocks,
    STRIDES: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr, OWNERS: tl.constexpr, CHANNELS: tl.constexpr,
    SHUFFLED: tl.constexpr, PIXELS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    share, program = tl.program_id(0) % SHARES, tl.program_id(0) // SHARES
    place = _pixels(program, area, W, blocks, SHUFFLED, PIXELS)
    out = stacked + (place.frame * area + place.pixel)[:, None] * CHANNELS
    for i in tl.static_range(len(ROWS)):
        if ROWS[i][0] * SHARES // CHANNELS == share:
            _stack_row(out, maps, place, area, *ROWS[i], STRIDES, SHUFFLED, PIXELS)
    for i in tl.static_range(len(EIGHTS)):
        if EIGHTS[i] * SHARES // CHANNELS == share:
            _stack_eight(out, maps, place, area, EIGHTS[i], OWNERS, i, STRIDES, CHANNELS, SHUFFLED, PIXELS)


@triton.jit
def _unstack_row(
    source, maps, place, area,
    START: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr, FIRST: tl.constexpr,
    STRIDES: tl.constexpr, SHUFFLED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, WIDTH)[None, :]
    value = tl.load(source + START + lane, mask=place.inside[:, None], other=0.0).to(maps[MAP].dtype.element_ty)
    if SHUFFLED and MAP == 0:
        at, known = _shuffled_row(maps[0], place, area, FIRST, WIDTH, STRIDES, PIXELS)
        value = tl.permute(tl.reshape(value, (2, PIXELS // 4, 2, WIDTH)), (1, 3, 0, 2))
        tl.store(at, tl.reshape(value, (PIXELS // 4, 4 * WIDTH)), mask=known)
    else:
        row = _at(maps[MAP], place.frame, FIRST, place.pixel, area, *STRIDES[MAP])
        tl.store(row[:, None] + lane, value, mask=place.inside[:, None])


@triton.jit
def _unstack_eight(
    source, maps, place, area,
    START: tl.constexpr, OWNERS: tl.constexpr, N: tl.constexpr,
    STRIDES: tl.constexpr, CHANNELS: tl.constexpr, SHUFFLED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    at, known = _eight(source, place.inside, START, CHANNELS)
    value = tl.load(at, mask=known, other=0.0)
    even, odd = tl.split(tl.reshape(value, (PIXELS, 2, 2, 2)))
    c04, c26 = tl.split(even)
    c15, c37 = tl.split(odd)
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    _write(maps, c0, place, area, *OWNERS[8 * N + 0], STRIDES, SHUFFLED)
    _write(maps, c1, place, area, *OWNERS[8 * N + 1], STRIDES, SHUFFLED)
    _write(maps, c2, place, area, *OWNERS[8 * N + 2], STRIDES, SHUFFLED)
    _write(maps, c3, place, area, *OWNERS[8 * N + 3], STRIDES, SHUFFLED)
    _write(maps, c4, place, area, *OWNERS[8 * N + 4], STRIDES, SHUFFLED)
    _write(maps, c5, place, area, *OWNERS[8 * N + 5], STRIDES, SHUFFLED)
    _write(maps, c6, place, area, *OWNERS[8 * N + 6], STRIDES, SHUFFLED)
    _write(maps, c7, place, area, *OWNERS[8 * N + 7], STRIDES, SHUFFLED)


@triton.jit(do_not_specialize=["area", "W", "blocks"])
def unstack_maps(
    stacked, maps, area, W, blocks,
    STRIDES: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr, OWNERS: tl.constexpr, CHANNELS: tl.constexpr,
    SHUFFLED: tl.constexpr, PIXELS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    share, program = tl.program_id(0) % SHARES, tl.program_id(0) // SHARES
    place = _pixels(program, area, W, blocks, SHUFFLED, PIXELS)
    source = stacked + (place.frame * area + place.pixel)[:, None] * CHANNELS
    for i in tl.static_range(len(ROWS)):
        if ROWS[i][0] * SHARES // CHANNELS == share:
            _unstack_row(source, maps, place, area, *ROWS[i], STRIDES, SHUFFLED, PIXELS)
    for i in tl.static_range(len(EIGHTS)):
        if EIGHTS[i] * SHARES // CHANNELS == share:
            _unstack_eight(source, maps, place, area, EIGHTS[i], OWNERS, i, STRIDES, CHANNELS, SHUFFLED, PIXELS)
