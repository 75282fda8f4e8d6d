"""Test the conversion between colours of videos and RGB against the formulas of the ITU, computed here in float64."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shards.color_conversion import (
    Colours,
    assume_left_chroma,
    chroma_halves,
    describe_colours,
    from_rgb,
    measure_chroma_location,
    to_planes,
    to_rgb,
)
from shards.frame_sources import find_clips, read_clip
from shards.schema import ShardError

KR_KB = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # BT.709-6, BT.601-7, BT.2020-2
OFFSETS = {"left": (0, 0.5), "center": (0.5, 0.5), "topleft": (0, 0), "top": (0.5, 0), "bottomleft": (0, 1), "bottom": (0.5, 1)}
PLANAR = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le", "yuv444p12le")
MATRICES = pytest.mark.parametrize("matrix", [1, 5, 9], ids=["BT.709", "BT.601", "BT.2020"])
RANGES = pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])


def to_codes(rgb: np.ndarray, matrix: int, full: bool, bits: int) -> list[np.ndarray]:
    """Convert RGB in 0 … 1 [H, W, 3] to the Y, Cb and Cr codes of a video, without rounding."""
    kr, kb = KR_KB[matrix]
    r, g, b = np.moveaxis(rgb, 2, 0)
    luma = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - luma) / (2 * (1 - kb)), (r - luma) / (2 * (1 - kr))
    if full:
        return [(2**bits - 1) * luma, *(2 ** (bits - 1) + (2**bits - 1) * one for one in chroma)]
    return [2 ** (bits - 8) * (16 + 219 * luma), *(2 ** (bits - 8) * (128 + 224 * one) for one in chroma)]


def from_codes(codes: Sequence[np.ndarray], matrix: int, full: bool, bits: int) -> np.ndarray:
    """Convert codes of a video to RGB in 0 … 1, clipping values outside of it."""
    kr, kb = KR_KB[matrix]
    y, cb, cr = (one.astype(np.float64) for one in codes)
    if full:
        y, cb, cr = y / (2**bits - 1), (cb - 2 ** (bits - 1)) / (2**bits - 1), (cr - 2 ** (bits - 1)) / (2**bits - 1)
    else:
        unit = 2 ** (bits - 8)
        y, cb, cr = (y / unit - 16) / 219, (cb / unit - 128) / 224, (cr / unit - 128) / 224
    r, b = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return np.clip(np.stack((r, (y - kr * r - kb * b) / (1 - kr - kb), b), 2), 0, 1)


def ramps(height: int, width: int, step: Sequence[float] = (1, 1), first: Sequence[float] = (0, 0)) -> np.ndarray:
    """Return RGB that changes linearly in both directions, each colour at its own rate, on a grid with spacing `step` (rows,
    columns) that starts at `first` (column, row). Any interpolation of its chroma is exact, except for the samples' location.
    """
    x = first[0] + step[1] * np.arange(width)[None, :, None]
    y = first[1] + step[0] * np.arange(height)[:, None, None]
    return (np.array([110, 128, 120]) + x * np.array([0.7, -0.5, 0.4]) + y * np.array([-0.4, 0.3, 0.6])) / 255


def bits_of(pix_fmt: str) -> int:
    return av.VideoFormat(pix_fmt).components[0].bits


def samples(plane: av.video.plane.VideoPlane, bits: int) -> np.ndarray:
    rows = np.frombuffer(plane, np.uint8 if bits == 8 else np.uint16).reshape(plane.height, -1)
    return rows[:, : plane.width].astype(np.float64)


def frame_of(planes: Sequence[np.ndarray], pix_fmt: str) -> av.VideoFrame:
    """Return a frame of these samples, rounded; the padding of its rows has another value."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, pix_fmt)
    for plane, content in zip(frame.planes, planes, strict=True):
        kind = np.uint8 if bits_of(pix_fmt) == 8 else np.uint16
        rows = np.full((plane.height, plane.line_size // kind().itemsize), 77, kind)
        rows[:, : plane.width] = np.rint(content)
        plane.update(rows.tobytes())
    return frame


def ramp_frame(
    pix_fmt: str, matrix: int, full: bool, location: str = "left", size: tuple[int, int] = (64, 96)
) -> av.VideoFrame:
    """Return `ramps` as a video frame with these properties, which states the location of its chroma."""
    halves, bits = chroma_halves(pix_fmt), bits_of(pix_fmt)
    step = tuple(2 if half else 1 for half in halves)
    first = [offset if half else 0 for offset, half in zip(OFFSETS[location], halves[::-1], strict=True)]
    sides = [-(-side // by) for side, by in zip(size, step, strict=True)]
    luma = to_codes(ramps(*size), matrix, full, bits)[0]
    chroma = to_codes(ramps(*sides, step, first), matrix, full, bits)[1:]
    return located(frame_of([luma, *chroma], pix_fmt), location)


def located(frame: av.VideoFrame, location: str) -> av.VideoFrame:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("setparams", f"chroma_location={location}"), graph.add("buffersink")).configure()
    source.push(frame)
    return graph.pull()


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((image / np.iinfo(image.dtype).max - truth) ** 2)))


def bias(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the mean error of each colour in 8-bit levels, without the borders, which lack neighbours to interpolate with."""
    return 255 * (image / np.iinfo(image.dtype).max - truth)[4:-4, 4:-4].mean((0, 1))


# ------------------------------------------------------------------------------------------------------------- to RGB


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le", "yuv444p12le", "yuv444p16le"])
@pytest.mark.parametrize("most_bits", [8, 16])
@MATRICES
@RANGES
def test_any_colour_is_as_near_as_rounding_lets_it_be(pix_fmt, most_bits, matrix, full):
    """Some of the random samples lie outside of RGB; rounding to 8 bits alone leaves 58.9 dB."""
    bits = bits_of(pix_fmt)
    random = np.random.default_rng(0).random((120, 131, 3)) * 1.2 - 0.1
    codes = [np.clip(np.rint(one), 0, 2**bits - 1) for one in to_codes(random, matrix, full, bits)]
    truth = from_codes(codes, matrix, full, bits)
    image = to_rgb(frame_of(codes, pix_fmt), Colours(matrix, full_range=full, bits=bits), most_bits)
    wide = most_bits == 16 and bits > 8
    assert image.dtype == (np.uint16 if wide else np.uint8)
    assert image.shape == (120, 131, 3)
    error = 255 * (image / np.iinfo(image.dtype).max - truth)
    assert np.abs(error).max() < (0.03 if wide else 0.53)
    assert np.abs(error.mean((0, 1))).max() < 0.03
    assert psnr(image, truth) > (85 if wide else 58.8)


@pytest.mark.parametrize("pix_fmt", PLANAR)
@MATRICES
@RANGES
def test_no_colour_is_too_dark_or_too_bright(pix_fmt, matrix, full):
    bits = bits_of(pix_fmt)
    frame = ramp_frame(pix_fmt, matrix, full)
    for most_bits in (8, 16):
        image = to_rgb(frame, Colours(matrix, full_range=full, bits=bits), most_bits)
        assert np.abs(bias(image, ramps(64, 96))).max() < 0.06
        assert psnr(image[4:-4, 4:-4], ramps(64, 96)[4:-4, 4:-4]) > (49 if bits == 8 else 57)  # what 8 bits hold


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("location", OFFSETS)
def test_chroma_is_taken_from_where_it_lies(pix_fmt, location):
    frame = ramp_frame(pix_fmt, 1, False, location)
    assert measure_chroma_location(frame) == location
    assert np.abs(bias(to_rgb(frame, Colours()), ramps(64, 96))).max() < 0.03
    elsewhere = located(frame, "center" if location != "center" else "left")
    assert np.abs(bias(to_rgb(elsewhere, Colours()), ramps(64, 96))).max() > 0.1  # the test would see it


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("size", [(48, 72), (32, 48), (30, 26)])
@pytest.mark.parametrize("location", ["left", "topleft"])
def test_a_frame_made_smaller_has_no_bias(pix_fmt, size, location):
    """The pixel centres of the result lie between those of the frame, where a ramp is known, too."""
    steps = [64 / size[0], 96 / size[1]]
    truth = ramps(*size, steps, [(step - 1) / 2 for step in steps[::-1]])
    for full in (False, True):
        colours = Colours(full_range=full, bits=bits_of(pix_fmt))
        image = to_rgb(ramp_frame(pix_fmt, 1, full, location), colours, size=size)
        assert np.abs(bias(image, truth)).max() < 0.1


@pytest.mark.parametrize("size", [(47, 61), (1, 1), (2, 3), (33, 64)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p10le", "yuv420p10le"])
def test_odd_sizes(pix_fmt, size):
    frame = ramp_frame(pix_fmt, 1, False, size=size)
    image = to_rgb(frame, Colours(bits=bits_of(pix_fmt)))
    assert image.shape == (*size, 3)
    assert image.flags.c_contiguous
    assert np.abs(255 * (image / 255 - ramps(*size))).max() < 3  # at the border chroma is repeated: half a step of a ramp
    np.testing.assert_array_equal(to_planes(frame, Colours(bits=bits_of(pix_fmt))), image.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("pix_fmt", "order"),
    [
        ("nv12", lambda y, cb, cr: [[y], [cb, cr]]),
        ("yuyv422", lambda y, cb, cr: [[y, cb, y, cr]]),
        ("uyvy422", lambda y, cb, cr: [[cb, y, cr, y]]),
        ("yuvj420p", lambda y, cb, cr: [[y], [cb], [cr]]),
        ("yuv411p", lambda y, cb, cr: [[y], [cb], [cr]]),
        ("yuva420p", lambda y, cb, cr: [[y], [cb], [cr], [31]]),
        ("yuva444p12le", lambda y, cb, cr: [[y], [cb], [cr], [31]]),
        ("p010le", lambda y, cb, cr: [[y << 6], [cb << 6, cr << 6]]),
        ("y210le", lambda y, cb, cr: [[y << 6, cb << 6, y << 6, cr << 6]]),
    ],
)
@RANGES
def test_other_orders_of_the_samples_and_transparency(pix_fmt, order, full):
    """Transparency is dropped: colours are those of an opaque frame."""
    frame = av.VideoFrame(32, 16, pix_fmt)
    frame.color_range, frame.colorspace = 2 if full else 1, 1
    colours = describe_colours(frame)
    full = full or pix_fmt.startswith("yuvj")
    codes = [np.rint(one) for one in to_codes(np.array([[[0.8, 0.3, 0.1]]]), 1, full, colours.bits)]
    for plane, pattern in zip(frame.planes, order(*(int(one[0, 0]) for one in codes)), strict=True):
        content = np.array(pattern, np.uint8 if colours.bits == 8 else "<u2").tobytes()
        plane.update((content * (plane.buffer_size // len(content) + 1))[: plane.buffer_size])
    truth = from_codes(codes, 1, full, colours.bits)
    assert colours.full_range == full
    for most_bits in (8, 16):
        image = to_rgb(frame, colours, most_bits)
        error = 255 * (image / np.iinfo(image.dtype).max - truth)
        assert np.abs(error).max() < (0.03 if image.dtype == np.uint16 else 0.53)


@pytest.mark.parametrize("pix_fmt", ["gray", "gray10le", "gray12le", "gray16le"])
@pytest.mark.parametrize(("says", "full"), [(0, True), (1, False), (2, True)], ids=["says nothing", "limited", "full"])
def test_grey(pix_fmt, says, full):
    bits = bits_of(pix_fmt)
    codes = np.linspace(0, 2**bits - 1, 1024).round()[None].repeat(8, 0)
    frame = frame_of([codes], pix_fmt)
    frame.color_range = says
    colours = describe_colours(frame)
    assert (colours.full_range, colours.bits) == (full, bits)
    neutral = np.full_like(codes, 2 ** (bits - 1))
    truth = from_codes((codes, neutral, neutral), 1, full, bits)
    for most_bits in (8, 16):
        image = to_rgb(frame, colours, most_bits)
        error = 255 * (image / np.iinfo(image.dtype).max - truth)
        assert np.abs(error).max() < (0.03 if image.dtype == np.uint16 else 0.51)
        back = samples(from_rgb(image, colours, pix_fmt).planes[0], bits)
        inside = (truth[..., 0] > 0) & (truth[..., 0] < 1)
        coarser = (2**bits - 1) / np.iinfo(image.dtype).max
        assert np.abs(back - codes)[inside].max() <= (1 + coarser / 2 if bits < 16 or coarser > 1 else 4)


@pytest.mark.parametrize("pix_fmt", ["gbrp", "gbrap", "gbrp10le", "gbrp12le", "gbrp14le", "gbrp16le"])
def test_rgb_keeps_every_level(pix_fmt):
    bits = bits_of(pix_fmt)
    codes = np.arange(2**bits)[None, : 1 << 14].repeat(2, 0)
    planes = [np.roll(codes, shift, 1) for shift in (1, 2, 0)]  # green, blue, red
    frame = frame_of(planes if pix_fmt != "gbrap" else [*planes, codes], pix_fmt)
    truth = np.stack((planes[2], planes[0], planes[1]), 2) / (2**bits - 1)
    colours = describe_colours(frame)
    assert np.abs(255 * (to_rgb(frame, colours) / 255 - truth)).max() < 0.502
    image = to_rgb(frame, colours, 16)
    top = np.iinfo(image.dtype).max
    assert np.abs(image - top * truth).max() <= (1 if bits < 16 else 0)
    back = from_rgb(image, colours, pix_fmt)
    assert all(np.array_equal(samples(plane, bits), one) for plane, one in zip(back.planes, planes, strict=False))


# ----------------------------------------------------------------------------------------------------------- from RGB


@pytest.mark.parametrize("pix_fmt", [*PLANAR, "yuvj420p"])
@MATRICES
@RANGES
def test_made_frames_have_no_bias(pix_fmt, matrix, full):
    full = full or pix_fmt.startswith("yuvj")
    bits = bits_of(pix_fmt)
    top = 255 if bits == 8 else 65_535
    image = np.rint(top * ramps(64, 96)).astype(np.uint8 if bits == 8 else np.uint16)
    frame = from_rgb(image, Colours(matrix, full_range=full, bits=bits), pix_fmt)
    assert frame.format.name == pix_fmt
    expected = ramp_frame(pix_fmt, matrix, full)
    truth = to_codes(ramps(64, 96), matrix, full, bits)
    for number, (plane, wanted) in enumerate(zip(frame.planes, expected.planes, strict=True)):
        error = (samples(plane, bits) - (truth[0] if number == 0 else samples(wanted, bits)))[4:-4, 4:-4] / 2 ** (bits - 8)
        assert np.abs(error.mean()) < 0.06
        assert np.abs(error).max() < (1.01 if bits == 8 else 0.5)  # both are rounded


@pytest.mark.parametrize("location", OFFSETS)
def test_made_chroma_lies_where_it_is_wanted(location):
    image = np.rint(255 * ramps(64, 96)).astype(np.uint8)
    for full in (False, True):
        frame = from_rgb(image, Colours(full_range=full, location=location), "yuv420p")
        expected = ramp_frame("yuv420p", 1, full, location)
        for plane, wanted in zip(frame.planes[1:], expected.planes[1:], strict=True):
            assert np.abs((samples(plane, 8) - samples(wanted, 8))[4:-4, 4:-4].mean()) < 0.04


@pytest.mark.parametrize("pix_fmt", ["nv12", "p010le", "yuyv422", "yuv411p", "yuva420p", "bgr0", "gbrp10le", "ya8", "gray"])
@RANGES
def test_frames_of_other_formats_come_back(pix_fmt, full):
    for bits in (8, 16):
        image = np.rint((2**bits - 1) * ramps(64, 96)).astype(np.uint8 if bits == 8 else np.uint16)
        if pix_fmt in ("ya8", "gray"):
            image[...] = image[..., 1:2]
        frame = from_rgb(image, Colours(full_range=full), pix_fmt)
        assert frame.format.name == pix_fmt
        back = to_rgb(located(frame, "left"), Colours(full_range=full, bits=bits_of(pix_fmt)))
        assert np.abs(bias(back, image / (2**bits - 1))).max() < 0.15


# ------------------------------------------------------------------------------------------------------- what is said


def described(width: int, height: int, **says: int) -> Colours:
    frame = av.VideoFrame(width, height, "yuv420p")
    for name, value in says.items():
        setattr(frame, name, value)
    return describe_colours(frame)


def test_what_a_video_says_is_taken_and_defaults_are_those_of_players():
    assert described(640, 480, colorspace=9, color_range=2) == Colours(9, 2, 2, full_range=True)
    assert described(640, 480, colorspace=1).matrix == 1
    assert described(1920, 1080, colorspace=6).matrix == 6
    for unsaid in (0, 2, 3):
        assert described(1280, 720, colorspace=unsaid).matrix == 1
        assert described(1280, 534, colorspace=unsaid).matrix == 1  # a wide film in HD
        assert described(720, 1280, colorspace=unsaid).matrix == 1
        assert described(854, 480, colorspace=unsaid).matrix == 5
    assert not described(64, 64).full_range


def test_a_matrix_that_can_not_be_converted_is_refused():
    with pytest.raises(ShardError, match=r"matrix 8 of ITU-T H.273, which can't be converted: possible are 1, 4, 5, 6, 7, 9;"):
        described(64, 64, colorspace=8)  # YCgCo


def write(path: Path, codec: str, frame: av.VideoFrame, tags: dict[str, int], **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = frame.width, frame.height, frame.format.name, options
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number in range(3):  # of fewer libx265 gets the times wrong
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


LOSSLESS = [
    ("v.mp4", "libx264", "yuv420p", {"qp": "0"}),
    ("v.mp4", "libx264", "yuv422p", {"qp": "0"}),
    ("v.mp4", "libx265", "yuv420p10le", {"x265-params": "lossless=1:log-level=none"}),
    ("v.webm", "libvpx-vp9", "yuv420p", {"lossless": "1"}),
    ("v.mkv", "ffv1", "yuv420p", {}),
    ("v.mkv", "ffv1", "yuv444p12le", {}),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "options"), LOSSLESS, ids=lambda value: str(value))
@pytest.mark.parametrize(("tag", "matrix"), [(2, 1), (1, 1), (6, 6), (9, 9)], ids=["untagged", "BT.709", "BT.601", "BT.2020"])
def test_shards_see_a_video_of_hd_as_it_is(tmp_path, name, codec, pix_fmt, options, tag, matrix):
    """Through a lossless file: one without tags is BT.709, and chroma lies left if its location is not stated."""
    height, width = 64, 1280  # as wide as HD
    halves, bits = chroma_halves(pix_fmt), bits_of(pix_fmt)
    step = tuple(2 if half else 1 for half in halves)

    def at(sides: Sequence[int], step: Sequence[int], offsets: Sequence[float]) -> np.ndarray:
        x = offsets[0] + step[1] * np.arange(sides[1])[None, :, None]
        y = offsets[1] + step[0] * np.arange(sides[0])[:, None, None]
        return (np.array([60, 200, 100]) + x * np.array([0.1, -0.1, 0.05]) + y * np.array([0.2, -0.4, 0.6])) / 255

    first = [offset if half else 0 for offset, half in zip(OFFSETS["left"], halves[::-1], strict=True)]
    luma = to_codes(at((height, width), (1, 1), (0, 0)), matrix, False, bits)[0]
    chroma = to_codes(at((height // step[0], width // step[1]), step, first), matrix, False, bits)[1:]
    write(tmp_path / "src" / name, codec, frame_of([luma, *chroma], pix_fmt), {"colorspace": tag, "color_range": 1}, **options)
    image = next(read_clip(find_clips(tmp_path / "src")[0])).rgb()
    truth = at((height, width), (1, 1), (0, 0))
    assert np.abs(bias(image, truth)).max() < 0.03
    assert psnr(image[4:-4, 4:-4], truth[4:-4, 4:-4]) > (49 if bits == 8 else 57)


def test_a_container_of_raw_video_says_where_chroma_lies(tmp_path):
    for location in ("left", "center"):
        path = write(tmp_path / f"{location}.y4m", "wrapped_avframe", ramp_frame("yuv420p", 5, False, location), {},
                     chroma_sample_location=location)  # fmt: skip
        with av.open(str(path)) as container:
            assume_left_chroma(container.streams.video[0])
            frame = next(container.decode(video=0))
        assert measure_chroma_location(frame) == location
        assert np.abs(bias(to_rgb(frame, describe_colours(frame)), ramps(64, 96))).max() < 0.03
