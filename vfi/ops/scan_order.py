"""In which order does the scan read the pixels of two frames? Interleaved, in four orders.

Tokens of frame 0 and frame 1 at the same place are neighbours: (p0, f0), (p0, f1), (p1, f0), (p1, f1), … The four orders
are rows, columns, and both reversed. Source: VFIMamba, section 3.2 (interleaved rearrangement, multi-directional scan).

A reordering is a gather of whole tokens by a cached index, and its gradient is the gather by the inverse index: one kernel
each way, and no atomic additions, so the result is the same every time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

ORDERS = 4


def interleaved_scan(x: Tensor) -> Tensor:
    """[2B, H, W, C], frame 0 of all pairs first, -> [4B, 2*H*W, C], order by order (row k*B + b: order k of pair b)."""
    frames, H, W, C = x.shape
    out = _Gather.apply(x.reshape(-1, C), *_indices(frames // 2, H, W, x.device))
    return out.view(ORDERS * frames // 2, 2 * H * W, C)


def interleaved_unscan(y: Tensor, B: int, H: int, W: int) -> Tensor:
    """[4B, 2*H*W, C] -> [4, 2B, H, W, C]: every order put back in place; each of the four inverts `interleaved_scan`."""
    C = y.shape[-1]
    return _Permute.apply(y.reshape(-1, C), *_indices(B, H, W, y.device)).view(ORDERS, 2 * B, H, W, C)


def interleaved_merge(y: Tensor, B: int, H: int, W: int) -> Tensor:
    """[4B, 2*H*W, C] -> [2B, H, W, C]: the inverse of `interleaved_scan`, summed over the four orders."""
    return interleaved_unscan(y, B, H, W).sum(0)


@functools.lru_cache(maxsize=32)
def _indices(B: int, H: int, W: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`source [4, T]`: the pixel that each place of each order reads, T = 2*B*H*W; `place [4, T]`: where each pixel went."""
    with torch.inference_mode(False):  # the cache also serves training, which can't save inference tensors
        pixels = torch.arange(2 * B * H * W, device=device).view(2, B, H, W)
        rows = pixels.permute(1, 2, 3, 0).reshape(B, -1)
        columns = pixels.permute(1, 3, 2, 0).reshape(B, -1)
        source = torch.stack((rows, columns, rows.flip(1), columns.flip(1))).view(ORDERS, -1)
        return source, source.argsort(dim=1)


class _Gather(torch.autograd.Function):
    """Pixels [T, C] -> [4 * T, C] in the four orders; the gradient of a pixel is the sum over the places it was read at."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source, place)
        return pixels.index_select(0, source.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Permute.apply(gradients[0], *ctx.saved_tensors).sum(0), None, None


class _Permute(torch.autograd.Function):
    """Tokens [4 * T, C] in the four orders -> [4, T, C], every order in the order of the pixels."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source, place)
        return tokens.index_select(0, _rows(place)).view(ORDERS, -1, tokens.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        source, _ = ctx.saved_tensors
        return gradients[0].reshape(-1, gradients[0].shape[-1]).index_select(0, _rows(source)), None, None


def _rows(index: Tensor) -> Tensor:
    """Index [4, T] inside each order -> row numbers of the four orders laid end to end."""
    T = index.shape[1]
    return (index + torch.arange(ORDERS, device=index.device).unsqueeze(1) * T).flatten()
