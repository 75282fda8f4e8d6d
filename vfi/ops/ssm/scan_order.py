"""Scan directions over the pixels of two frames: interleaved, or each frame alone, both in four directions.

The four directions are rows, columns, and both reversed. A sequence contains

- interleaved: both frames of a pair; tokens at the same position are adjacent: (p0, f0), (p0, f1), (p1, f0), (p1, f1), …
- flip: one frame.

Sources: VFIMamba, section 3.2 (interleaved rearrangement), VMamba (arXiv 2401.10166, the cross-scan of one image).

A reordering is a gather of whole tokens by a cached index, and its gradient is the gather by the inverse index: one kernel
in each direction and no atomic additions, so the result is reproducible. `OPEN_SCANS` do the same by transposing and
reversing, without an index: for a traced network in which H and W are symbolic.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALL = range(4)
"""The four scan directions. Every function here also accepts a part of them, to limit the tokens in memory at a time."""
_CACHE_BYTES = 64 * 2**20
"""Maximum size of the cached indices; one of a 4096x2304 pair at stride 8 takes 9 MiB."""


def interleaved_scan(x: Tensor, orders: range = ALL) -> Tensor:
    """Reorder [2B, H, W, C], frame 0 of all pairs first, to [4B, 2*H*W, C] (row k*B + b: direction k of pair b)."""
    return _scan(x, 2, orders)


def interleaved_unscan(y: Tensor, B: int, H: int, W: int, orders: range = ALL) -> Tensor:
    """Invert `interleaved_scan` for every direction: [4B, 2*H*W, C] -> [4, 2B, H, W, C]."""
    return _unscan(y, 2, B, H, W, orders)


def interleaved_merge(y: Tensor, B: int, H: int, W: int) -> Tensor:
    """Invert `interleaved_scan` and sum over the four directions: [4B, 2*H*W, C] -> [2B, H, W, C]."""
    return interleaved_unscan(y, B, H, W).sum(0)


def flip_scan(x: Tensor, orders: range = ALL) -> Tensor:
    """Reorder [2B, H, W, C] to [4 * 2B, H*W, C], each frame alone (row k*2B + f: direction k of frame f)."""
    return _scan(x, 1, orders)


def flip_unscan(y: Tensor, B: int, H: int, W: int, orders: range = ALL) -> Tensor:
    """Invert `flip_scan` for every direction: [4 * 2B, H*W, C] -> [4, 2B, H, W, C]."""
    return _unscan(y, 1, B, H, W, orders)


class Scan(NamedTuple):
    """Functions that reorder two frames to sequences, and back."""

    scan: Callable[[Tensor, range], Tensor]
    unscan: Callable[[Tensor, int, int, int, range], Tensor]
    sequences: int
    """Number of sequences that the two frames of a pair form in one direction; together they contain every pixel once."""


SCANS = {"interleaved": Scan(interleaved_scan, interleaved_unscan, 1), "flip": Scan(flip_scan, flip_unscan, 2)}


def _open_scan(x: Tensor, orders: range, together: int) -> Tensor:
    frames, H, W, C = x.shape
    grid = x.view(together, frames // together, H, W, C)
    rows, columns = (t.reshape(frames // together, together * H * W, C) for t in (grid.permute(1, 2, 3, 0, 4),
                                                                                 grid.permute(1, 3, 2, 0, 4)))  # fmt: skip
    every = (rows, columns, rows.flip(1), columns.flip(1))
    return torch.cat([every[order] for order in orders])


def _open_unscan(y: Tensor, B: int, H: int, W: int, orders: range, together: int) -> Tensor:
    sequences, C = 2 * B // together, y.shape[-1]
    back = []
    for order, tokens in zip(orders, y.split([sequences] * len(orders)), strict=True):
        tokens = tokens.flip(1) if order >= 2 else tokens
        by_columns = order % 2
        grid = tokens.view(sequences, *((W, H) if by_columns else (H, W)), together, C)
        back.append(grid.permute(3, 0, *((2, 1) if by_columns else (1, 2)), 4).reshape(2 * B, H, W, C))
    return torch.stack(back)


OPEN_SCANS = {
    name: Scan(
        functools.partial(_open_scan, together=2 // known.sequences),
        functools.partial(_open_unscan, together=2 // known.sequences),
        known.sequences,
    )
    for name, known in SCANS.items()
}


def _scan(x: Tensor, together: int, orders: range) -> Tensor:
    """Reorder [F, H, W, C], `together` frames to a sequence, to [orders * F / together, together * H * W, C]."""
    frames, H, W, C = x.shape
    out = _Gather.apply(x.reshape(-1, C), *_indices(together, frames, H, W, orders, x.device))
    return out.view(-1, together * H * W, C)


def _unscan(y: Tensor, together: int, B: int, H: int, W: int, orders: range) -> Tensor:
    C = y.shape[-1]
    index = _indices(together, 2 * B, H, W, orders, y.device)
    return _Permute.apply(y.reshape(-1, C), *index).view(len(orders), 2 * B, H, W, C)


class _Gather(torch.autograd.Function):
    """Gather pixels [T, C] to [K * T, C] in K directions; a pixel's gradient is the sum over the positions that read it."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source, place)
        return pixels.index_select(0, source.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Permute.apply(gradients[0], *ctx.saved_tensors).sum(0), None, None


class _Permute(torch.autograd.Function):
    """Reorder tokens [K * T, C] of K directions to [K, T, C], each in the order of the pixels."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source, place)
        return tokens.index_select(0, _rows(place)).view(*place.shape, tokens.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        source, _ = ctx.saved_tensors
        return gradients[0].reshape(-1, gradients[0].shape[-1]).index_select(0, _rows(source)), None, None


def _rows(index: Tensor) -> Tensor:
    """Convert an index [K, T] inside each direction to row numbers of the concatenated directions."""
    K, T = index.shape
    return (index + torch.arange(0, K * T, T, dtype=index.dtype, device=index.device).unsqueeze(1)).flatten()


_cache: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()
_cache_lock = threading.Lock()


def _indices(together: int, frames: int, H: int, W: int, orders: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `source [K, T]`, the pixel at each position, T = frames*H*W, and `place [K, T]`, the position of each pixel."""
    key = (together, frames, H, W, device)
    with _cache_lock:
        known = _cache.pop(key) if key in _cache else None
        source, place = known or _make_indices(*key)
        if type(source) is Tensor:  # and not a fake tensor without data, as in tracing
            _cache[key] = source, place
        while len(_cache) > 1 and sum(t.nbytes for pair in _cache.values() for t in pair) > _CACHE_BYTES:
            _cache.popitem(last=False)  # the least recently used one
    chosen = slice(orders.start, orders.stop)
    return source[chosen], place[chosen]


def _make_indices(together: int, frames: int, H: int, W: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cache also serves training, which can't save inference tensors
        sequences = frames // together
        pixels = torch.arange(frames * H * W, dtype=torch.int32, device=device).view(together, sequences, H, W)
        rows = pixels.permute(1, 2, 3, 0).reshape(sequences, -1)
        columns = pixels.permute(1, 3, 2, 0).reshape(sequences, -1)
        source = torch.stack((rows, columns, rows.flip(1), columns.flip(1))).view(len(ALL), -1)
        return source, source.argsort(dim=1).int()
