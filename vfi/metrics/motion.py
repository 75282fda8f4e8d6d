"""Amount of motion between two frames, from a flow that is independent of this project's networks, to sort their results by.

    motion = estimate(img0, img1)                        # one pair, [1, 3, H, W] in [0, 1]
    motion.length                                        # mean length of the flow, in pixels
    psnr_in(prediction, truth, motion.moving)            # of vfi.metrics.image_quality: only where something moves
    Image.fromarray(flow_picture(flow))                  # of vfi.metrics.flow_color: any flow [2, H, W] as colours

The flow is iterative Lucas-Kanade on a pyramid (scikit-image's `optical_flow_ilk`; Le Besnerais and Champagnat, ICIP 2005).
It is intended for sorting. In tests on photographs of 256×448 that were shifted as a whole, the length is accurate to 6 % for
shifts of 1 to 12 pixels, and a seventh too short for 30. With one object in front of a static background it is a seventh too
long, at worst half or twice the true one: the outline is not sharp.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.warp.warp import backward_warp, resize_flow

MOVING = 1.0
"""A pixel moves if its flow is longer than this, in pixels of the full frame."""
LONGER_SIDE = 448
"""Frames are reduced to this size for the estimate: the time does not grow with them, and the pyramid covers long motion."""

_GREY = (0.299, 0.587, 0.114)
# The fastest of the settings within a few per cent of the best, on photographs moved by known amounts. Without the filter (a
# median before each warp), windows with little texture give vectors of arbitrary length.
_RADIUS, _WARPS, _PREFILTER = 7, 5, True
_NEIGHBOURS = 5  # side in pixels of the area over which staying and moving are compared: a larger one adds a margin to objects


class MotionStats(NamedTuple):
    """Motion between two frames, as seen from the first."""

    length: float
    """Mean length of the flow from img0 to img1 over the frame, in pixels of the full frame."""
    moving: Tensor
    """`[1, 1, H, W]`, bool: pixels of img0 that move by more than MOVING to img1; on the device of the frames."""


FlowMethod = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Brightness `[h, w]` of two frames, fp32 -> flow `[2, h, w]`, (dx, dy) in pixels, for `backward_warp` from the second one."""


def lucas_kanade(grey0: np.ndarray, grey1: np.ndarray) -> np.ndarray:
    """Return the flow that warps grey1 to look like grey0, see FlowMethod."""
    from skimage.registration import optical_flow_ilk  # takes a second to import, and few commands need it

    rows, columns = optical_flow_ilk(grey0, grey1, radius=_RADIUS, num_warp=_WARPS, prefilter=_PREFILTER)
    return np.stack((columns, rows))


@contextlib.contextmanager
def flow_processes(number: int) -> Iterator[FlowMethod]:
    """Compute `lucas_kanade` in processes, for threads that call it at the same time; without a number in the caller itself.

    In threads alone it is no faster than in one: most of its time it holds Python's lock.
    """
    if not number:
        yield lucas_kanade
        return
    copies = multiprocessing.get_context("fork")  # they only compute with NumPy, and start without importing torch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        with ProcessPoolExecutor(number, copies, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            yield lambda grey0, grey1: pool.submit(lucas_kanade, grey0, grey1).result()


def estimate(img0: Tensor, img1: Tensor, flow_method: FlowMethod = lucas_kanade) -> MotionStats:
    """Estimate the motion from img0 to img1, each `[1, 3, H, W]` in [0, 1], sides of at least 2; ValueError for other shapes.

    It is computed on the CPU in fp32: half a second for 256×448, 2 to 3 for 4K. Where no motion explains the change as well as
    the flow does, nothing moves: this is the case next to moving objects, where Lucas-Kanade spreads their flow by the radius
    of its window. NaN in a frame makes the length NaN.
    """
    if img0.shape != img1.shape or img0.ndim != 4 or img0.shape[:2] != (1, 3) or min(img0.shape[2:]) < 2:
        raise ValueError(f"expected two tensors [1, 3, H, W], H and W from 2, got {tuple(img0.shape)} and {tuple(img1.shape)}")
    grey0, grey1 = (shrunk_grey(image, LONGER_SIDE).cpu() for image in (img0, img1))
    flow = torch.from_numpy(flow_method(grey0[0, 0].numpy(), grey1[0, 0].numpy())).unsqueeze(0)
    flow = torch.where(_stays(grey0, grey1, flow), 0.0, flow)
    lengths = resize_flow(flow, (img0.shape[2], img0.shape[3])).norm(dim=1, keepdim=True)
    return MotionStats(lengths.mean().item(), (lengths > MOVING).to(img0.device))


def shrunk_grey(image: Tensor, longer_side: int) -> Tensor:
    """Return the brightness `[1, 1, h, w]` of `[1, 3, H, W]` in fp32, reduced to at most `longer_side` by area means."""
    weights = torch.tensor(_GREY, device=image.device).view(1, 3, 1, 1)
    grey = (image.detach().float() * weights).sum(1, keepdim=True)
    longer = max(grey.shape[2:])
    if longer > longer_side:
        sides = [max(2, round(side * longer_side / longer)) for side in grey.shape[2:]]
        grey = F.interpolate(grey, size=sides, mode="area")
    return grey


def _stays(grey0: Tensor, grey1: Tensor, flow: Tensor) -> Tensor:
    """Return where grey1 differs no more from grey0 than the warped grey1, averaged over the neighbourhood; `[1, 1, h, w]`."""
    unmoved, moved = (
        F.avg_pool2d((grey0 - other).abs(), _NEIGHBOURS, 1, _NEIGHBOURS // 2, count_include_pad=False)
        for other in (grey1, backward_warp(grey1, flow))
    )
    return unmoved <= moved
