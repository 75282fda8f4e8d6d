"""LPIPS against loops over windows in float64 numpy, on weights in the layout of the published file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from vfi.errors import JobError
from vfi.metrics.lpips import MIN_SIDE, Lpips, load_lpips

CPU = torch.device("cpu")
ALEXNET = "alexnet-owt-7be5be79.pth"
SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
Weights = dict[str, torch.Tensor]


def published_layout(seed: int) -> Weights:
    """Random weights that keep the signal's size, under the keys of the file."""
    generator = torch.Generator().manual_seed(seed)
    alexnet = {}
    for index, shape in SHAPES.items():
        alexnet[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        alexnet[f"features.{index}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    alexnet["classifier.1.weight"] = torch.zeros(4, 4)  # there, of another size, and not used
    return alexnet


def weights_of_features() -> Weights:
    """The authors' weights, as their package lies on the disk."""
    package = importlib.util.find_spec("lpips")
    assert package is not None
    return torch.load(Path(package.origin).parent / "weights" / "v0.1" / "alex.pth", "cpu", weights_only=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with the file; not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(published_layout(0), folder / ALEXNET)
    return folder


@pytest.fixture(scope="module")
def lpips(published) -> Lpips:
    return load_lpips(published, CPU)


def pictures(height: int, width: int, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A smooth coloured picture and a disturbed copy, float64 [B, 3, H, W] in [0, 1]."""
    rng = np.random.default_rng(height + width)
    truth = ndimage.gaussian_filter(rng.random((batch, 3, height, width)), (0, 0, 1.5, 1.5))
    truth = (truth - truth.min()) / (truth.max() - truth.min())
    return np.clip(truth + 0.1 * rng.standard_normal(truth.shape), 0, 1), truth


def windows(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    """[C, H, W] -> [C, h, w, size, size]"""
    return sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def features_by_window(image: np.ndarray, alexnet: Weights) -> list[np.ndarray]:
    """The five stages of AlexNet, [3, H, W] in float64, each of length 1 over the channels."""
    colours = np.array([[-0.030, 0.458], [-0.088, 0.448], [-0.188, 0.450]])
    x = (2 * image - 1 - colours[:, :1, None]) / colours[:, 1:, None]
    found = []
    for index, (stride, padding) in zip(SHAPES, ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1)), strict=True):
        if index in (3, 6):
            x = windows(x, 3, 2).max((3, 4))
        weight = alexnet[f"features.{index}.weight"].double().numpy()
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        x = np.tensordot(weight, windows(x, weight.shape[2], stride), ((1, 2, 3), (0, 3, 4)))
        x = np.maximum(x + alexnet[f"features.{index}.bias"].double().numpy()[:, None, None], 0)
        found.append(x / (np.sqrt((x**2).sum(0)) + 1e-10))
    return found


def lpips_by_window(prediction: np.ndarray, truth: np.ndarray, alexnet: Weights, linear: Weights) -> float:
    total = 0.0
    both = (features_by_window(image, alexnet) for image in (prediction, truth))
    for i, (x, y) in enumerate(zip(*both, strict=True)):
        weight = linear[f"lin{i}.model.1.weight"].double().numpy()[0, :, 0, 0]
        C, H, W = x.shape
        assert len(weight) == C
        total += sum(weight @ (x[:, row, column] - y[:, row, column]) ** 2 for row in range(H) for column in range(W)) / (H * W)
    return total


@pytest.mark.parametrize(("height", "width"), [(48, 64), (MIN_SIDE, 75)])
def test_lpips_is_the_one_by_window(lpips, height, width):
    prediction, truth = pictures(height, width)
    expected = [
        lpips_by_window(p, t, published_layout(0), weights_of_features()) for p, t in zip(prediction, truth, strict=True)
    ]
    got = lpips(torch.from_numpy(prediction).float(), torch.from_numpy(truth).float())
    print(f"{expected}, off by {np.abs(got.numpy() - expected).max():.1e}")
    assert got.shape == (2,)
    assert got.dtype == torch.float32
    assert min(expected) > 0.02
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-6)


def test_equal_pictures_symmetry_and_order(lpips):
    prediction, truth = (torch.from_numpy(image).float() for image in pictures(48, 64))
    assert lpips(truth, truth).tolist() == [0, 0]
    assert torch.equal(lpips(prediction, truth), lpips(truth, prediction))
    halfway = lpips((prediction + truth) / 2, truth)
    assert (halfway < lpips(prediction, truth)).all()
    torch.testing.assert_close(lpips(prediction[1:], truth[1:]), lpips(prediction, truth)[1:])
    assert torch.isnan(lpips(truth * torch.tensor([1.0, torch.nan]).view(2, 1, 1, 1), truth)).tolist() == [False, True]


def test_autocast_and_half_precision_do_not_reach_it(lpips):
    prediction, truth = (torch.from_numpy(image).float() for image in pictures(48, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lpips(prediction, truth)
    assert torch.equal(inside, lpips(prediction, truth))
    half = prediction.bfloat16()
    assert torch.equal(lpips(half, truth), lpips(half.float(), truth))
    assert lpips(prediction.double(), truth.double()).dtype == torch.float32


def test_nothing_of_it_is_trained(lpips):
    assert not lpips.training
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_shapes_that_do_not_fit_are_refused(lpips):
    with pytest.raises(ValueError, match=r"\(1, 3, 40, 40\) and \(1, 3, 40, 41\)"):
        lpips(torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 41))
    with pytest.raises(ValueError, match="expected two tensors"):
        lpips(torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 40, 40))


def test_the_least_size_is_the_least(lpips):
    image = torch.rand(1, 3, MIN_SIDE, MIN_SIDE)
    assert lpips(image, image.flip(3)).item() > 0
    for size in ((MIN_SIDE - 1, 90), (90, MIN_SIDE - 1)):
        small = torch.rand(1, 3, *size)
        with pytest.raises(ValueError, match=f"images are {size[0]}×{size[1]} .* at least {MIN_SIDE}"):
            lpips(small, small)
        with pytest.raises(RuntimeError):  # without the check
            lpips.network(small, small)


def test_weights_of_something_else(tmp_path):
    for path in (tmp_path, tmp_path / ALEXNET):  # the folder, or the file itself
        with pytest.raises(JobError, match=rf"{ALEXNET} is missing: it is published as https://download.pytorch.org/models/"):
            load_lpips(path, CPU)
    torch.save(weights_of_features(), tmp_path / ALEXNET)
    with pytest.raises(JobError, match=rf"{ALEXNET} is of something else: missing: features.0.weight, .* published as"):
        load_lpips(tmp_path, CPU)


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(JobError, match=r"needs the packages lpips and torchvision: pip install -e '\.\[perceptual\]'"):
        load_lpips(tmp_path, CPU)
