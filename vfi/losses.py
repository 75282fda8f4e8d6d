"""How far is a prediction from the truth, for training? L1 between Laplacian pyramids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.precision import fp32_island

LEVELS = 5


def laplacian_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Sum over five levels, and the coarse image left below them, of the mean absolute difference of the Laplacian pyramids.

    `[B, C, H, W]`, sides from 64 up. Source: the loss of EMA-VFI and VFIMamba (5 levels, 5x5 binomial filter, plain sum),
    which leaves the coarse image out: then nothing holds the mean colour. The pyramid is linear, so one pyramid of the
    difference does for two.
    """
    return fp32_island(_laplacian_loss, prediction, truth)


def _laplacian_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    if min(truth.shape[2:]) < 2 ** (LEVELS + 1):
        raise ValueError(f"images are {list(truth.shape[2:])}; {LEVELS} levels need sides of at least {2 ** (LEVELS + 1)}")
    current = prediction - truth
    total = current.new_zeros(())
    for _ in range(LEVELS):
        coarse = _blur(current)[:, :, ::2, ::2]
        total = total + (current - _expand(coarse, current.shape)).abs().mean()
        current = coarse
    return total + current.abs().mean()


def _expand(coarse: Tensor, shape: torch.Size) -> Tensor:
    """Twice the size: zeros in between, then the blur with four times its weight."""
    spread = coarse.new_zeros(shape)
    spread[:, :, ::2, ::2] = coarse
    return 4 * _blur(spread)


def _blur(x: Tensor) -> Tensor:
    """The 5x5 binomial filter, one axis after the other; edges are reflected."""
    channels = x.shape[1]
    taps = x.new_tensor([1, 4, 6, 4, 1]) / 16
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    x = F.conv2d(x, taps.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)
