"""Laplacian pyramid loss: its reference and the choice of the fused kernels."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.precision import fp32_island
from vfi.ops.triton.availability import select_fused

LEVELS = 5


def laplacian_loss(prediction: Tensor, truth: Tensor, backend: str = "auto") -> Tensor:
    """Return the mean absolute difference of the Laplacian pyramids, summed over five levels and the remaining coarse image.

    `[B, C, H, W]` twice, sides of at least 64 -> `[]`; for N predictions `[N, B, C, H, W]` -> `[N]`. Source: the loss of
    EMA-VFI
    and VFIMamba (5 levels, 5x5 binomial filter, plain sum), which omits the coarse image: then nothing constrains the mean
    colour. The pyramid is linear, so a single pyramid of the difference suffices. `backend`: --loss_backend; float64 uses
    torch.
    """
    fused, _ = choose_loss(backend, truth.device)
    return fp32_island(_laplacian_loss, prediction, truth, fused)


@functools.cache
def choose_loss(backend: str, device: torch.device) -> tuple[bool, str]:
    """Return whether fused kernels compute the pyramid (vfi/ops/loss/laplacian_kernels.py), and a line with the reason."""
    return select_fused("loss", backend, device)


def _laplacian_loss(prediction: Tensor, truth: Tensor, fused: bool = False) -> Tensor:
    if min(truth.shape[2:]) < 2 ** (LEVELS + 1):
        raise ValueError(f"images are {list(truth.shape[2:])}; {LEVELS} levels need sides of at least {2 ** (LEVELS + 1)}")
    several, difference = prediction.shape[:-4], prediction - truth
    if fused and difference.dtype == torch.float32:
        from vfi.ops.loss.laplacian_kernels import pyramid_sizes

        return pyramid_sizes(difference.reshape(-1, *truth.shape), LEVELS).reshape(several)

    def size(band: Tensor) -> Tensor:
        return band.abs().reshape(*several, -1).mean(-1)

    current = difference.reshape(-1, *truth.shape[1:])
    sizes = []
    for _ in range(LEVELS):
        coarse = _shrunk(current)
        sizes.append(size(current - _expanded(coarse, current.shape)))
        current = coarse
    return torch.stack([*sizes, size(current)]).sum(0)


@functools.cache  # otherwise they would be copied to the GPU, with a wait, dozens of times per step
def _filters(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 5x5 binomial filter for each channel, and its four 3x3 phases for upsampling.

    The latter are its effect, times four, on an image with a pixel in every second column of every second row and zeros between
    them: one 3x3 filter of these pixels for each of the four positions.
    """
    with torch.inference_mode(False):
        taps = torch.tensor([1, 4, 6, 4, 1], dtype=dtype, device=device) / 16
        between = torch.tensor([[1, 6, 1], [0, 4, 4]], dtype=dtype, device=device) / 8
        places = torch.einsum("ai,bj->abij", between, between).reshape(4, 1, 3, 3)
        return torch.outer(taps, taps).expand(channels, 1, 5, 5).contiguous(), places.repeat(channels, 1, 1, 1)


def _shrunk(x: Tensor) -> Tensor:
    """Return `x` at half the size, rounded up: filtered with reflected edges, then every second pixel."""
    channels = x.shape[1]
    return F.conv2d(_padded(x, (2, 2, 2, 2), "reflect"), _filters(channels, x.dtype, x.device)[0], stride=2, groups=channels)


def _expanded(coarse: Tensor, shape: torch.Size) -> Tensor:
    """Return `coarse` at twice the size: zeros in between, then the filter with four times its weight and reflected edges."""
    channels, (odd_h, odd_w) = coarse.shape[1], (side % 2 for side in shape[2:])
    # the edge lies on a pixel, or one position beyond it
    x = _padded(coarse, (1, odd_w, 1, odd_h), "reflect")
    x = _padded(x, (0, 1 - odd_w, 0, 1 - odd_h), "replicate")
    x = F.pixel_shuffle(F.conv2d(x, _filters(channels, x.dtype, x.device)[1], groups=channels), 2)
    return x[:, :, : shape[2], : shape[3]]


def _padded(x: Tensor, sides: tuple[int, int, int, int], mode: str) -> Tensor:
    """Return `F.pad(x, sides, mode)` for reflect and replicate, whose own backward passes are not deterministic on a GPU."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.pad(x, sides, mode)
    skipped = int(mode == "reflect")  # reflection does not repeat the edge itself
    for axis, before, after in ((2, *sides[2:]), (3, *sides[:2])):
        end = x.shape[axis] - skipped
        x = torch.cat((x.narrow(axis, skipped, before).flip(axis), x, x.narrow(axis, end - after, after).flip(axis)), dim=axis)
    return x
