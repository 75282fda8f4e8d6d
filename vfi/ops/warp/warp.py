"""Where does each pixel look in another frame? Backward warping by a flow, and flows at other sizes.

A flow is `[B, 2, H, W]`, channel 0 = dx (to the right), 1 = dy (down), in pixels of its own grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.precision import fp32_island


def backward_warp(x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
    """`[B, C, H, W]`: y[p] = x[p + flow[p]], bilinear; beyond the frame its border goes on. In the dtype of `x`.

    With `top`, flow is that of some rows of the frame, from `top` on, and y is these rows.

    Coordinates and sampling are fp32 whatever autocast says: fp16 cannot tell neighbours apart beyond 2,048 pixels.
    """
    check_flow(x, flow, top)
    return fp32_island(_backward_warp, x, flow, top or 0).to(x.dtype)


def check_flow(x: Tensor, flow: Tensor, top: int | None) -> None:
    """Raise ValueError for a flow that does not belong to a map `[B, C, H, W]`, or to rows of it from `top` on."""
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
        # on a CPU the backward pass of grid_sample would write outside of the frame where a flow is NaN; below -1 is the border
        grid = torch.fmax(grid, grid.new_full((), -1))
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """The same motion on a grid of `size` (height, width) pixels, fp32: resized bilinearly, and its values rescaled."""
    return fp32_island(_resize_flow, flow, size)


def _resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    H, W = flow.shape[2:]
    if tuple(size) == (H, W):
        return flow
    resized = F.interpolate(flow, size=size, mode="bilinear", align_corners=False, antialias=size[0] < H)
    if size[0] * W == size[1] * H:  # as a rule: one operator in place of three, and of more in the backward pass
        return resized * (size[1] / W)
    return torch.cat((resized[:, :1] * (size[1] / W), resized[:, 1:] * (size[0] / H)), dim=1)
