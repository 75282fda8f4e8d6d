"""Image quality of a predicted frame against the ground truth: PSNR and SSIM, one value for each image.

    psnr(prediction, truth), ssim_matlab(prediction, truth)      # and ssim_skimage, interpolation_error
    psnr_in(prediction, truth, region)                           # of a part of the image
    psnr_of_changes(predictions, truths, img0, img1)             # of consecutive frames: temporal consistency

All take RGB in [0, 1], `[B, 3, H, W]`, and return `[B]`. They compute in float32 (float64 if given float64), also under
autocast, and without convolutions, so that TF32 cannot round them on a GPU. The SSIM that the repositories of the field call
`ssim_matlab` is neither scikit-image's nor TensorFlow's, and its values must not be compared with theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vfi.ops.precision import fp32_island

PSNR_MAX = 100.0
"""PSNR of equal images in dB: the formula gives infinity, which would dominate every mean."""

_RADIUS = 5
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, −10·log10 of the mean squared error over colours and pixels.

    `[B, 3, H, W]` in [0, 1] -> `[B]`, at most PSNR_MAX. Values are neither rounded nor clamped. NaN stays NaN.
    """
    return fp32_island(_psnr, *_comparable(prediction, truth))


def psnr_in(prediction: Tensor, truth: Tensor, region: Tensor) -> Tensor:
    """Return `psnr` over the pixels of `region`, `[B, 1, H, W]` bool; pixels outside have no influence, even if NaN.

    `[B, 3, H, W]` in [0, 1] -> `[B]`; NaN for an image with an empty region, where there is nothing to compare.
    """
    prediction, truth = _comparable(prediction, truth)
    wanted = (len(truth), 1, *truth.shape[2:])
    if region.dtype != torch.bool or region.shape != wanted:
        raise ValueError(f"expected a region {wanted} of bool, got {tuple(region.shape)} of {region.dtype}")
    return fp32_island(_psnr_in, prediction, truth, region)


def psnr_of_changes(predictions: Sequence[Tensor], truths: Sequence[Tensor], img0: Tensor, img1: Tensor) -> Tensor:
    """Return the temporal consistency in dB, at most PSNR_MAX: the PSNR of the changes from frame to frame.

    Of the n frames between `img0` and `img1`, each `[B, 3, H, W]` in [0, 1] -> `[B]`: −10·log10 of the mean of (Δp − Δt)² over
    all n + 1 changes img0 → f1 → … → fn → img1, colours and pixels; Δp is a change of the predicted sequence, Δt the true one.
    An error that is constant over the frames counts only where it appears and disappears; one that alternates counts each time.
    For n = 1 it is `psnr`: both changes have the error of the single frame. img0 and img1 are in both sequences, and their
    content cancels out.
    """
    shapes = [tuple(frame.shape) for frame in (img0, *predictions, *truths, img1)]
    if not predictions or len(predictions) != len(truths) or len(set(shapes)) != 1:
        raise ValueError(
            f"expected as many predictions as true frames, at least one, all of one shape; got {len(predictions)} and "
            f"{len(truths)}, of shapes {', '.join(map(str, dict.fromkeys(shapes)))}"
        )
    pairs = zip((img0, *predictions, img1), (img0, *truths, img1), strict=True)
    return fp32_island(_psnr_of_changes, *(frame for pair in pairs for frame in _comparable(*pair)))


def ssim_matlab(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of the colour × H × W volume: 3-D Gaussian 11×11×11, σ 1.5, K1 .01, K2 .03, range 1.

    `[B, 3, H, W]` in [0, 1] -> `[B]`, the mean of the map; 1 for equal images. The volume has a single channel and is padded by
    replication (also along the three colours). Images are processed one by one, to bound the memory.
    """
    return fp32_island(_ssim_matlab, *_comparable(prediction, truth))


def ssim_skimage(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return scikit-image's structural similarity of 8-bit images: means over 7x7 pixels, per colour, without the border.

    `[B, 3, H, W]` in [0, 1] -> `[B]` float64. Both are rounded to 8 bits; the sides must be at least 7.
    """
    from skimage.metrics import structural_similarity  # takes a second to import, and few protocols use it

    pairs = zip(*(_bytes(image).permute(0, 2, 3, 1).cpu().numpy() for image in _comparable(prediction, truth)), strict=True)
    values = [structural_similarity(y, x, data_range=255, channel_axis=-1) for x, y in pairs]
    return torch.tensor(values, dtype=torch.float64)


def interpolation_error(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return the mean of |prediction - truth| over pixels and colours of 8-bit images (IE of the Middlebury benchmark).

    `[B, 3, H, W]` in [0, 1] -> `[B]`, from 0 to 255. Both are rounded to 8 bits.
    """
    x, y = (_bytes(image).double() for image in _comparable(prediction, truth))
    return (x - y).abs().flatten(1).mean(1)


def _bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _comparable(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return both images in one floating-point dtype, at least float32; raise ValueError for shapes that do not match."""
    if prediction.shape != truth.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
        raise ValueError(f"expected two tensors [B, 3, H, W], got {tuple(prediction.shape)} and {tuple(truth.shape)}")
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, truth.dtype), torch.float32)
    return prediction.to(dtype), truth.to(dtype)


def _psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    return _decibels((prediction - truth).square().flatten(1).mean(1))


def _psnr_in(prediction: Tensor, truth: Tensor, region: Tensor) -> Tensor:
    squares = (prediction - truth).square().mean(1, keepdim=True)
    inside = torch.where(region, squares, 0.0)  # not a product, because NaN times 0 is NaN
    return _decibels(inside.flatten(1).sum(1) / region.flatten(1).sum(1))


def _psnr_of_changes(*frames: Tensor) -> Tensor:
    """Compute `psnr_of_changes` from predicted and true frames in alternation, in temporal order."""
    predicted, true = (itertools.pairwise(frames[start::2]) for start in (0, 1))
    changes = zip(predicted, true, strict=True)
    errors = [((p1 - p0) - (t1 - t0)).square().flatten(1).mean(1) for (p0, p1), (t0, t1) in changes]
    return _decibels(torch.stack(errors).mean(0))


def _decibels(mse: Tensor) -> Tensor:
    return -10 * torch.log10(mse.clamp(min=10 ** (-PSNR_MAX / 10)))


def _ssim_matlab(prediction: Tensor, truth: Tensor) -> Tensor:
    return torch.stack([_ssim_map(x, y).mean() for x, y in zip(prediction, truth, strict=True)])


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of every voxel, `[3, H, W]`."""
    mean_x, mean_y = _blur(x), _blur(y)
    spread = _blur(x * x + y * y) - mean_x.square() - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return numerator / ((mean_x.square() + mean_y.square() + _C1) * (spread + _C2))


def _blur(volume: Tensor) -> Tensor:
    """Return the Gaussian mean of a volume with replicated borders, axis by axis, each a weighted sum of shifted copies."""
    offsets = range(-_RADIUS, _RADIUS + 1)
    weights = torch.exp(-torch.tensor([float(offset) ** 2 for offset in offsets], dtype=torch.float64) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis, size in enumerate(volume.shape):
        index = torch.arange(-_RADIUS, size + _RADIUS, device=volume.device).clamp(0, size - 1)
        padded = volume.index_select(axis, index)
        volume = torch.zeros_like(volume)
        for i, weight in enumerate(weights.tolist()):
            volume.add_(padded.narrow(axis, i, size), alpha=weight)
    return volume
