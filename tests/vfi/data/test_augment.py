"""Random changes: the same draws for a seed as ever, frames and flow that still fit each other, and the crop of an epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shards.synthetic_scene import scene
from vfi.config.configs import DataConfig
from vfi.data.augment import (
    Change,
    FrameTooSmallError,
    apply_change,
    apply_change_to_flows,
    copy_pixels,
    crop_at,
    draw_change,
    grow,
)

# every combination of channel reversal, the two flips, quarter turns and time reversal, on a crop that is off the centre
CHANGES = [
    Change(3, 11, 64, channels, vertical, horizontal, turns, time)
    for channels, vertical, horizontal, turns, time in itertools.product(*[(False, True)] * 3, range(4), (False, True))
]
CROP = CHANGES[0]  # the crop alone


@given(st.data())
def test_frames_and_time_change_together(data):
    """Undoing a change, step by step and backwards, gives the cropped frames and the timestep back."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    frames = list(rng.integers(0, 255, (3, 70, 90, 3), dtype=np.uint8))
    change = draw_change(rng, 70, 90, 64, DataConfig())
    changed, timestep = apply_change(change, frames, 0.25)
    if change.reverse_time:
        changed, timestep = changed[::-1], 1 - timestep
    assert timestep == 0.25
    for before, after in zip(frames, changed, strict=True):
        after = np.rot90(after, -change.quarter_turns)
        after = after[:, ::-1] if change.flip_horizontal else after
        after = after[::-1] if change.flip_vertical else after
        after = after[:, :, ::-1] if change.reverse_channels else after
        assert np.array_equal(before[change.top : change.top + 64, change.left : change.left + 64], after)


def test_every_change_happens_as_often_as_asked():
    rng = np.random.default_rng(0)
    draws = [draw_change(rng, 100, 120, 64, DataConfig()) for _ in range(2000)]
    for name in ("reverse_channels", "flip_vertical", "flip_horizontal", "reverse_time"):
        assert 0.45 < np.mean([getattr(draw, name) for draw in draws]) < 0.55, name
    assert {draw.quarter_turns for draw in draws} == {0, 1, 2, 3}
    assert {draw.top for draw in draws} == set(range(37))
    assert {draw.left for draw in draws} == set(range(57))


def test_no_augmentation_is_a_crop():
    change = draw_change(np.random.default_rng(0), 64, 64, 64, DataConfig(augment_prob=0, rotate=False))
    assert change == Change(0, 0, 64, False, False, False, 0, False)


@pytest.mark.parametrize(
    ("seed", "rotate", "expected"),
    [
        ((3, 0, 5), True, Change(2, 12, 64, False, False, True, 2, False)),
        ((3, 1, 5), True, Change(3, 13, 64, True, True, True, 3, True)),
        ((0, 2, 17), False, Change(4, 2, 64, True, False, True, 0, False)),
    ],
)
def test_a_seed_draws_what_it_always_drew(seed, rotate, expected):
    """Literals, since a run that goes on under a newer version has to see the same changes."""
    assert draw_change(np.random.default_rng(seed), 72, 80, 64, DataConfig(rotate=rotate)) == expected


def test_frame_that_does_not_hold_the_crop():
    with pytest.raises(FrameTooSmallError, match=r"40x90.*crop is 64x64: use --small_frames upscale or reflect, or"):
        draw_change(np.random.default_rng(0), 40, 90, 64, DataConfig())
    with pytest.raises(FrameTooSmallError, match=r"130x90.*crop is 96x96: use --curriculum_crops up to 80, --small_frames"):
        draw_change(np.random.default_rng(0), 130, 90, 96, DataConfig(curriculum=True))


def scattered(rng, height, width):
    """A middle frame whose pixels lie anywhere in the two others, and the whole-numbered flows that lead to them."""
    middle = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    frames, flows = [], []
    for _ in range(2):
        to_y, to_x = np.divmod(rng.permutation(height * width).reshape(height, width), width)
        frame = np.empty_like(middle)
        frame[to_y, to_x] = middle
        frames.append(frame)
        flows.append(np.stack([to_x - x, to_y - y], axis=-1).astype(np.float32))
    return [frames[0], middle, frames[1]], flows


def looked_up(frame, flow):
    """Backward warp by whole numbers -> warped frame, and a mask of the pixels whose flow stays inside the frame."""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    from_x, from_y = x + flow[..., 0].astype(int), y + flow[..., 1].astype(int)
    inside = (from_x >= 0) & (from_x < frame.shape[1]) & (from_y >= 0) & (from_y < frame.shape[0])
    return frame[from_y * inside, from_x * inside], inside


def test_flow_leads_to_the_same_pixels_after_every_change():
    """Exact, at every pixel whose flow stays inside the crop, and as many of these as the crop alone has."""
    frames, flows = scattered(np.random.default_rng(0), 70, 90)
    counts = [looked_up(frames[0][3:67, 11:75], flow[3:67, 11:75])[1].sum() for flow in flows]
    assert min(counts) > 2000
    assert counts[0] != counts[1]
    for change in CHANGES:
        first, middle, last = apply_change(change, frames, 0.5)[0]
        changed = apply_change_to_flows(change, flows)
        for frame, flow, count in zip((first, last), changed, counts[::-1] if change.reverse_time else counts, strict=True):
            warped, inside = looked_up(frame, flow)
            assert (flow.shape, flow.dtype, inside.sum()) == ((64, 64, 2), np.float32, count), change
            assert np.array_equal(warped[inside], middle[inside]), change


def test_copied_pixels_are_those_of_the_view_in_memory_of_their_own():
    frames = scattered(np.random.default_rng(1), 70, 90)[0]
    for change in CHANGES:
        for view in apply_change(change, frames, 0.5)[0]:
            copied, into = copy_pixels(view), np.zeros((64, 64, 3), np.uint8)
            assert copy_pixels(view, into=into) is into
            assert np.array_equal(copied, view)
            assert np.array_equal(into, view)
            assert copied.flags.c_contiguous
            assert not np.shares_memory(copied, view)


def test_crop_alone_leaves_flow_as_it_is():
    flows = list(np.random.default_rng(0).standard_normal((2, 70, 90, 2), dtype=np.float32))
    for before, after in zip(flows, apply_change_to_flows(CROP, flows), strict=True):
        assert np.array_equal(before[3:67, 11:75], after)
    assert apply_change_to_flows(CROP, []) == []


def warped_psnr(frame, flow, truth):
    """PSNR in dB of a bilinear backward warp of `frame`, in double precision."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    grid = np.stack([(x + flow[..., 0]) * 2 / width - 1, (y + flow[..., 1]) * 2 / height - 1], axis=-1)
    image = torch.from_numpy(copy_pixels(frame)).permute(2, 0, 1)[None].double()
    warped = F.grid_sample(image, torch.from_numpy(grid)[None], "bilinear", "border", align_corners=False)
    error = warped[0].permute(1, 2, 0).numpy() - truth
    return float(10 * np.log10(255**2 / np.mean(error**2)))


@pytest.mark.parametrize("number", range(3))
def test_flow_warps_as_well_after_every_change(number):
    """Scenes with flow between the pixels' centres: the warp's PSNR is that of the crop alone, to the last digits."""
    drawn = scene(seed=5, split="val", number=number, height=72, width=80, max_motion=8)
    frames = [drawn.render(t) for t in (0, 0.5, 1)]
    flows = [drawn.flow(0.5, 0), drawn.flow(0.5, 1)]

    def scores(change):
        first, middle, last = apply_change(change, frames, 0.5)[0]
        to_first, to_last = apply_change_to_flows(change, flows)
        return warped_psnr(first, to_first, middle), warped_psnr(last, to_last, middle)

    plain = scores(CROP)
    still = [warped_psnr(frame[3:67, 11:75], np.zeros((64, 64, 2)), frames[1][3:67, 11:75]) for frame in frames[::2]]
    assert min(np.subtract(plain, still)) > 2  # the flow is of use, so that a wrong one would show
    for change in CHANGES:
        assert scores(change) == pytest.approx(plain[::-1] if change.reverse_time else plain, rel=1e-9), change


@given(
    first=st.integers(4, 10),
    growth=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    parts=st.integers(1, 40),
    remainder=st.integers(0, 2),
)
def test_each_crop_of_the_curriculum_holds_for_an_equal_part(first, growth, parts, remainder):
    crops = tuple(int(crop) for crop in 16 * np.cumsum([first, *growth]))
    length = 3 * parts + remainder
    config = DataConfig(crop=64, curriculum=True, curriculum_T=length, curriculum_crops=crops)
    held = [crop_at(config, epoch) for epoch in range(length + 100)]
    assert held == sorted(held)
    assert set(held[length - 1 :]) == {crops[-1]}
    epochs = [held[:length].count(crop) for crop in crops]
    assert (min(epochs), max(epochs)) == (parts, parts + bool(remainder))


def test_published_curriculum():
    config = DataConfig(curriculum=True)
    assert [crop_at(config, epoch) for epoch in (0, 16, 17, 33, 34, 49, 50, 1000)] == [256, 256, 384, 384, 512, 512, 512, 512]
    assert {crop_at(DataConfig(crop=320), epoch) for epoch in (0, 20, 100)} == {320}


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (40, 50), (64, 90), (100, 64)])
def test_small_frames_are_continued_by_reflection(size):
    frame = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    found = grow(frame, 64, "reflect")
    height, width = (max(64, side) for side in size)
    assert found.shape == (height, width, 3)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    for y in range(height):
        for x in range(width):
            row, column = (
                abs(at) if at < side else 2 * (side - 1) - at for at, side in zip((y - top, x - left), size, strict=True)
            )
            assert (found[y, x] == frame[row, column]).all(), (y, x)


@pytest.mark.parametrize(("size", "expected"), [((40, 90), (64, 144)), ((90, 48), (120, 64)), ((63, 63), (64, 64))])
def test_small_frames_are_enlarged_until_they_hold_the_crop(size, expected):
    """A ramp stays a ramp, at the places of the enlarged pixels."""
    down, across = (np.arange(side) for side in size)
    frame = np.stack(np.broadcast_arrays(2 * down[:, None], 2 * across[None], np.uint8(7)), axis=-1).astype(np.uint8)
    found = grow(frame, 64, "upscale")
    assert found.shape == (*expected, 3)
    rows, columns = (
        2 * ((np.arange(new) + 0.5) * old / new - 0.5) for new, old in zip(expected, size, strict=True)
    )  # in units of the ramp
    inner = np.s_[4:-4, 4:-4]
    assert np.abs(found[..., 0] - rows[:, None])[inner].max() <= 0.6
    assert np.abs(found[..., 1] - columns[None])[inner].max() <= 0.6
    assert (found[..., 2] == 7).all()


@pytest.mark.parametrize("how", ["refuse", "upscale", "reflect"])
def test_frames_that_hold_the_crop_are_not_touched(how):
    frame = np.zeros((64, 70, 3), np.uint8)
    assert grow(frame, 64, how) is frame
    assert grow(frame[:50], 64, "refuse").shape == (50, 70, 3)
