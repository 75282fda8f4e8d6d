"""Choose the scale at which flow is estimated, so that motion is no longer than what networks are trained on.

    scale = auto_scale(img0, img1)                       # 1, 0.5 or 0.25

Published results on 2K and 4K use 0.5 and 0.25 throughout. But with little motion the full size shows more detail, and with
large motion no frame size is small enough to do without. So the scale is chosen for each pair, from its size and its motion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.config.configs import SCALES
from vfi.metrics.motion import shrunk_grey

REACH = 64.0
"""Pixels, at the chosen scale, below which nearly all motion stays: a quarter of the usual crop of 256."""
LARGEST = 1088 * 1920
"""Most pixels of a frame for which flow is estimated at full size, whatever moves: larger frames need too much memory."""
_SIDE = 160  # pixels of the longer side after shrinking
_RADIUS = 12  # of the search, in pixels of the shrunk frames
_WINDOW = 5  # side of the windows that are compared
_PENALTY = 1e-4  # per pixel of motion: ambiguous places count as static
_NEARLY_ALL = 0.95


def auto_scale(img0: Tensor, img1: Tensor) -> float:
    """Return the largest of SCALES that suits two frames `[1, 3, H, W]` in [0, 1], by their size and motion."""
    height, width = img0.shape[-2:]
    motion = longest_motion(img0, img1)
    scales = sorted(SCALES, reverse=True)
    fitting = (one for one in scales if motion * one <= REACH and height * width * one**2 <= LARGEST)
    return next(fitting, scales[-1])


def longest_motion(img0: Tensor, img1: Tensor) -> float:
    """Return the 95th percentile of motion in pixels of the frames, found by comparing windows.

    The resolution is 1/160 of the longer side, and the largest motion that is found is 12 times that.
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
