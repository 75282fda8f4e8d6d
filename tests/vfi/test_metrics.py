"""PSNR and SSIM against independent implementations: scikit-image, and scipy in float64 with the full 11×11×11 kernel."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vfi.metrics import PSNR_MAX, interpolation_error, psnr, ssim_matlab, ssim_skimage


def _pair(height: int, width: int, seed: int = 0, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A smooth coloured picture and a disturbed copy, float64 [B, 3, H, W] in [0, 1]."""
    rng = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(rng.random((batch, 3, height, width)), (0, 0, 1.5, 1.5))
    truth = (truth - truth.min()) / (truth.max() - truth.min())
    return np.clip(truth + 0.08 * rng.standard_normal(truth.shape), 0, 1), truth


def _ssim_brute(x: np.ndarray, y: np.ndarray, mode: str = "nearest", colours: bool = True) -> float:
    """The definition, with the three-dimensional kernel in one piece; [3, H, W] in float64."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    across = line if colours else (np.arange(-5, 6) == 0).astype(float)
    kernel = across[:, None, None] * line[None, :, None] * line[None, None, :]
    kernel /= kernel.sum()

    def mean(volume: np.ndarray) -> np.ndarray:
        return ndimage.correlate(volume, kernel, mode=mode, cval=0.0)

    c1, c2 = 0.01**2, 0.03**2
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_psnr_is_that_of_scikit_image() -> None:
    prediction, truth = _pair(37, 53, batch=3)
    expected = [peak_signal_noise_ratio(t, p, data_range=1) for p, t in zip(prediction, truth, strict=True)]
    got = psnr(torch.from_numpy(prediction), torch.from_numpy(truth))
    assert got.shape == (3,)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    single = psnr(torch.from_numpy(prediction).float(), torch.from_numpy(truth).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5)


def test_psnr_of_a_known_error() -> None:
    truth = torch.full((2, 3, 8, 8), 0.5)
    prediction = torch.stack([truth[0] + 0.1, truth[1] - 0.01])
    np.testing.assert_allclose(psnr(prediction, truth).numpy(), [20.0, 40.0], atol=1e-3)


def test_equal_images_and_nan() -> None:
    image = torch.rand(2, 3, 16, 16)
    assert psnr(image, image).tolist() == [PSNR_MAX, PSNR_MAX]
    np.testing.assert_allclose(ssim_matlab(image, image).numpy(), 1.0, atol=1e-6)
    broken = image.clone()
    broken[1, 0, 3, 3] = torch.nan
    assert torch.isnan(psnr(broken, image)).tolist() == [False, True]
    assert torch.isnan(ssim_matlab(broken, image)).tolist() == [False, True]


@pytest.mark.parametrize(("height", "width"), [(64, 48), (33, 71), (11, 11), (7, 5), (1, 1)])
def test_ssim_is_the_brute_force_one(height: int, width: int) -> None:
    prediction, truth = _pair(height, width, seed=height, batch=2) if min(height, width) > 1 else _pixels()
    expected = [_ssim_brute(p, t) for p, t in zip(prediction, truth, strict=True)]
    got = ssim_matlab(torch.from_numpy(prediction), torch.from_numpy(truth))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10)
    single = ssim_matlab(torch.from_numpy(prediction).float(), torch.from_numpy(truth).float())
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-5)


def _pixels() -> tuple[np.ndarray, np.ndarray]:
    """Images of a single pixel."""
    rng = np.random.default_rng(5)
    return rng.random((2, 3, 1, 1)), rng.random((2, 3, 1, 1))


def test_ssim_is_no_other_kind() -> None:
    """The other kinds differ by far more than the error of ours, so the test above tells them apart."""
    prediction, truth = _pair(40, 40, seed=3)
    ours = ssim_matlab(torch.from_numpy(prediction), torch.from_numpy(truth)).item()
    channelwise = _ssim_brute(prediction[0], truth[0], colours=False)
    zero_padded = _ssim_brute(prediction[0], truth[0], mode="constant")
    mirrored = _ssim_brute(prediction[0], truth[0], mode="mirror")
    other = structural_similarity(prediction[0], truth[0], data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5)
    for value in (channelwise, zero_padded, mirrored, other):
        assert abs(ours - value) > 1e-4


def test_ssim_of_flat_bright_images_keeps_its_digits() -> None:
    """Both variances are nearly zero there: the worst case for float32."""
    rng = np.random.default_rng(0)
    truth = 0.97 + 0.001 * rng.random((1, 3, 48, 48))
    prediction = truth + 0.002 * rng.random(truth.shape)
    expected = _ssim_brute(prediction[0], truth[0])
    got = ssim_matlab(torch.from_numpy(prediction).float(), torch.from_numpy(truth).float()).item()
    assert got == pytest.approx(expected, abs=5e-5)


def test_autocast_and_half_precision_do_not_reach_the_metrics() -> None:
    prediction, truth = (torch.from_numpy(image).float() for image in _pair(32, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = psnr(prediction, truth), ssim_matlab(prediction, truth)
    assert torch.equal(inside[0], psnr(prediction, truth))
    assert torch.equal(inside[1], ssim_matlab(prediction, truth))
    half = prediction.bfloat16()
    assert torch.equal(psnr(half, truth), psnr(half.float(), truth))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) and \(1, 3, 8, 9\)"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="expected two tensors"):
        ssim_matlab(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))


def test_interpolation_error_is_the_mean_difference_of_bytes():
    x, y = torch.rand(2, 3, 9, 12, dtype=torch.float64) * 1.2 - 0.1, torch.rand(2, 3, 9, 12, dtype=torch.float64)
    for image in range(2):
        total = 0
        for a, b in zip(x[image].flatten().tolist(), y[image].flatten().tolist(), strict=True):
            total += abs(round(min(max(a, 0), 1) * 255) - round(b * 255))
        assert interpolation_error(x, y)[image].item() == pytest.approx(total / (3 * 9 * 12), rel=1e-12)


def test_ssim_skimage_is_that_of_eight_bit_images():
    x, y = torch.rand(2, 3, 9, 12), torch.rand(2, 3, 9, 12)
    for image in range(2):
        eight = [(t[image] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for t in (y, x)]
        assert ssim_skimage(x, y)[image].item() == structural_similarity(*eight, data_range=255, channel_axis=-1)
