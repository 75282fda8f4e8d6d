"""Test that synthetic flow and middle frames are exact, by warping, by tracking points, and by changes that must break them."""

from __future__ import annotations

import io
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from sources import digests, texture

from shards import synthetic
from shards.schema import ShardError, read_index
from shards.synthetic_scene import PHOTOGRAPHS, photograph_paths, scene
from shards.verify import verify

SIZE = (96, 128)
MOTION = 10.0


def warp(image, flow):
    """Sample `image` bilinearly at each pixel plus its flow; NaN outside."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(float)
    x, y = x + flow[..., 0], y + flow[..., 1]
    outside = (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1)
    left, top = np.clip(np.floor(x), 0, width - 2).astype(int), np.clip(np.floor(y), 0, height - 2).astype(int)
    u, v = (x - left)[..., None], (y - top)[..., None]
    upper = image[top, left] * (1 - u) + image[top, left + 1] * u
    lower = image[top + 1, left] * (1 - u) + image[top + 1, left + 1] * u
    result = upper * (1 - v) + lower * v
    result[outside] = np.nan
    return result


def away_from_borders(drawn, t, to, margin=3):
    """Return a mask of pixels at time t without a layer border within `margin`, whose point is visible at time `to`, too."""
    seen, then = drawn.visible(t), drawn.visible(to)
    same = np.ones_like(seen, dtype=bool)
    for dy in range(-margin, margin + 1):
        for dx in range(-margin, margin + 1):
            same &= np.roll(seen, (dy, dx), (0, 1)) == seen
    flow = drawn.flow(t, to)
    y, x = np.mgrid[: drawn.height, : drawn.width]
    x = np.clip(np.rint(x + flow[..., 0]), 0, drawn.width - 1).astype(int)
    y = np.clip(np.rint(y + flow[..., 1]), 0, drawn.height - 1).astype(int)
    for dy in (-2, 0, 2):
        for dx in (-2, 0, 2):
            same &= then[np.clip(y + dy, 0, drawn.height - 1), np.clip(x + dx, 0, drawn.width - 1)] == seen
    return same


def psnr(a, b, mask):
    mask = mask & np.isfinite(a).all(-1)
    assert mask.mean() > 0.3
    return -10 * np.log10(np.mean((a[mask] / 255 - b[mask] / 255) ** 2))


def test_warping_an_end_frame_by_the_flow_gives_the_middle_frame():
    right, wrong = [], []
    for number in range(12):
        drawn = scene(0, "train", number, *SIZE, MOTION)
        middle = drawn.render(0.5).astype(float)
        for end in (0.0, 1.0):
            flow = drawn.flow(0.5, end).astype(float)
            mask = away_from_borders(drawn, 0.5, end)
            frame = drawn.render(end).astype(float)
            right.append(psnr(warp(frame, flow), middle, mask))
            wrong.append(psnr(warp(frame, -flow), middle, mask))
            swapped = psnr(warp(frame, flow[..., ::-1]), middle, mask)
            assert right[-1] > swapped
    # fine textures lose a little in one bilinear look-up; wrong signs lose far more
    assert np.median(right) > 35
    assert min(right) > 27
    assert np.median(right) - np.median(wrong) > 8
    assert all(r > w for r, w in zip(right, wrong, strict=True))


def test_flow_is_what_a_tracked_point_does():
    """Move single points by brute force with sines and cosines, independently of the module's matrices."""
    rng = np.random.default_rng(1)
    drawn = scene(3, "val", 5, *SIZE, MOTION)
    seen, flows = drawn.visible(0.5), {end: drawn.flow(0.5, end) for end in (0.0, 1.0)}
    checked = set()
    for number, layer in enumerate(drawn.layers):
        m = layer.motion
        for _ in range(4000):
            start = rng.uniform(0, 1, 2) * SIZE[::-1]

            def place(t, start=start, m=m):
                offset = (complex(*start) - complex(*m.centre)) * (1 + m.growth * t) * np.exp(1j * m.turn * t)
                return offset + complex(*m.centre) + complex(*m.velocity) * t

            # points that lie close enough to a pixel's centre at the middle time
            at = place(0.5)
            x, y = int(np.floor(at.real)), int(np.floor(at.imag))
            if not (0 <= x < SIZE[1] and 0 <= y < SIZE[0]) or seen[y, x] != number or abs(at - complex(x + 0.5, y + 0.5)) > 0.1:
                continue
            for end in (0.0, 1.0):
                way = place(end) - at
                assert flows[end][y, x] == pytest.approx((way.real, way.imag), abs=0.03)
            checked.add(number)
    assert len(checked) >= 2


def test_no_point_moves_further_than_max_motion_and_motion_varies():
    longest = []
    for number in range(40):
        drawn = scene(0, "train", number, *SIZE, MOTION)
        longest.append(np.linalg.norm(drawn.flow(0.0, 1.0), axis=-1).max())
    assert max(longest) <= MOTION
    assert max(longest) > 0.7 * MOTION
    assert np.std(longest) > 0.1 * MOTION


def test_background_covers_the_frame_at_all_times():
    for number in range(30):
        drawn = scene(0, "train", number, *SIZE, 40.0)
        background = drawn.layers[0]
        for t in (0.0, 0.5, 1.0):
            matrix = background.to_photograph @ np.linalg.inv(background.motion.at(t))
            corners = matrix @ np.array([[0, SIZE[1], 0, SIZE[1]], [0, 0, SIZE[0], SIZE[0]], [1, 1, 1, 1]])
            assert (corners[:2].min(axis=1) >= 0).all()
            assert (corners[:2].max(axis=1) <= background.photograph.size).all()


def test_layers_hide_each_other_and_the_middle_frame_is_no_blend():
    drawn = scene(0, "train", 0, *SIZE, MOTION)
    first, middle, last = (drawn.render(t).astype(float) for t in (0, 0.5, 1))
    assert np.abs(middle - (first + last) / 2).mean() > 1
    assert len(np.unique(drawn.visible(0.5))) > 2


def test_splits_use_different_photographs_and_need_no_network():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])
    for split in PHOTOGRAPHS:
        assert all(path.is_file() for path in photograph_paths(split))


def test_samples_are_a_function_of_seed_split_and_number(tmp_path):
    def frame(*arguments):
        return scene(*arguments, 48, 64, 4.0).render(0.5).tobytes()

    assert frame(0, "train", 7) == frame(0, "train", 7)
    assert len({frame(0, "train", 7), frame(1, "train", 7), frame(0, "val", 7), frame(0, "train", 8)}) == 4
    few = synthetic.make(synthetic.Options(tmp_path / "few", samples=3, size="48x64", samples_per_shard=3))
    many = synthetic.make(synthetic.Options(tmp_path / "many", samples=6, size="48x64", samples_per_shard=3))
    assert few.shards[0] == many.shards[0]


def test_the_job_writes_good_shards_with_flow(tmp_path, capsys):
    arguments = ["--samples", "5", "--size", "48x64", "--samples-per-shard", "2", "--frames", "5", "--seed", "4"]
    assert synthetic.main(["--out", str(tmp_path / "one"), *arguments]) == 0
    assert "5 samples of 5 frames" in capsys.readouterr().out
    assert synthetic.main(["--out", str(tmp_path / "two"), *arguments, "--workers", "2"]) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert verify(tmp_path / "one") == []
    index = read_index(tmp_path / "one")
    assert (index.frames, index.has_flow, index.min_size, index.samples) == (5, True, (48, 64), 5)
    with tarfile.open(tmp_path / "one" / "shard-000000.tar") as tar:
        name = next(name for name in tar.getnames() if name.endswith("flow_t1.npy"))
        flow = np.load(io.BytesIO(tar.extractfile(name).read()))
    expected = scene(4, "train", 0, 48, 64, 0.06 * 64).flow(0.5, 1.0)
    np.testing.assert_array_equal(flow, expected)


def test_without_flow_any_number_of_frames(tmp_path):
    index = synthetic.make(synthetic.Options(tmp_path, samples=2, size="32x32", frames=4, flow=False, codec="qoi"))
    assert (index.frames, index.has_flow, index.codec) == (4, False, "qoi")
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "128"], "HEIGHTxWIDTH"),
        (["--size", "8x8"], "32 to 4096"),
        (["--split", "test"], "train or val"),
        (["--style", "poor"], "simple, rich"),
        (["--photographs", "absent"], "not a folder"),
        (["--codec", "gif"], "png, qoi, jpeg"),
        (["--samples", "0"], "1 or more"),
        (["--frames", "4"], "--no-flow"),
        (["--frames", "1"], "2 or more"),
        (["--seed", "-1"], "negative"),
        (["--max_motion", "100"], "max_motion"),
        (["--quality", "0"], "quality"),
        (["--samples_per_shard", "0"], "samples_per_shard"),
        (["--workers", "-1"], "workers"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path, fails, flags, message):
    out = tmp_path / "out"
    arguments = ["--out", out, "--samples", "2", "--size", "64x64", *flags]
    assert message in fails(synthetic.main, *arguments)
    assert not list(out.glob("*"))


def test_missing_photographs_are_named(monkeypatch):
    monkeypatch.setitem(PHOTOGRAPHS, "val", ("absent.png",))
    with pytest.raises(ShardError, match=r"absent\.png"):
        photograph_paths("val")


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a dozen photographs, one broken file and some cut-outs."""
    path = tmp_path / "photographs"
    path.mkdir()
    for number in range(12):
        Image.fromarray(texture(number)).save(path / f"{number}.png")
    (path / "broken.png").write_bytes(b"no png")
    pixels = np.dstack([texture(0), np.full(texture(0).shape[:2], 255, np.uint8)])
    pixels[:, :100, 3] = 0
    for number in range(4):
        Image.fromarray(pixels).save(path / f"thing{number}.png")
    return path


@pytest.mark.parametrize("style", ["simple", "rich"])
def test_photographs_of_a_folder(tmp_path, folder, capsys, style):
    if style == "rich":
        pytest.importorskip("cv2", reason="needs OpenCV: pip install 'vfi-training-stack[scenes]'")
    arguments = [
        "--style",
        style,
        "--photographs",
        str(folder),
        "--samples",
        "5",
        "--size",
        "48x64",
        "--samples_per_shard",
        "2",
    ]
    assert synthetic.main(["--out", str(tmp_path / "one"), *arguments]) == 0
    captured = capsys.readouterr()
    assert "skipped: broken.png" in captured.err
    assert "1 source files with faults" in captured.out
    assert synthetic.main(["--out", str(tmp_path / "two"), *arguments, "--workers", "2"]) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert verify(tmp_path / "one") == []
    index = read_index(tmp_path / "one")
    assert index.source["photographs"]["folder"] == "photographs"
    assert 8 <= index.source["photographs"]["count"] <= 16
    assert index.source["arguments"].get("style", "simple") == style
    assert index.skipped.keys() == {"broken.png"}
    # the same job is complete; with one photograph more it is another one
    assert synthetic.main(["--out", str(tmp_path / "one"), *arguments]) == 0
    assert "complete already" in capsys.readouterr().err
    Image.fromarray(texture(99)).save(folder / "more.png")
    assert synthetic.main(["--out", str(tmp_path / "one"), *arguments]) == 2
    assert "another job" in capsys.readouterr().err


def test_the_style_rich_uses_scikit_images_photographs_without_a_folder(tmp_path):
    pytest.importorskip("cv2", reason="needs OpenCV: pip install 'vfi-training-stack[scenes]'")
    index = synthetic.make(synthetic.Options(tmp_path, samples=2, size="64x64", style="rich", split="val"))
    assert index.source["photographs"] == list(PHOTOGRAPHS["val"])
    assert "opencv" in index.source["versions"]
    assert verify(tmp_path) == []


def test_cutouts_alone_are_refused(tmp_path, folder, fails):
    for path in folder.glob("[0-9]*.png"):
        path.unlink()
    arguments = ["--photographs", folder, "--samples", "1", "--size", "48x64"]
    assert "4 of them with transparent parts" in fails(synthetic.main, "--out", tmp_path / "out", *arguments)


def test_the_style_rich_names_what_it_needs(tmp_path, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "[scenes]" in fails(synthetic.main, "--out", tmp_path / "out", "--style", "rich")
