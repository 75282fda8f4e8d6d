"""In-between frames: static regions are kept, flow is estimated at a suitable size, memory is estimated in advance."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_videos import new_run
from skimage import data
from torch import Tensor

from vfi.errors import JobError
from vfi.inference import engine
from vfi.inference.engine import GIB, MOVES, STILL, InterpolationEngine, Settings, keep_static_regions
from vfi.inference.flow_scale import auto_scale, longest_motion
from vfi.inference.loading import LoadedModel
from vfi.inference.tiling import SMALLEST
from vfi.profiling.costs import count
from vfi.runtime import memory
from vfi.runtime.memory import available_memory

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "fresh")


# ---------------------------------------------------------------------------------------------------------- what stands still


def one_by_one(made: Tensor, img0: Tensor, img1: Tensor, times: Tensor) -> Tensor:
    """keep_static_regions, pixel by pixel in float64."""
    _, _, height, width = img0.shape
    change = (img0 - img1).abs().amax(1)[0].double()

    def around(field: Tensor, row: int, column: int, radius: int) -> Tensor:
        return field[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1]

    weight, smooth = torch.empty(height, width).double(), torch.empty(height, width).double()
    for row in range(height):
        for column in range(width):
            largest = around(change, row, column, 4).max().item()
            weight[row, column] = min(1.0, max(0.0, (MOVES - largest) / (MOVES - STILL)))
    for row in range(height):
        for column in range(width):
            smooth[row, column] = around(weight, row, column, 2).mean()
    mixes = torch.cat([(1 - t) * img0.double() + t * img1.double() for t in times.tolist()])
    return smooth * mixes + (1 - smooth) * made.double()


def test_what_stands_still_is_kept_as_one_would_pixel_by_pixel():
    img0 = torch.rand(1, 3, 24, 31)
    img1 = img0.clone()
    img1[..., 8:12, 20:24] += 0.2  # moves
    img1[..., :6, :6] += 2.5 / 255  # in between
    made, times = torch.rand(2, 3, 24, 31), torch.tensor([0.25, 0.5])
    found = keep_static_regions(made, img0, img1, times)
    assert torch.allclose(found.double(), one_by_one(made, img0, img1, times), atol=1e-6)
    assert torch.equal(found[..., 9:11, 21:23], made[..., 9:11, 21:23])
    assert torch.allclose(found[..., 18:, :10], img0[..., 18:, :10].expand(2, -1, -1, -1), atol=1e-6)


def test_a_caption_stays_to_the_bit_unless_that_is_not_wanted(run, monkeypatch):
    """By a model that shivers."""
    rng = np.random.default_rng(0)
    img0 = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    img1 = img0.copy()
    img1[:40] = rng.integers(0, 255, (40, 96, 3), dtype=np.uint8)
    monkeypatch.setattr(LoadedModel, "predict_several", lambda self, a, b, times, *rest: torch.rand(len(times), 3, 64, 96))
    kept, not_kept = (
        InterpolationEngine(Settings(run, "cpu", static_regions=wanted))(img0, img1, [0.3, 0.6]) for wanted in (True, False)
    )
    assert all(np.array_equal(image[46:], img0[46:]) for image in kept)
    assert not any(np.array_equal(image[46:], img0[46:]) for image in not_kept)


# --------------------------------------------------------------------------------------------------------------- scale of flow


def moved(size: tuple[int, int], pixels: int) -> tuple[Tensor, Tensor]:
    """Return a photograph of that size, and the same one shifted sideways."""
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    large = F.interpolate(photo, size=(size[0], size[1] + pixels), mode="bicubic").clamp(0, 1)
    return large[..., : size[1]], large[..., pixels:]


@pytest.mark.parametrize(("size", "pixels"), [((540, 960), 0), ((540, 960), 18), ((540, 960), 60), ((1080, 1920), 130)])
def test_motion_is_found_to_within_a_160th_of_the_side(size, pixels):
    assert longest_motion(*moved(size, pixels)) == pytest.approx(pixels, abs=max(size) / 160)


@pytest.mark.parametrize(
    ("size", "pixels", "scale"),
    [((96, 128), 4, 1), ((720, 1280), 40, 1), ((720, 1280), 88, 0.5), ((1080, 1920), 140, 0.25), ((1440, 2560), 0, 0.5)],
)
def test_scale_follows_from_size_and_motion(size, pixels, scale):
    assert auto_scale(*moved(size, pixels)) == scale


def test_auto_is_decided_pair_by_pair_and_refused_without_flow(run, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "check_scale", lambda *given: None)
    monkeypatch.setattr(
        LoadedModel, "predict_several", lambda self, a, b, times, precision, scale: asked.append(scale) or (a + b) / 2
    )
    model = InterpolationEngine(Settings(run, "cpu", scale="auto"))
    for pixels in (0, 88):
        model(*((image[0].permute(1, 2, 0) * 255).byte().numpy() for image in moved((720, 1280), pixels)), [0.5])
    assert asked == [1, 0.5]
    monkeypatch.undo()
    with pytest.raises(JobError, match=r"--scale .* without flow"):
        InterpolationEngine(Settings(run, "cpu", scale="auto"))
    with pytest.raises(JobError, match="--scale some: choose auto, or a number"):
        InterpolationEngine(Settings(run, "cpu", scale="some"))


def test_floats_are_not_rounded(tmp_path):
    image0, image1 = np.random.default_rng(0).integers(0, 65536, (2, 64, 80, 3), np.uint16)
    model = InterpolationEngine(Settings(new_run(tmp_path / "runs" / "noise", noise=0.02), "cpu"))
    rounded = model(image0, image1, [0.3, 0.5])
    floats = model(*((image / 65535).astype(np.float32) for image in (image0, image1)), [0.3, 0.5])
    assert all(image.dtype == np.float32 for image in floats)
    assert np.abs(np.multiply(floats, 65535.0) - rounded).max() < 0.5 + 0.1  # and the products' own rounding
    assert np.abs(np.multiply(floats, 65535.0) - np.multiply(floats, 65535.0).round()).max() > 0.4


def test_colours_may_lie_side_by_side_or_one_after_the_other(run):
    image0, image1 = np.random.default_rng(0).integers(0, 256, (2, 64, 80, 3), np.uint8)
    model = InterpolationEngine(Settings(run, "cpu"))
    (pixels,) = model(image0, image1, [0.5])
    (planes,) = model(*(np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0) for image in (image0, image1)), [0.5])
    assert np.array_equal(pixels, planes)


# -------------------------------------------------------------------------------------------------------------------- memory


def test_on_a_cpu_tiles_are_of_a_size_that_fits(run, monkeypatch, capsys):
    """The network never gets a larger input; its memory for a tile is computed independently here."""
    sizes = []
    monkeypatch.setattr(
        LoadedModel, "predict_several", lambda self, a, b, *rest: sizes.append(tuple(a.shape[2:])) or (a + b) / 2
    )
    image = np.zeros((1000, 1500, 3), np.uint8)
    InterpolationEngine(Settings(run, "cpu"))(image, image, [0.5])
    assert sizes == [(1000, 1500)]
    model = InterpolationEngine(Settings(run, "cpu", max_memory=0.5))
    model(image, image, [0.5])
    assert "1500x1000 frames would take up to" in capsys.readouterr().err
    assert len(sizes[1:]) > 1
    largest = max(sizes[1:])
    assert count(model.loaded.model, 1, largest, torch.float32).peak_bytes < 0.5 * GIB
    assert count(model.loaded.model, 1, (2 * largest[0], 2 * largest[1]), torch.float32).peak_bytes > 0.5 * GIB
    with pytest.raises(JobError, match=rf"and tiles of {SMALLEST} pixels .* of which 0.0 are free"):
        InterpolationEngine(Settings(run, "cpu", max_memory=0.01))(image, image, [0.5])
    with pytest.raises(JobError, match="--max_memory 0 must be above 0"):
        InterpolationEngine(Settings(run, "cpu", max_memory=0))


def test_memory_of_a_container_is_no_more_than_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = available_memory()
    assert whole > 0
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert math.isclose(available_memory(), whole, rel_tol=0.2)


def test_memory_of_graphs_is_given_back_before_tiles_get_smaller(run, monkeypatch, capsys):
    """Where that is not enough, tiles are halved; both are tried once for a size."""
    most, sizes = [1000], []

    def predict(self, a, b, times, precision, scale):
        sizes.append(tuple(a.shape[2:]))
        if self.graphs.captured or a.shape[2] > most[0]:
            raise torch.OutOfMemoryError
        return (a + b) / 2

    monkeypatch.setattr(LoadedModel, "predict_several", predict)
    image, model = np.zeros((1000, 1000, 3), np.uint8), InterpolationEngine(Settings(run, "cpu"))
    model.loaded.graphs.captured["of another size"] = object()
    model(image, image, [0.5])
    assert (model.tile, sizes) == (None, [(1000, 1000)] * 2)
    most[0] = 600
    model.loaded.graphs.captured["of another size"] = object()
    model(image, image, [0.5])
    assert (model.tile, sizes[2:5]) == (448, [(1000, 1000), (1000, 1000), (448, 448)])
    assert capsys.readouterr().err.count("don't fit into memory") == 1


@pytest.mark.gpu
def test_no_more_is_taken_of_a_gpu_than_allowed(run):
    rng = np.random.default_rng(0)
    img0, img1 = rng.integers(0, 255, (2, 1600, 2560, 3), dtype=np.uint8)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    (whole,) = InterpolationEngine(Settings(run, "cuda"))(img0, img1, [0.5])
    allowed = 0.8 * torch.cuda.max_memory_reserved() / GIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = InterpolationEngine(Settings(run, "cuda", max_memory=allowed + 0.75))
        (found,) = model(img0, img1, [0.5])
        assert model.tile is not None
        assert torch.cuda.max_memory_reserved() <= allowed * GIB
        with pytest.raises(JobError, match=r"--max_memory 0.5 must be above 0.75 \(GiB\), which CUDA takes"):
            InterpolationEngine(Settings(run, "cuda", max_memory=0.5))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.abs(found.astype(int) - whole).mean() < 1
