"""Interpolate frames that are too large to process at once in overlapping tiles, whose borders are blended.

    imgt = tiled(predict, img0, img1, side=1024)          # predict(img0, img1) -> [N, 3, h, w]

The memory is that of a single tile. A pixel's weight grows from the border of a tile inwards, so that no seam shows. The result
differs from that of the whole frame where motion comes from beyond a tile's overlap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 128
"""Pixels that neighbouring tiles share."""
SMALLEST = 2 * OVERLAP
"""Side of the smallest tile."""
_STEP = 64  # sides are multiples of it: networks pad to it at the smallest scale

Predict = Callable[[Tensor, Tensor], Tensor]


def tiled(predict: Predict, img0: Tensor, img1: Tensor, side: int) -> Tensor:
    """Interpolate `[N, 3, H, W]` between two `[1, 3, H, W]` in tiles of at most `side` pixels a side, or whole if they fit."""
    height, width = img0.shape[-2:]
    rows, columns = spans(height, side), spans(width, side)
    if len(rows) == len(columns) == 1:
        return predict(img0, img1)
    total: Tensor | None = None
    weights = img0.new_zeros(height, width)
    for top, bottom in rows:
        for left, right in columns:
            made = predict(img0[..., top:bottom, left:right], img1[..., top:bottom, left:right])
            weight = _ramp(top, bottom, height, img0)[:, None] * _ramp(left, right, width, img0)
            if total is None:
                total = made.new_zeros(*made.shape[:2], height, width)
            total[..., top:bottom, left:right] += made * weight
            weights[top:bottom, left:right] += weight
    assert total is not None
    return total / weights


def spans(length: int, side: int) -> list[tuple[int, int]]:
    """Return start and end of the tiles along an axis: as few as possible, of one size, each sharing OVERLAP with the next."""
    if length <= side:
        return [(0, length)]
    count = -(-(length - OVERLAP) // (side - OVERLAP))
    size = -(-(length + (count - 1) * OVERLAP) // (count * _STEP)) * _STEP
    size = min(size, side, length)
    return [(start, start + size) for start in (round(number * (length - size) / (count - 1)) for number in range(count))]


def smaller(side: int) -> int | None:
    """Return the next side to try when tiles of `side` don't fit into memory; None when there is none."""
    half = max(SMALLEST, side // 2 // _STEP * _STEP)
    return half if half < side else None


def _ramp(start: int, end: int, length: int, like: Tensor) -> Tensor:
    """Return the weights along an axis of a tile: a ramp up over the overlap, 1, a ramp down; no ramp at frame borders."""
    place = torch.arange(start, end, device=like.device, dtype=like.dtype) + 0.5
    up = (place - start) / OVERLAP if start else torch.ones_like(place)
    down = (end - place) / OVERLAP if end < length else torch.ones_like(place)
    return torch.minimum(up, down).clamp(max=1)
