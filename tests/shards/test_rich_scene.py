"""Test rich scenes: flow against independently tracked points, frames against a slow float64 renderer, and invariants."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from shards.photographs import Deck
from shards.synthetic_scene import photograph_paths

pytest.importorskip("cv2", reason="needs OpenCV: pip install 'vfi-training-stack[scenes]'")

from shards.rich_drawing import draw_scene
from shards.rich_motion import Track, source
from shards.rich_scene import SOLID, Light
from shards.rich_shapes import COMPACT, draw_bars, draw_compact, draw_segment, draw_skyline

SIZE = (72, 96)
MOTION = 20.0
STILL = Light(Track(np.zeros(3), np.zeros(3)), Track(np.zeros(3), np.zeros(3)), 0.0, 0.0, 0)


def cutout():
    """Return a picture with a hole in its outline, as a cut-out stores it: uint8 [90, 80, 4], colours times alpha."""
    y, x = np.mgrid[:90, :80]
    alpha = np.where(np.hypot(y - 45, x - 40) < 38, 255, 0) * (np.hypot(y - 30, x - 40) > 8)
    colours = np.stack([x * 3, y * 2, 255 - x - y], axis=-1) * alpha[..., None] // 255
    return np.dstack([colours, alpha]).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("cutout") / "thing.png"
    straight = cutout().astype(int)
    straight[..., :3] = straight[..., :3] * 255 // np.maximum(straight[..., 3:], 1)
    Image.fromarray(straight.astype(np.uint8)).save(path)
    return Deck([*photograph_paths("train")[:6], path], 512).pictures(0, 0)


@pytest.fixture(scope="module")
def scenes(pictures):
    return [draw(pictures, number) for number in range(24)]


def draw(pictures, number, size=SIZE, motion=MOTION, interval=0.5):
    return draw_scene(np.random.default_rng([7, number]), pictures, *size, motion, interval)


def plain(drawn):
    """Return the scene with constant light and without noise, shadows and blur; the motion is the same."""
    layers = tuple(dataclasses.replace(layer, gain=None) for layer in drawn.layers if not layer.shadow)
    return dataclasses.replace(drawn, light=STILL, shutter=0.0, layers=layers)


def track(camera, sheet, point, t):
    """Track one point of a sheet through the world step by step, without the module's matrices."""

    def at(path):
        return path.total * t + path.bend * (t * t - t)

    spot = complex(*point)
    for ripple in sheet.ripples:
        along = np.exp(1j * ripple.angle)
        across = (spot * along.conjugate()).imag
        spot += along * ripple.amplitude * np.sin(2 * np.pi * across / ripple.length + ripple.phase + ripple.rate * t)
    for joint in sheet.joints:
        hinge = complex(joint.u, joint.v)
        spot = hinge + (spot - hinge) * np.exp(1j * at(joint.swing)[0])
    world = sheet.basis[:3, 2] + spot.real * sheet.basis[:3, 0] + spot.imag * sheet.basis[:3, 1]
    if sheet.body is not None:
        pose = at(sheet.body.path)
        pivot = sheet.body.pivot
        world = pivot + pose[:3] + Rotation.from_rotvec(pose[3:]).apply(world - pivot)
    pose = at(camera.path)
    x, y, z = Rotation.from_rotvec(pose[3:6]).apply(world - pose[:3])
    assert z > 0
    return np.array(camera.centre) + camera.focal * np.exp(pose[6]) * np.array([x, y]) / z


def test_flow_is_what_a_tracked_point_does(scenes):
    rng = np.random.default_rng(0)
    kinds = set()
    for drawn in scenes:
        seen = drawn.visible(0.5)
        flows = {end: drawn.flow(0.5, end) for end in (0.0, 1.0)}
        for number in np.unique(seen):
            sheet = drawn.layers[number].sheet
            kinds.add((bool(sheet.body), bool(sheet.joints), bool(sheet.ripples)))
            y, x = np.nonzero(seen == number)
            for index in rng.integers(len(x), size=6):
                pixel = np.array([x[index] + 0.5, y[index] + 0.5])
                point = source(drawn.camera.matrix(0.5), sheet, pixel[None], 0.5)[0]
                assert track(drawn.camera, sheet, point, 0.5) == pytest.approx(pixel, abs=1e-6)
                for end, flow in flows.items():
                    way = track(drawn.camera, sheet, point, end) - pixel
                    assert flow[y[index], x[index]] == pytest.approx(way, abs=1e-4)
    # still sheets, bodies, rippling bodies and limbs were all among them
    assert kinds >= {(False, False, False), (True, False, False), (True, False, True), (True, True, False)}


def look_up(raster, x, y, mirrored):
    """Sample a raster bilinearly in float64; outside it is mirrored or empty."""
    height, width = raster.shape[:2]

    def pixel(i, j):
        if mirrored:
            i, j = (np.abs((k + n - 1) % max(2 * n - 2, 1) - (n - 1)) for k, n in ((i, height), (j, width)))
            return raster[i, j].astype(np.float64)
        inside = (i >= 0) & (j >= 0) & (i < height) & (j < width)
        return raster[i.clip(0, height - 1), j.clip(0, width - 1)].astype(np.float64) * inside[..., None]

    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = (x - left)[..., None], (y - top)[..., None]
    upper = pixel(top, left) * (1 - u) + pixel(top, left + 1) * u
    lower = pixel(top + 1, left) * (1 - u) + pixel(top + 1, left + 1) * u
    return upper * (1 - v) + lower * v


def render(drawn, t):
    """Render the frame before noise in float64 levels, by a loop over samples and layers."""
    y, x = np.mgrid[: drawn.height, : drawn.width] + 0.5
    total = np.zeros((drawn.height, drawn.width, 3))
    for part in range(drawn.samples):
        dx, dy = ((-0.25, -0.25), (0.25, 0.25), (0.25, -0.25), (-0.25, 0.25))[part % 4]
        moment = t + drawn.shutter * ((part + 0.5) / drawn.samples - 0.5)
        canvas = np.zeros_like(total)
        for layer in drawn.layers:
            pixels = np.stack([x + dx, y + dy], axis=-1)
            points = source(drawn.camera.matrix(moment), layer.sheet, pixels, moment)
            spots = points @ layer.to_raster[:2, :2].T + layer.to_raster[:2, 2]
            spots = np.nan_to_num(spots).clip(-1e6, 1e6)
            colours = look_up(layer.raster, spots[..., 0], spots[..., 1], layer.endless)
            gain = 1 if layer.gain is None else 1 + layer.gain.at(moment)[0]
            canvas = canvas * (1 - colours[..., 3:]) + colours[..., :3] * gain
        total += canvas / drawn.samples
    light = drawn.light
    v, u = np.linspace(-1, 1, drawn.height)[:, None], np.linspace(-1, 1, drawn.width)[None]
    total = total * (1 + light.gain.at(t)) + light.offset.at(t)
    total = (total * (1 - light.vignette * (u * u + v * v) / 2)[..., None]).clip(0, 1)
    return 255 * np.where(total <= 0.0031308, 12.92 * total, 1.055 * np.maximum(total, 1e-9) ** (1 / 2.4) - 0.055)


def test_each_frame_is_what_a_slow_renderer_makes(scenes):
    blurred = 0
    for drawn in scenes[:14]:
        drawn = dataclasses.replace(drawn, light=dataclasses.replace(drawn.light, noise=0.0))
        blurred += drawn.shutter > 0
        for t in (0.0, 0.5, 1.0):
            apart = np.abs(drawn.render(t) - render(drawn, t))
            assert apart.max() < 0.6  # half a level is rounding
    assert blurred >= 4


def test_noise_is_new_in_each_frame_and_has_the_strength_asked_for(scenes):
    drawn = plain(scenes[0])
    noisy = dataclasses.replace(drawn, light=dataclasses.replace(STILL, noise=3.0, seed=5))
    grey = (drawn.render(0.5) > 20) & (drawn.render(0.5) < 235)
    apart = [(noisy.render(t).astype(float) - drawn.render(t))[grey] for t in (0.5, 1.0)]
    assert np.std(apart[0]) == pytest.approx(3.0, rel=0.1)
    assert not np.array_equal(*apart)
    assert np.array_equal(noisy.render(0.5), noisy.render(0.5))


def test_warping_an_end_frame_by_the_flow_gives_the_middle_frame(scenes):
    """Check the signs and the order of axes in the pictures themselves."""
    right, wrong = [], []
    for drawn in map(plain, scenes):
        seen, middle = drawn.visible(0.5), drawn.render(0.5).astype(float)
        for end in (0.0, 1.0):
            flow, frame, then = drawn.flow(0.5, end), drawn.render(end).astype(float), drawn.visible(end)
            for sign, results in ((1, right), (-1, wrong)):
                y, x = np.mgrid[: drawn.height, : drawn.width]
                x, y = x + sign * flow[..., 0], y + sign * flow[..., 1]
                inside = (x > 1) & (y > 1) & (x < drawn.width - 2) & (y < drawn.height - 2)
                same = then[np.rint(y).astype(int).clip(0, drawn.height - 1), np.rint(x).astype(int).clip(0, drawn.width - 1)]
                apart = np.abs(look_up(frame, x, y, False) - middle)[inside & (same == seen)]
                results.append(np.mean(apart > 12))  # of fine textures, a bilinear look-up loses a few levels
    moving = np.array(wrong) > 0.05
    assert moving.sum() > 12
    ratios = np.array(right)[moving] / np.array(wrong)[moving]
    assert np.median(ratios) < 0.3
    assert ratios.max() < 1


def test_motion_stays_below_its_limit_and_is_of_all_sizes(pictures, scenes):
    longest = []
    for drawn in [*scenes, *(draw(pictures, number) for number in range(100, 130))]:
        longest.append(np.linalg.norm(drawn.flow(0.0, 1.0), axis=-1).max())
    assert max(longest) <= MOTION
    assert np.mean(np.array(longest) > MOTION / 2) > 0.3
    assert np.mean(np.array(longest) < MOTION / 4) > 0.05
    assert np.abs(draw(pictures, 3, motion=0.0).flow(0.0, 1.0)).max() < 1e-6


def test_middle_of_a_way_is_not_its_mean(scenes):
    """With half of the displacement in half of the time, flow to the first frame would be the negative of flow to the last."""
    apart = [np.abs(drawn.flow(0.5, 0.0) + drawn.flow(0.5, 1.0)).max() for drawn in scenes]
    assert np.mean(np.array(apart) > 0.5) > 0.4


def test_backdrop_fills_every_frame_and_shows_no_mirrored_part(pictures):
    for number in range(30):
        drawn = draw(pictures, number, motion=35.0)
        backdrop = drawn.layers[0]
        assert backdrop.endless
        assert backdrop.raster[..., 3].min() > 0.999
        frame = np.array([[x, y] for x in (0, SIZE[1] / 2, SIZE[1]) for y in (0, SIZE[0] / 2, SIZE[0])], float)
        for t in (-drawn.shutter / 2, 0.0, 0.3, 0.5, 0.8, 1.0, 1 + drawn.shutter / 2):
            u0, v0, u1, v1 = backdrop.sheet.extent
            points = source(drawn.camera.matrix(t), backdrop.sheet, frame, t)
            margin = 0.02 * (u1 - u0)
            assert (points > (u0 - margin, v0 - margin)).all()
            assert (points < (u1 + margin, v1 + margin)).all()
            assert (drawn._sample(t, 0.0, 0.0)[..., 3] > 0.999).all()


def test_scenes_are_varied_and_a_function_of_their_generator(pictures, scenes):
    counts = [len(drawn.layers) for drawn in scenes]
    assert min(counts) <= 3
    assert max(counts) >= 10
    assert any(drawn.shutter == 0 for drawn in scenes)
    assert any(drawn.camera.path.total.any() for drawn in scenes)
    assert any(not drawn.camera.path.total.any() for drawn in scenes)
    again = draw(pictures, 5)
    assert np.array_equal(again.render(0.5), scenes[5].render(0.5))
    assert not np.array_equal(again.render(0.5), scenes[6].render(0.5))


def test_an_odd_large_frame_has_finite_exact_flow(pictures):
    drawn = draw(pictures, 2, size=(301, 517), motion=120.0)
    assert drawn.render(0.5).shape == (301, 517, 3)
    assert np.isfinite(drawn.flow(0.5, 1.0)).all()


def test_shapes_are_neither_empty_nor_cut_off():
    rng = np.random.default_rng(0)
    for kind in COMPACT:
        for _ in range(20):
            mask = draw_compact(rng, kind, 64)
            assert 0 < np.mean(mask > 255 * SOLID) < 0.9
            assert not mask[[0, -1]].any()
            assert not mask[:, [0, -1]].any()
    assert (draw_skyline(rng, 40, 90)[-2] == 255).all()
    for _ in range(10):
        assert 0 < np.mean(draw_bars(rng, 120, 160, 1.0) > 0) < 0.9
    assert draw_segment(rng, 12, 40).mean() > 80
