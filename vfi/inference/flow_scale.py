"""At which fraction of the frames' size should flow be estimated? So that it is no longer than what networks are trained on.

    scale = auto_scale(img0, img1)                       # 1, 0.5 or 0.25

Published results on 2K and 4K are of 0.5 and 0.25 throughout. But where little moves, the full size sees more; and where much
moves, no size is small enough to do without. So it is decided pair by pair, from both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.config.configs import SCALES
from vfi.metrics.motion import shrunk_grey

REACH = 64.0
"""Pixels, at the scale that is chosen, that nearly all motion stays below: a quarter of the usual crop of 256."""
LARGEST = 1088 * 1920
"""Pixels of a frame for which flow is estimated at full size, whatever moves: a larger one takes memory that is not there."""
_SIDE = 160  # pixels of the longer side, to which frames are shrunk
_RADIUS = 12  # of the search, in those pixels
_WINDOW = 5  # side of what is compared
_PENALTY = 1e-4  # for each pixel of motion: where nothing can be told, nothing moves
_NEARLY_ALL = 0.95


def auto_scale(img0: Tensor, img1: Tensor) -> float:
    """The largest of SCALES that suits two frames `[1, 3, H, W]` in [0, 1], by their size and by what moves between them."""
    height, width = img0.shape[-2:]
    motion = longest_motion(img0, img1)
    scales = sorted(SCALES, reverse=True)
    fitting = (one for one in scales if motion * one <= REACH and height * width * one**2 <= LARGEST)
    return next(fitting, scales[-1])


def longest_motion(img0: Tensor, img1: Tensor) -> float:
    """How far nearly everything moves at most, in pixels of the frames: the 95th percentile, found by comparing windows.

    To within a 160th of the longer side, and up to 12 of those.
    """
    grey0, grey1 = shrunk_grey(img0, _SIDE), shrunk_grey(img1, _SIDE)
    size, shrink = grey0.shape[2:], max(1.0, max(img0.shape[-2:]) / _SIDE)
    side = 2 * _RADIUS + 1
    moved = F.unfold(F.pad(grey1, [_RADIUS] * 4, mode="replicate"), side).view(1, side * side, *size)
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, device=img0.device)
    length = torch.cartesian_prod(offsets, offsets).float().norm(dim=1)
    cost = F.avg_pool2d((moved - grey0).abs(), _WINDOW, 1, _WINDOW // 2, count_include_pad=False)
    best = (cost + _PENALTY * length.view(1, -1, 1, 1)).argmin(dim=1)
    return shrink * torch.quantile(length[best].flatten(), _NEARLY_ALL).item()
