"""Backward warping by a flow, and resizing of flows.

A flow is `[B, 2, H, W]`, channel 0 = dx (to the right), 1 = dy (down), in pixels of its own grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.precision import fp32_island


def backward_warp(x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
    """Warp `[B, C, H, W]`: y[p] = x[p + flow[p]], bilinear, with the border replicated beyond the frame. In the dtype of `x`.

    With `top`, flow has only some rows of the frame, from `top` on, and so has y.

    Coordinates and sampling are always fp32, also under autocast: fp16 cannot distinguish adjacent pixels beyond 2,048.
    """
    check_flow(x, flow, top)
    return fp32_island(_backward_warp, x, flow, top or 0).to(x.dtype)


def check_flow(x: Tensor, flow: Tensor, top: int | None) -> None:
    """Raise ValueError for a flow that does not fit a map `[B, C, H, W]`, or rows of it from `top` on."""
    B, _, H, W = x.shape
    rows = H if top is None else flow.shape[2]
    if flow.shape != (B, 2, rows, W):
        raise ValueError(f"a flow for {list(x.shape)} must be {[B, 2, rows, W]}; given {list(flow.shape)}")
    if top is not None and not 0 <= top <= H - rows:
        raise ValueError(f"{rows} rows from {top} on are not in a map of {H} rows")


def _backward_warp(x: Tensor, flow: Tensor, top: int = 0) -> Tensor:
    H, W = x.shape[2:]
    rows = torch.arange(top, top + flow.shape[2], device=x.device, dtype=flow.dtype).view(1, -1, 1)
    columns = torch.arange(W, device=x.device, dtype=flow.dtype).view(1, 1, W)
    # grid_sample counts from -1 (centre of the first pixel) to 1 (centre of the last)
    across = (columns + flow[:, 0]) * (2 / max(W - 1, 1)) - 1
    down = (rows + flow[:, 1]) * (2 / max(H - 1, 1)) - 1
    grid = torch.stack((across, down), dim=-1).to(x.dtype)
    if x.device.type == "cpu" and torch.is_grad_enabled():
        grid = clamp_to_border(grid)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)


def clamp_to_border(grid: Tensor) -> Tensor:
    """Return coordinates from -1 up, NaN as -1: the border, as in a forward pass and in the Triton kernel.

    A run that explodes must come as far as the gradient monitor, so coordinates stay usable in a backward pass.
    """
    return torch.fmax(grid, grid.new_full((), -1))


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the same motion on a grid of `size` (height, width) pixels, in fp32: resized bilinearly, with rescaled values."""
    return fp32_island(_resize_flow, flow, size)


def _resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    H, W = flow.shape[2:]
    if tuple(size) == (H, W):
        return flow
    resized = F.interpolate(flow, size=size, mode="bilinear", align_corners=False, antialias=size[0] < H)
    if size[0] * W == size[1] * H:  # the usual case: one operator instead of three, and of more in the backward pass
        return resized * (size[1] / W)
    return torch.cat((resized[:, :1] * (size[1] / W), resized[:, 1:] * (size[0] / H)), dim=1)
