"""The training loss against a pyramid written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from vfi.losses import laplacian_loss

TAPS = np.array([1, 4, 6, 4, 1]) / 16


def blur(image, gain=1.0):
    for axis in (1, 2):
        image = scipy.ndimage.correlate1d(image, TAPS, axis=axis, mode="mirror")
    return image * gain


def pyramid(image, levels=5):
    """Laplacian pyramid of [C, H, W], with the coarse image at the end."""
    bands = []
    for _ in range(levels):
        coarse = blur(image)[:, ::2, ::2]
        spread = np.zeros_like(image)
        spread[:, ::2, ::2] = coarse
        bands.append(image - blur(spread, gain=4.0))
        image = coarse
    return [*bands, image]


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (75, 131)])
def test_sum_of_l1_over_two_pyramids(size):
    generator = np.random.default_rng(0)
    prediction, truth = generator.random((2, 3, *size))
    expected = sum(np.abs(a - b).mean() for a, b in zip(pyramid(prediction), pyramid(truth), strict=True))
    tensors = [torch.from_numpy(image)[None] for image in (prediction, truth)]
    torch.testing.assert_close(laplacian_loss(*tensors), torch.tensor(expected, dtype=torch.float64))


def test_constant_error_counts():
    """A wrong mean colour lies in the coarse image alone; without it the loss would be blind to it."""
    truth = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    loss = laplacian_loss(truth + 0.1, truth)
    torch.testing.assert_close(loss, torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_fp32_under_autocast(dtype):
    prediction, truth = torch.rand(2, 1, 3, 64, 64)
    with torch.autocast("cpu", dtype=dtype):
        inside = laplacian_loss(prediction, truth)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, laplacian_loss(prediction, truth), rtol=0, atol=0)


def test_too_small():
    with pytest.raises(ValueError, match="at least 64"):
        laplacian_loss(torch.zeros(1, 3, 63, 80), torch.zeros(1, 3, 63, 80))
