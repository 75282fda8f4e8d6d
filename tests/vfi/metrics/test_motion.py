"""Motion estimates against photographs moved by known amounts; colour coding of flows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import skimage.data
import skimage.registration
import torch
from scipy import ndimage

from vfi.metrics.flow_color import flow_picture
from vfi.metrics.motion import LONGER_SIDE, MotionStats, estimate, flow_processes, lucas_kanade
from vfi.runtime.prefetch import map_ahead


def as_tensor(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] in 0 … 255 -> [1, 3, H, W] in [0, 1], rounded to 8 bits."""
    return torch.from_numpy(np.clip(np.rint(image), 0, 255) / 255).float().permute(2, 0, 1).unsqueeze(0)


def cut(photograph: np.ndarray, size: tuple[int, int], dx: float = 0, dy: float = 0, angle: float = 0) -> torch.Tensor:
    """The middle of a photograph, whose content is turned about the middle of the cut and then moved to the right and down."""
    (H, W), radians = size, math.radians(angle)
    rows, columns = np.mgrid[:H, :W].astype(float)
    down, across = rows - dy - (H - 1) / 2, columns - dx - (W - 1) / 2
    down, across = math.cos(radians) * down - math.sin(radians) * across, math.sin(radians) * down + math.cos(radians) * across
    places = [down + photograph.shape[0] / 2, across + photograph.shape[1] / 2]
    colours = [ndimage.map_coordinates(photograph[..., c].astype(float), places, order=3, mode="mirror") for c in range(3)]
    return as_tensor(np.stack(colours, axis=-1))


def moved(photograph: np.ndarray, size: tuple[int, int], **motion: float) -> MotionStats:
    return estimate(cut(photograph, size), cut(photograph, size, **motion))


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def coffee() -> np.ndarray:
    return skimage.data.coffee()


@pytest.mark.parametrize(("dx", "dy"), [(0.5, 0.0), (-1.5, 2.0), (5.0, 3.0), (0.0, -9.0), (-12.0, 0.0)])
def test_length_of_known_shifts(astronaut, dx, dy):
    motion = moved(astronaut, (160, 240), dx=dx, dy=dy)
    expected = math.hypot(dx, dy)
    print(f"{expected:.2f} pixels, estimated {motion.length:.2f}")
    assert motion.length == pytest.approx(expected, rel=0.06, abs=0.1)
    assert motion.moving.float().mean().item() == pytest.approx(float(expected > 1), abs=0.06)


def test_length_of_a_known_rotation(astronaut):
    motion = moved(astronaut, (160, 240), angle=2)
    rows, columns = np.mgrid[:160, :240]
    expected = (2 * math.sin(math.radians(1)) * np.hypot(rows - 79.5, columns - 119.5)).mean()
    print(f"{expected:.2f} pixels, estimated {motion.length:.2f}")
    assert motion.length == pytest.approx(expected, rel=0.05)
    assert not motion.moving[0, 0, 75:85, 115:125].any()  # about the middle


def test_longer_motion_has_the_greater_length(coffee):
    """What it is there for: sorting."""
    lengths = [moved(coffee, (96, 144), dx=dx).length for dx in (0, 0.3, 1, 4, 12, 20)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0


def test_static_pair(astronaut):
    still = moved(astronaut, (96, 128))
    assert still.length == 0
    assert still.moving.shape == (1, 1, 96, 128)
    assert still.moving.dtype == torch.bool
    assert not still.moving.any()
    rng = np.random.default_rng(0)
    noisy = [as_tensor(astronaut[:160, :240] + rng.normal(0, 1, (160, 240, 3))) for _ in range(2)]
    motion = estimate(*noisy)
    assert motion.length < 0.1
    assert motion.moving.float().mean().item() < 0.01


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (8, -5)])
def test_moving_covers_the_patch_and_little_else(astronaut, coffee, dx, dy):
    rng = np.random.default_rng(0)
    frames, patch = [], astronaut[100:160, 200:260]
    for x, y in ((0, 0), (dx, dy)):
        frame = coffee[:200, :300].astype(float)
        frame[70 + y : 130 + y, 100 + x : 160 + x] = patch
        frames.append(as_tensor(frame + rng.normal(0, 1, frame.shape)))
    motion = estimate(*frames)
    inside = torch.zeros(1, 1, 200, 300, dtype=torch.bool)
    inside[..., 70:130, 100:160] = True
    covered, beside = motion.moving[inside].float().mean().item(), motion.moving[~inside].float().mean().item()
    expected = math.hypot(dx, dy) * inside.float().mean().item()
    print(f"{covered:.3f} of the patch, {beside:.3f} of the rest, {motion.length:.3f} pixels instead of {expected:.3f}")
    assert covered > 0.9
    assert beside < 0.04
    assert motion.length == pytest.approx(expected, rel=0.4)


@pytest.mark.parametrize(("size", "shrunk"), [((300, 600), (224, 448)), ((640, 400), (448, 280)), ((200, 448), (200, 448))])
def test_large_frames_are_shrunk(monkeypatch, astronaut, size, shrunk):
    """The work is done on small frames; length and mask are those of the full frame."""
    seen = []
    original = skimage.registration.optical_flow_ilk
    monkeypatch.setattr(
        skimage.registration, "optical_flow_ilk", lambda *frames, **k: seen.extend(frames) or original(*frames, **k)
    )
    photograph = astronaut.repeat(2, axis=0).repeat(2, axis=1)
    motion = moved(photograph, size, dx=6, dy=-2.5)
    assert [frame.shape for frame in seen] == [shrunk, shrunk]
    assert max(shrunk) == LONGER_SIDE
    assert motion.moving.shape == (1, 1, *size)
    assert motion.length == pytest.approx(6.5, rel=0.05)


def test_what_an_estimate_takes(astronaut):
    frame = cut(astronaut, (32, 48))
    moved_frame = cut(astronaut, (32, 48), dx=2)
    expected = estimate(frame, moved_frame)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = estimate(frame.clone().requires_grad_(), moved_frame)
    assert inside.length == expected.length
    assert torch.equal(inside.moving, expected.moving)
    assert estimate(torch.rand(1, 3, 2, 3), torch.rand(1, 3, 2, 3)).moving.shape == (1, 1, 2, 3)
    for wrong in (frame[0], frame[:, :1], frame.expand(2, 3, 32, 48), frame[..., :1]):
        with pytest.raises(ValueError, match="expected two tensors"):
            estimate(wrong, wrong)
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 48\) and \(1, 3, 32, 40\)"):
        estimate(frame, frame[..., :40])


def uniform(dx: float, dy: float) -> np.ndarray:
    return np.broadcast_to(np.array([dx, dy], dtype=np.float32)[:, None, None], (2, 4, 5))


def test_no_motion_is_white():
    picture = flow_picture(uniform(0, 0))
    assert picture.shape == (4, 5, 3)
    assert picture.dtype == np.uint8
    assert (picture == 255).all()


@pytest.mark.parametrize(
    ("direction", "colour"),
    # by the wheel's table: parts 0, 13.75, 27.5 and 41.25 of 55
    [((1, 0), (255, 0, 0)), ((0, 1), (255, 234, 0)), ((-1, 0), (0, 197, 255)), ((0, -1), (103, 0, 255))],
)
def test_colours_of_directions(direction, colour):
    for length in (0.01, 1, 300):  # relative to itself
        assert (flow_picture(uniform(*(length * np.array(direction)))) == colour).all()


def test_processes_and_threads_estimate_the_same():
    frames = [torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    pairs = list(itertools.pairwise(frames))
    expected = [estimate(*pair) for pair in pairs]
    with flow_processes(2) as flow_method:
        found = list(map_ahead(lambda pair: estimate(*pair, flow_method), pairs, 2))
    for one, other in zip(found, expected, strict=True):
        assert one.length == other.length
        assert torch.equal(one.moving, other.moving)
    with flow_processes(0) as flow_method:
        assert flow_method is lucas_kanade


def test_lengths_are_relative_to_a_given_one():
    assert (flow_picture(uniform(3, 0), longest=6.0) == (255, 128, 128)).all()
    assert (flow_picture(uniform(9, 0), longest=6.0) == (255, 0, 0)).all()
    assert (flow_picture(uniform(0, 0), longest=0.0) == 255).all()


def test_colours_go_round_without_a_seam():
    angles = np.linspace(0, 2 * np.pi, 721)
    colours = flow_picture(np.stack((np.cos(angles), np.sin(angles)))[:, None, :])[0].astype(int)
    assert (colours[0] == colours[-1]).all()
    assert np.abs(np.diff(colours, axis=0)).max() < 12
    assert (colours.min(1) == 0).all()  # full colour
    opposite = np.abs(colours[:360] - colours[360:720]).sum(1)
    assert opposite.min() > 255


def test_saturation_is_the_length_relative_to_the_longest_but_one_per_cent():
    flow = np.zeros((2, 1, 1000))
    flow[0, 0, :] = np.linspace(0, 4, 1000)
    flow[0, 0, -1] = 1e6  # one outlier does not pale the rest
    picture = flow_picture(flow)[0]
    assert (picture[:, 0] == 255).all()
    assert (picture[0] == 255).all()
    np.testing.assert_allclose(picture[:990, 1], 255 * (1 - flow[0, 0, :990] / np.percentile(flow[0], 99)), atol=0.51)
    assert (picture[-8:, 1] == 0).all()
    rare = np.zeros((2, 10, 100))
    rare[0, 5, 5] = 2.0  # less than one per cent moves
    assert (flow_picture(rare)[5, 5] == (255, 0, 0)).all()
    assert (flow_picture(rare) == 255).all(axis=-1).sum() == 999
