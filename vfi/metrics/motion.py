"""How much moves between two frames? A flow that no network of this project has a part in, so that it can sort what they do.

    motion = estimate(img0, img1)                        # one pair, [1, 3, H, W] in [0, 1]
    motion.length                                        # mean length of the flow, in pixels
    psnr_in(prediction, truth, motion.moving)            # of vfi.metrics.image_quality: only where something moves
    Image.fromarray(flow_picture(flow))                  # any flow [2, H, W] as colours

The flow is iterative Lucas-Kanade on a pyramid (scikit-image's `optical_flow_ilk`; Le Besnerais and Champagnat, ICIP 2005).
It is made for sorting. Tried on photographs of 256×448: moved as a whole by 1 to 12 pixels, the length is right to 6 %, by 30
it is a seventh too short. With one object before a still background it is a seventh too long, at worst half or twice the true
one: the outline is not sharp.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.warp.warp import backward_warp, resize_flow

MOVING = 1.0
"""A pixel moves if its flow is longer than this, in pixels of the full frame."""
LONGER_SIDE = 448
"""Frames are shrunk to this for estimating: the time does not grow with the frame, and the pyramid reaches long motion."""

_GREY = (0.299, 0.587, 0.114)
# Of the settings tried on photographs moved by known amounts these are the fastest within a few per cent. Without the filter
# (a median before each warp) windows with little texture give vectors of any length.
_RADIUS, _WARPS, _PREFILTER = 7, 5, True
_NEIGHBOURS = 5  # pixels a side, over which staying is compared with moving: wider, and objects get a margin


class Motion(NamedTuple):
    """What moves between two frames, as seen from the first."""

    length: float
    """Mean over the frame of the length of the flow from img0 to img1, in pixels of the full frame."""
    moving: Tensor
    """`[1, 1, H, W]`, bool: pixels of img0 that move by more than MOVING until img1; on the device of the frames."""


def estimate(img0: Tensor, img1: Tensor) -> Motion:
    """The motion from img0 to img1, each `[1, 3, H, W]` in [0, 1], sides of at least 2; ValueError for other shapes.

    Computed on the CPU in fp32: half a second for 256×448, 2 to 3 for 4K. Where staying explains the change as well as the
    flow does, nothing moves: so it is beside moving objects, where Lucas-Kanade spreads their flow by the radius of its window.
    NaN in a frame makes the length NaN.
    """
    if img0.shape != img1.shape or img0.ndim != 4 or img0.shape[:2] != (1, 3) or min(img0.shape[2:]) < 2:
        raise ValueError(f"expected two tensors [1, 3, H, W], H and W from 2, got {tuple(img0.shape)} and {tuple(img1.shape)}")
    grey0, grey1 = (shrunk_grey(image, LONGER_SIDE).cpu() for image in (img0, img1))
    flow = _lucas_kanade(grey0, grey1)
    flow = torch.where(_stays(grey0, grey1, flow), 0.0, flow)
    lengths = resize_flow(flow, (img0.shape[2], img0.shape[3])).norm(dim=1, keepdim=True)
    return Motion(lengths.mean().item(), (lengths > MOVING).to(img0.device))


def shrunk_grey(image: Tensor, longer_side: int) -> Tensor:
    """`[1, 3, H, W]` -> brightness `[1, 1, h, w]` in fp32; its longer side at most `longer_side`, by area means."""
    weights = torch.tensor(_GREY, device=image.device).view(1, 3, 1, 1)
    grey = (image.detach().float() * weights).sum(1, keepdim=True)
    longer = max(grey.shape[2:])
    if longer > longer_side:
        sides = [max(2, round(side * longer_side / longer)) for side in grey.shape[2:]]
        grey = F.interpolate(grey, size=sides, mode="area")
    return grey


def _lucas_kanade(grey0: Tensor, grey1: Tensor) -> Tensor:
    """Flow `[1, 2, h, w]` for `backward_warp`: grey1 moved back by it looks like grey0."""
    from skimage.registration import optical_flow_ilk  # takes a second to import, and few jobs need it

    frames = (grey0[0, 0].numpy(), grey1[0, 0].numpy())
    rows, columns = optical_flow_ilk(*frames, radius=_RADIUS, num_warp=_WARPS, prefilter=_PREFILTER)
    return torch.from_numpy(np.stack((columns, rows))).unsqueeze(0)


def _stays(grey0: Tensor, grey1: Tensor, flow: Tensor) -> Tensor:
    """Where grey1 as it is differs no more from grey0 than grey1 moved back, in the mean of the neighbours; `[1, 1, h, w]`."""
    unmoved, moved = (
        F.avg_pool2d((grey0 - other).abs(), _NEIGHBOURS, 1, _NEIGHBOURS // 2, count_include_pad=False)
        for other in (grey1, backward_warp(grey1, flow))
    )
    return unmoved <= moved
