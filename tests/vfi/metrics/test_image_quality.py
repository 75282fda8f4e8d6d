"""PSNR and SSIM against independent implementations: scikit-image, scipy in float64 with the full 11×11×11 kernel, loops."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vfi.metrics.image_quality import PSNR_MAX, interpolation_error, psnr, psnr_in, psnr_of_changes, ssim_matlab, ssim_skimage


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


def test_psnr_in_is_that_of_the_pixels_one_by_one():
    prediction, truth = _pair(9, 13, batch=3)
    region = np.random.default_rng(1).random((3, 1, 9, 13)) < 0.3
    expected = []
    for image in range(3):
        squares = [
            (prediction[image, colour, row, column] - truth[image, colour, row, column]) ** 2
            for row in range(9)
            for column in range(13)
            for colour in range(3)
            if region[image, 0, row, column]
        ]
        expected.append(-10 * math.log10(sum(squares) / len(squares)))
    tensors = torch.from_numpy(prediction), torch.from_numpy(truth)
    got = psnr_in(*tensors, torch.from_numpy(region))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    single = psnr_in(*(image.float() for image in tensors), torch.from_numpy(region))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5)


def test_psnr_in_sees_the_region_and_nothing_else():
    prediction, truth = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(psnr_in(prediction, truth, torch.ones(4, 1, 8, 8, dtype=torch.bool)), psnr(prediction, truth))
    region = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    region[:3, :, 2:5, 3:6] = True
    prediction[0, :, 2:5, 3:6] = truth[0, :, 2:5, 3:6]  # right inside
    prediction[1, 0, 0, 0] = torch.nan  # outside
    prediction[2, 0, 3, 4] = torch.nan  # inside
    first, second, third, empty = psnr_in(prediction, truth, region).tolist()
    assert first == PSNR_MAX
    assert 0 < second < 20
    assert math.isnan(third)
    assert math.isnan(empty)


def test_psnr_in_refuses_other_regions():
    image = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected a region \(2, 1, 8, 8\) of bool, got \(2, 3, 8, 8\) of torch.bool"):
        psnr_in(image, image, image > 0.5)
    with pytest.raises(ValueError, match=r"got \(2, 1, 8, 8\) of torch.float32"):
        psnr_in(image, image, image[:, :1])


def _sequence(frames: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(frames)
    return [torch.rand(batch, 3, 5, 7, dtype=torch.float64, generator=generator) for _ in range(frames)]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_psnr_of_changes_is_that_of_the_pixels_one_by_one(n: int):
    img0, img1, *frames = _sequence(2 * n + 2)
    predictions, truths = frames[:n], frames[n:]
    expected = []
    for image in range(2):
        predicted, true = ([frame[image].flatten().tolist() for frame in (img0, *row, img1)] for row in (predictions, truths))
        squares = [
            ((predicted[i + 1][k] - predicted[i][k]) - (true[i + 1][k] - true[i][k])) ** 2
            for i in range(n + 1)
            for k in range(3 * 5 * 7)
        ]
        expected.append(-10 * math.log10(sum(squares) / len(squares)))
    got = psnr_of_changes(predictions, truths, img0, img1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    single = psnr_of_changes([p.float() for p in predictions], [t.float() for t in truths], img0.float(), img1.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5)
    if n == 1:
        torch.testing.assert_close(got, psnr(predictions[0], truths[0]))


def test_flicker_counts_more_than_an_offset_that_stays():
    """Seven frames, each wrong by 0.01 for the same PSNR: 2 of 8 changes by 0.01, or 2 by 0.01 and 6 by 0.02."""
    img0, img1, *truths = _sequence(9)
    offset = psnr_of_changes([t + 0.01 for t in truths], truths, img0, img1)
    flicker = psnr_of_changes([t + 0.01 * (-1) ** i for i, t in enumerate(truths)], truths, img0, img1)
    np.testing.assert_allclose(offset.numpy(), -10 * math.log10(2 * 1e-4 / 8), rtol=1e-9)
    np.testing.assert_allclose(flicker.numpy(), -10 * math.log10((2 * 1e-4 + 6 * 4e-4) / 8), rtol=1e-9)
    assert psnr_of_changes(truths, truths, img0, img1).tolist() == [PSNR_MAX, PSNR_MAX]
    truths[3] = truths[3].clone()
    truths[3][1, 0, 0, 0] = torch.nan
    assert torch.isnan(psnr_of_changes(_sequence(7), truths, img0, img1)).tolist() == [False, True]


def test_psnr_of_changes_refuses_sequences_that_do_not_fit():
    img0, img1, *frames = _sequence(5)
    with pytest.raises(ValueError, match=r"as many predictions as true frames, at least one, .*; got 1 and 2"):
        psnr_of_changes(frames[:1], frames[1:], img0, img1)
    with pytest.raises(ValueError, match=r"at least one, .*; got 0 and 0"):
        psnr_of_changes([], [], img0, img1)
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 7\), \(1, 3, 5, 7\)"):  # which would broadcast
        psnr_of_changes(frames[:1], [frames[1][:1]], img0, img1)


def test_autocast_and_half_precision_do_not_reach_psnr_of_parts_and_changes():
    x, y, img0, img1 = (frame.float() for frame in _sequence(4))
    region = x[:, :1] > 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = psnr_in(x, y, region), psnr_of_changes([x], [y], img0, img1)
    assert torch.equal(inside[0], psnr_in(x, y, region))
    assert torch.equal(inside[1], psnr_of_changes([x], [y], img0, img1))
    half = x.bfloat16()
    assert torch.equal(psnr_in(half, y, region), psnr_in(half.float(), y, region))
    assert torch.equal(psnr_of_changes([half], [y], img0, img1), psnr_of_changes([half.float()], [y], img0, img1))
