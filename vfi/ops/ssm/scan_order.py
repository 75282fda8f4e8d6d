"""In which order does the scan read the pixels of two frames? Interleaved or each frame alone, both in four orders.

The four orders are rows, columns, and both reversed. A sequence holds

- interleaved: both frames of a pair; tokens at the same place are neighbours: (p0, f0), (p0, f1), (p1, f0), (p1, f1), …
- flip: one frame.

Sources: VFIMamba, section 3.2 (interleaved rearrangement), VMamba (arXiv 2401.10166, the cross-scan of one image).

A reordering is a gather of whole tokens by a cached index, and its gradient is the gather by the inverse index: one kernel
each way, and no atomic additions, so the result is the same every time. `OPEN_SCANS` do the same by transposing and reversing,
without an index: for a network that is traced, in which H and W stay open.
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
"""The four orders. Every function here also takes a part of them, so that few tokens are in memory at a time."""
_CACHE_BYTES = 64 * 2**20
"""What the cached indices may hold; one of a 4096x2304 pair at stride 8 has 9 MiB."""


def interleaved_scan(x: Tensor, orders: range = ALL) -> Tensor:
    """[2B, H, W, C], frame 0 of all pairs first, -> [4B, 2*H*W, C], order by order (row k*B + b: order k of pair b)."""
    return _scan(x, 2, orders)


def interleaved_unscan(y: Tensor, B: int, H: int, W: int, orders: range = ALL) -> Tensor:
    """[4B, 2*H*W, C] -> [4, 2B, H, W, C]: every order put back in place; each of the four inverts `interleaved_scan`."""
    return _unscan(y, 2, B, H, W, orders)


def interleaved_merge(y: Tensor, B: int, H: int, W: int) -> Tensor:
    """[4B, 2*H*W, C] -> [2B, H, W, C]: the inverse of `interleaved_scan`, summed over the four orders."""
    return interleaved_unscan(y, B, H, W).sum(0)


def flip_scan(x: Tensor, orders: range = ALL) -> Tensor:
    """[2B, H, W, C] -> [4 * 2B, H*W, C], order by order and each frame alone (row k*2B + f: order k of frame f)."""
    return _scan(x, 1, orders)


def flip_unscan(y: Tensor, B: int, H: int, W: int, orders: range = ALL) -> Tensor:
    """[4 * 2B, H*W, C] -> [4, 2B, H, W, C]: every order put back in place; each of the four inverts `flip_scan`."""
    return _unscan(y, 1, B, H, W, orders)


class Scan(NamedTuple):
    """A way to read two frames."""

    scan: Callable[[Tensor, range], Tensor]
    unscan: Callable[[Tensor, int, int, int, range], Tensor]
    sequences: int
    """Sequences that the two frames of a pair make in one order; together they hold every pixel once."""


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
    """`together` frames make a sequence: [F, H, W, C] -> [orders * F / together, together * H * W, C]."""
    frames, H, W, C = x.shape
    out = _Gather.apply(x.reshape(-1, C), *_indices(together, frames, H, W, orders, x.device))
    return out.view(-1, together * H * W, C)


def _unscan(y: Tensor, together: int, B: int, H: int, W: int, orders: range) -> Tensor:
    C = y.shape[-1]
    index = _indices(together, 2 * B, H, W, orders, y.device)
    return _Permute.apply(y.reshape(-1, C), *index).view(len(orders), 2 * B, H, W, C)


class _Gather(torch.autograd.Function):
    """Pixels [T, C] -> [K * T, C] in K orders; the gradient of a pixel is the sum over the places it was read at."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source, place)
        return pixels.index_select(0, source.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Permute.apply(gradients[0], *ctx.saved_tensors).sum(0), None, None


class _Permute(torch.autograd.Function):
    """Tokens [K * T, C] in K orders -> [K, T, C], every order in the order of the pixels."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source, place)
        return tokens.index_select(0, _rows(place)).view(*place.shape, tokens.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        source, _ = ctx.saved_tensors
        return gradients[0].reshape(-1, gradients[0].shape[-1]).index_select(0, _rows(source)), None, None


def _rows(index: Tensor) -> Tensor:
    """Index [K, T] inside each order -> row numbers of the orders laid end to end."""
    K, T = index.shape
    return (index + torch.arange(0, K * T, T, dtype=index.dtype, device=index.device).unsqueeze(1)).flatten()


_cache: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()
_cache_lock = threading.Lock()


def _indices(together: int, frames: int, H: int, W: int, orders: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """`source [K, T]`: the pixel that each place of each order reads, T = frames*H*W; `place [K, T]`: where each pixel went."""
    key = (together, frames, H, W, device)
    with _cache_lock:
        known = _cache.pop(key) if key in _cache else None
        source, place = known or _make_indices(*key)
        if type(source) is Tensor:  # and not a tensor without content, as it is made where shapes alone are followed
            _cache[key] = source, place
        while len(_cache) > 1 and sum(t.nbytes for pair in _cache.values() for t in pair) > _CACHE_BYTES:
            _cache.popitem(last=False)  # the one that was not used for longest
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
