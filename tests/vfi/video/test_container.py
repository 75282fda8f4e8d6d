"""Video in, video out: exact frames and times, everything that belongs to a video is kept, no broken files are left behind."""

from __future__ import annotations

import itertools
import math
import re
import resource
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import av.logging
import numpy as np
import pytest
import torch
from made_videos import EVEN, call, frames_of, make, new_run, packets_of, pixels, planes, refused, scene, times_of
from PIL import Image

from shards.color_conversion import measure_chroma_location, to_rgb
from vfi import interpolate
from vfi.errors import JobError
from vfi.inference.engine import InterpolationEngine
from vfi.inference.loading import LoadedModel
from vfi.runtime.prefetch import prefetch
from vfi.video.background_writer import BackgroundWriter
from vfi.video.container import choose_pix_fmt, default_codec
from vfi.video.video_input import VideoInput

pytestmark = pytest.mark.usefixtures("one_thread")

UNEVEN = [0, 40, 100, 140, 240]  # milliseconds


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "fresh")


# ----------------------------------------------------------------------------------------------------- frames and times


@pytest.mark.parametrize("times", [EVEN, UNEVEN, [0, 40], [0]], ids=["even", "uneven", "two frames", "one frame"])
@pytest.mark.parametrize("factor", [2, 3, 8])
def test_a_multiplier_divides_every_gap_and_keeps_the_frames(run, tmp_path, times, factor):
    source, out = make(tmp_path / "in.mkv", times), tmp_path / "out.mkv"
    call(source, "-o", out, "--model", run, "--multiplier", factor, "--codec", "ffv1")
    expected = [a + k * (b - a) / factor for a, b in itertools.pairwise(times) for k in range(factor)] + times[-1:]
    assert times_of(out) == pytest.approx([time / 1000 for time in expected], abs=6e-4)  # Matroska counts milliseconds
    before, after = frames_of(source), frames_of(out)
    for number, frame in enumerate(before):
        assert np.array_equal(pixels(frame), pixels(after[number * factor])), "a frame of the input was changed"


def test_mp4_times_are_exact(run, tmp_path):
    source, out = make(tmp_path / "in.mp4", UNEVEN, codec="libx264"), tmp_path / "out.mp4"
    call(source, "-o", out, "--model", run, "--multiplier", 3)
    found = [frame.pts * frame.time_base for frame in frames_of(out)]
    gaps = [(a + k * (b - a) / Fraction(3)) / 1000 for a, b in itertools.pairwise(UNEVEN) for k in range(3)]
    assert found == [*gaps, Fraction(UNEVEN[-1], 1000)]


@pytest.mark.parametrize(("fps", "rate"), [
    (60, Fraction(60)), (59.94, Fraction(60_000, 1001)), (23.976, Fraction(24_000, 1001)), (12.5, Fraction(25, 2)),
])  # fmt: skip
def test_a_frame_rate_is_even_and_lasts_as_long(run, tmp_path, fps, rate):
    source, out = make(tmp_path / "in.mp4", UNEVEN, codec="libx264"), tmp_path / "out.mp4"
    call(source, "-o", out, "--model", run, "--fps", fps)
    last = frames_of(source)[-1]
    end = (last.pts + last.duration) * last.time_base
    found = [frame.pts * frame.time_base for frame in frames_of(out)]
    assert len(found) == math.ceil(end * rate)
    assert found == pytest.approx([float(n / rate) for n in range(len(found))], abs=1e-4)
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == pytest.approx(rate, rel=1e-3)


def test_slow_motion_has_the_same_frames_at_the_old_rate(run, tmp_path, capsys):
    source = make(tmp_path / "in.mkv", UNEVEN, sound=True)
    call(source, "-o", tmp_path / "slow.mkv", "--model", run, "--slowmo", 4, "--codec", "ffv1")
    assert "left out: audio 1 (flac): the video is slower" in capsys.readouterr().out
    call(source, "-o", tmp_path / "more.mkv", "--model", run, "--multiplier", 4, "--codec", "ffv1")
    slow, more = frames_of(tmp_path / "slow.mkv"), frames_of(tmp_path / "more.mkv")
    assert [frame.time for frame in slow] == pytest.approx([4 * frame.time for frame in more], abs=3e-3)
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(slow, more, strict=True))
    with av.open(str(tmp_path / "slow.mkv")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_a_video_that_does_not_start_at_zero_does_so_afterwards(run, tmp_path):
    source, out = make(tmp_path / "in.mkv", EVEN, start=500), tmp_path / "out.mkv"
    call(source, "-o", out, "--model", run, "--codec", "ffv1")
    assert times_of(source)[0] == 0.5
    assert times_of(out)[0] == 0
    call(source, "-o", tmp_path / "even.mkv", "--model", run, "--codec", "ffv1", "--fps", 50)
    assert times_of(tmp_path / "even.mkv")[0] == 0


# --------------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le", "yuv422p10le"])
@pytest.mark.parametrize("full", [False, True], ids=["16 to 235", "full range"])
@pytest.mark.parametrize("matrix", [1, 5, 9], ids=["BT.709", "BT.601", "BT.2020"])
def test_made_frames_have_the_colours_of_their_neighbours(run, tmp_path, pix_fmt, full, matrix):
    """The fresh network's frame is the mean, and so it is in the planes of the video, whatever matrix and range they have."""
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    source = make(tmp_path / "in.mkv", EVEN[:3], pix_fmt=pix_fmt, tags=tags)
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    found = frames_of(tmp_path / "out.mkv")
    assert {frame.format.name for frame in found} == {pix_fmt}
    assert {frame.color_range for frame in found} == {tags["color_range"]}
    level = 2 ** (found[0].format.components[0].bits - 8)
    for before, made, after in zip(found[0::2], found[1::2], found[2::2], strict=False):
        error = pixels(made) - (pixels(before) + pixels(after)) / 2
        assert np.abs(error).mean() < 0.7 * max(1, level / 3), "the mean of the planes"
        assert np.abs(error).max() <= 3 * level
        assert np.abs(pixels(after) - pixels(before)).mean() > 2 * level


def test_made_chroma_lies_where_that_of_the_input_lies(run, tmp_path):
    """Chroma that rises from row to row: half a row of it would be seen where made frames stand between those of the input."""
    row = np.arange(48)[:, None]
    frames = []
    for number in range(3):
        frame = planes(number, "yuv420p")
        for plane, content in zip(
            frame.planes, (120 + 0 * row, 104 + 2 * row[:24] + 2 * number, 152 - 2 * row[:24]), strict=True
        ):
            plane.update(np.broadcast_to(content, (plane.height, plane.line_size)).astype(np.uint8).tobytes())
        frames.append(frame)
    plain = make(tmp_path / "plain.mkv", EVEN[:3], frames=frames, codec="libx264", options={"qp": "0"})
    located = {"qp": "0", "x264-params": "chromaloc=2"}
    for source, location in (
        (plain, "left"),
        (make(tmp_path / "located.mkv", EVEN[:3], frames=frames, codec="libx264", options=located), "topleft"),
    ):
        with VideoInput(source) as video:
            next(video.read())
            assert video.colours.location == location
        call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
        found = frames_of(tmp_path / "out.mkv")
        for before, made, after in zip(found[0::2], found[1::2], found[2::2], strict=False):
            for plane in (1, 2):
                error = (pixels(made, plane) - (pixels(before, plane) + pixels(after, plane)) / 2).reshape(24, 32)
                assert abs(error[3:-3].mean()) < 0.15


def test_the_location_of_chroma_is_stated_or_named(run, tmp_path, capsys):
    options = {"chroma_sample_location": "topleft"}
    source = make(tmp_path / "in.mkv", EVEN[:2], codec="libx264", options=options)
    for codec, name, said in (("libx264", "a.mp4", False), ("ffv1", "b.mkv", False), ("mpeg4", "c.mp4", True)):
        call(source, "-o", tmp_path / name, "--model", run, "--codec", codec)
        assert ("left out: the location of chroma (topleft): mpeg4 in .mp4" in capsys.readouterr().out) == said
        assert measure_chroma_location(frames_of(tmp_path / name)[0]) == ("left" if said else "topleft")


DISPLAY = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
"""Units of 1/50000 and of 0.0001 cd/m²."""


def side_data_of(frame: av.VideoFrame) -> tuple[list[float], tuple[int, ...]]:
    """The rationals of libavutil's AVMasteringDisplayMetadata as numbers, and MaxCLL and MaxFALL."""
    found = {data.type.name: bytes(data) for data in frame.side_data}
    display = struct.unpack("=22i", found["MASTERING_DISPLAY_METADATA"]) if "MASTERING_DISPLAY_METADATA" in found else ()
    light = struct.unpack("=2I", found["CONTENT_LIGHT_LEVEL"]) if "CONTENT_LIGHT_LEVEL" in found else ()
    return [a / b for a, b in zip(display[:20:2], display[1:20:2], strict=True)], light


@pytest.mark.parametrize(("codec", "suffix"), [("libx265", ".mp4"), ("libx264", ".mkv"), ("libsvtav1", ".webm")])
@pytest.mark.parametrize("params", [f"master-display={DISPLAY}:max-cll=1000,400", "max-cll=600,0"], ids=["both", "light"])
def test_hdr_metadata_is_kept(run, tmp_path, capsys, codec, suffix, params):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16}
    options = {"x265-params": f"log-level=error:{params}"}
    source = make(
        tmp_path / "in.mp4", EVEN[:3], codec="libx265", pix_fmt="yuv420p10le", tags=tags, size=(64, 64), options=options
    )
    out = tmp_path / f"out{suffix}"
    call(source, "-o", out, "--model", run, "--codec", codec)
    assert "left out" not in capsys.readouterr().out
    display = [0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.329, 0.005, 1000] if "master" in params else []  # red first
    light = (1000, 400) if display else (600, 0)
    found = side_data_of(frames_of(out)[0])
    assert found == (pytest.approx(display, abs=1e-4), light)
    if codec == "libx265":
        with av.open(str(out)) as container:
            assert container.streams.video[0].codec_context.codec_tag == "hvc1"


def test_hdr_metadata_that_an_encoder_can_not_write_is_named(run, tmp_path, capsys):
    options = {"x265-params": f"log-level=error:master-display={DISPLAY}"}
    source = make(tmp_path / "in.mp4", EVEN[:2], codec="libx265", pix_fmt="yuv420p10le", size=(64, 64), options=options)
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    assert "left out: the HDR mastering display and light level: ffv1 can't write them" in capsys.readouterr().out


def test_odd_sizes(run, tmp_path):
    source = make(tmp_path / "in.mkv", EVEN[:2], size=(47, 61), pix_fmt="yuv444p")
    call(source, "-o", tmp_path / "same.mkv", "--model", run, "--codec", "ffv1")
    assert {(frame.height, frame.width) for frame in frames_of(tmp_path / "same.mkv")} == {(47, 61)}
    call(source, "-o", tmp_path / "even.mp4", "--model", run, "--pix_fmt", "yuv420p")
    found = frames_of(tmp_path / "even.mp4")
    assert {(frame.height, frame.width, frame.format.name) for frame in found} == {(48, 62, "yuv420p")}
    luma = found[0].to_ndarray()[:48, :62].astype(int)
    assert np.abs(luma[46] - luma[47]).max() <= 6
    assert np.abs(luma[:47, :61].ravel() - pixels(frames_of(source)[0], 0)).mean() < 2


@pytest.mark.parametrize(
    ("codec", "asked", "given", "bits", "expected"),
    [
        ("libx264", "", "yuv420p", 8, "yuv420p"),
        ("libx264", "", "yuv420p12le", 12, "yuv420p10le"),
        ("ffv1", "", "rgb24", 8, "bgr0"),
        ("libx264", "yuv444p", "yuv420p", 8, "yuv444p"),
        ("libx265", "", "yuv422p10le", 10, "yuv422p10le"),
    ],
)
def test_pixel_formats(codec, asked, given, bits, expected):
    found = choose_pix_fmt(codec, asked, given, bits)
    assert found == expected or (given == "rgb24" and av.VideoFormat(found).is_rgb)


def test_encoders():
    assert (default_codec(".mp4", 8), default_codec(".mkv", 10), default_codec(".webm", 8)) == (
        "libx264",
        "libx265",
        "libvpx-vp9",
    )
    with pytest.raises(JobError, match="--codec nonsense is not an encoder"):
        choose_pix_fmt("nonsense", "", "yuv420p", 8)
    with pytest.raises(JobError, match=r"--pix_fmt gray16le is not among those of libx265: choose from yuv420p"):
        choose_pix_fmt("libx265", "gray16le", "yuv420p", 8)


# -------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_copied_and_in_step(run, tmp_path, suffix):
    source = make(tmp_path / f"in{suffix}", EVEN, codec="libx264", sound=True)
    out = tmp_path / f"out{suffix}"
    call(source, "-o", out, "--model", run)
    before, after = packets_of(source, "audio"), packets_of(out, "audio")
    assert [data for _, data in after] == [data for _, data in before]
    shift = times_of(out)[0] - times_of(source)[0]  # a container may move all streams together
    assert [time for time, _ in after] == pytest.approx([time + shift for time, _ in before], abs=2e-3)


def test_all_that_belongs_to_a_video_is_kept(run, tmp_path):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    source = make(tmp_path / "in.mp4", EVEN, codec="libx265", pix_fmt="yuv420p10le", tags=tags, rotation=90)
    kept = tmp_path / "with chapters.mp4"
    with av.open(str(source)) as before, av.open(str(kept), "w") as after:
        stream = after.add_stream_from_template(before.streams.video[0])
        stream.metadata["language"] = "ger"
        after.metadata["title"] = "Straße 1"
        after.set_chapters([{"id": 1, "start": 0, "end": 90, "time_base": Fraction(1, 1000), "metadata": {"title": "first"}}])
        stream.set_display_rotation(90)
        for packet in before.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                after.mux(packet)
    out = tmp_path / "größer und länger.mp4"
    call(kept, "-o", out, "--model", run)
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("hevc", "yuv420p10le")
        assert {name: getattr(context, name) for name in tags} == tags
        assert container.metadata["title"] == "Straße 1"
        assert stream.metadata["language"] == "ger"
        assert [(one["metadata"]["title"], float(one["end"] * one["time_base"])) for one in container.chapters()] == [
            ("first", 0.09)
        ]
        frames = list(container.decode(stream))
    assert {frame.rotation for frame in frames} == {90}
    assert len(frames) == 9


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_mirrored_frames_stay_so(run, tmp_path, suffix):
    source, out = tmp_path / "in.mp4", tmp_path / f"out{suffix}"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(90, hflip=True)
        for number in range(2):
            container.mux(stream.encode(planes(number, "yuv420p")))
        container.mux(stream.encode())
    call(source, "-o", out, "--model", run)
    first = [
        {data.type.name: bytes(data) for data in frame.side_data}["DISPLAYMATRIX"]
        for frame in (*frames_of(source), *frames_of(out))
    ]
    assert len(first) == 5
    assert {struct.unpack("=9i", matrix)[:5] for matrix in first} == {(0, -65536, 0, -65536, 0)}  # 16.16 fixed point


def test_pixel_aspect_is_kept(run, tmp_path):
    source = make(tmp_path / "in.mp4", EVEN[:2], codec="libx264", tags={"sample_aspect_ratio": Fraction(16, 11)})
    call(source, "-o", tmp_path / "out.mp4", "--model", run)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


def aspects_of(path: Path) -> list[str]:
    """The aspect of pixels that each frame states, which only a filter's log tells."""
    graph = av.filter.Graph()
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as logs, av.open(str(path)) as container:
            nodes = [graph.add_buffer(template=container.streams.video[0]), graph.add("showinfo"), graph.add("buffersink")]
            graph.link_nodes(*nodes).configure()
            for frame in container.decode(video=0):
                graph.push(frame)
                graph.pull()
    finally:
        av.logging.set_level(None)
    return re.findall(r" sar:(\d+/\d+) ", "".join(text for _, _, text in logs))


@pytest.mark.parametrize(("codec", "kept"), [("libx264", True), ("ffv1", True), ("libvpx-vp9", False)])
def test_pixel_aspect_in_matroska_is_kept_or_named(run, tmp_path, capsys, codec, kept):
    source = make(tmp_path / "in.mp4", EVEN[:2], codec="libx264", tags={"sample_aspect_ratio": Fraction(16, 11)})
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", codec)
    assert (f"left out: the aspect of pixels (16/11): {codec} in .mkv" in capsys.readouterr().out) == (not kept)
    aspects = aspects_of(tmp_path / "out.mkv")
    assert len(aspects) == 3
    assert set(aspects) == ({"16/11"} if kept else {"0/1"})


def with_box(data: bytes, path: tuple[bytes, ...], box: bytes) -> bytes:
    """An MP4 whose index lies at its end, with one more box at the end of the one at `path`."""
    content, at, end = bytearray(data), 0, 0
    for name in path:
        while content[at + 4 : at + 8] != name:
            at += int.from_bytes(content[at : at + 4], "big")
        size = int.from_bytes(content[at : at + 4], "big")
        content[at : at + 4] = (size + len(box)).to_bytes(4, "big")
        end, at = at + size, at + 8 + {b"stsd": 8, b"avc1": 78}.get(name, 0)
    return bytes(content[:end]) + box + bytes(content[end:])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_borders_that_a_file_hides_are_cut_off(run, tmp_path, capsys, suffix):
    source, out = make(tmp_path / f"in{suffix}", EVEN[:2], codec="libx264"), tmp_path / "out.mkv"
    whole, data = frames_of(source), source.read_bytes()
    if suffix == ".mkv":
        top, left, height, width = 8, 0, 40, 64
        assert data.count(b"\x54\xb2\x81\x04") == 1  # DisplayUnit; PixelCropTop is as long
        source.write_bytes(data.replace(b"\x54\xb2\x81\x04", b"\x54\xbb\x81\x08"))
    else:
        top, left, height, width = 6, 2, 36, 56
        aperture = [
            56,
            1,
            36,
            1,
            left - (64 - 56) // 2,
            1,
            top - (48 - 36) // 2,
            1,
        ]  # its size, and how far its middle lies off
        box = struct.pack(">I4s8i", 40, b"clap", *aperture)
        source.write_bytes(with_box(data, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"), box))
    for flags in ((), ("--deinterlace",)):
        call(source, "-o", out, "--model", run, "--codec", "ffv1", *flags)
        assert f"borders that the file hides are cut off ({left} left, {64 - left - width} right, " in capsys.readouterr().out
        found = frames_of(out)
        assert {(frame.height, frame.width) for frame in found} == {(height, width)}
        if not flags:
            for before, after in zip(whole, found[::2], strict=True):
                shown = before.to_ndarray(format="gray")[top : top + height, left : left + width]
                assert np.array_equal(shown, after.to_ndarray(format="gray"))


@pytest.mark.parametrize(("layout", "suffix", "codec", "said"), [
    ("left_right", ".mkv", "ffv1", ""), ("bottom_top", ".mkv", "libx264", ""), ("top_bottom", ".mp4", "libx264", ""),
    ("right_left", ".mp4", "libx264", "right_left"), ("left_right", ".mp4", "libx265", "left_right"),
])  # fmt: skip
def test_the_layout_of_stereo_frames_is_kept_or_named(run, tmp_path, capsys, layout, suffix, codec, said):
    source = make(tmp_path / "in.mkv", EVEN[:2], codec="libx264", size=(64, 64), stream_tags={"stereo_mode": layout})
    out = tmp_path / f"out{suffix}"
    call(source, "-o", out, "--model", run, "--codec", codec)
    assert (f"left out: the layout of stereo frames ({said})" in capsys.readouterr().out) == bool(said)
    with av.open(str(out)) as container:
        data = [bytes(one) for one in next(container.decode(video=0)).side_data if one.type.name == "STEREO3D"]
    kinds = {
        "left_right": (1, 0),
        "bottom_top": (2, 1),
        "top_bottom": (2, 0),
    }  # of libavutil's AVStereo3D, and whether inverted
    assert [struct.unpack("=2i", one[:8]) for one in data] == ([] if said else [kinds[layout]])


def test_views_in_turn_are_refused(run, tmp_path, capsys):
    source = make(tmp_path / "in.mkv", EVEN[:2], codec="libx264", stream_tags={"stereo_mode": "block_rl"})
    line = refused(capsys, source, "-o", tmp_path / "out.mkv", "--model", run)
    assert "in.mkv shows right and left in turn" in line
    assert line.endswith("ffmpeg -vf stereo3d=ar:sbsl")


def test_what_a_container_can_not_hold_is_named(run, tmp_path, capsys):
    source = make(tmp_path / "in.mkv", EVEN[:2], codec="libx264", sound=True)  # FLAC
    call(source, "-o", tmp_path / "out.webm", "--model", run)
    assert "left out: audio 1 (flac): .webm can't hold it" in capsys.readouterr().out
    assert len(frames_of(tmp_path / "out.webm")) == 3


# ------------------------------------------------------------------------------------------------- cuts and repetitions


def test_a_scene_cut_is_not_blended(run, tmp_path, capsys):
    shown = [scene(0), scene(0, 4), scene(150), scene(150, 4)]
    source = make(tmp_path / "in.mkv", EVEN[:4], frames=shown)
    for flags, cuts in (((), 1), (("--scene_cut", 0), 0)):
        out = tmp_path / f"{cuts}.mkv"
        call(source, "-o", out, "--model", run, "--multiplier", 4, "--codec", "ffv1", *flags)
        assert ("1 scene cuts" in capsys.readouterr().out) == bool(cuts)
        found = [pixels(frame) for frame in frames_of(out)]
        at_cut = found[4:9]  # from the frame before the cut to the one after it
        same = [next((i for i in (0, 4) if np.array_equal(frame, at_cut[i])), None) for frame in at_cut]
        assert same == ([0, 0, 4, 4, 4] if cuts else [0, None, None, None, 4])


def test_where_nothing_changes_nothing_is_computed(run, tmp_path, monkeypatch):
    calls = []
    plain = InterpolationEngine.start
    monkeypatch.setattr(InterpolationEngine, "start", lambda self, *given: calls.append(given[2]) or plain(self, *given))
    source = make(tmp_path / "in.mkv", EVEN[:4], frames=[scene(0), scene(0), scene(0, 8), scene(0, 8)])
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1", "--multiplier", 3)
    assert calls == [[Fraction(1, 3), Fraction(2, 3)]]  # of one pair of three, and both frames by one call
    found = [pixels(frame) for frame in frames_of(tmp_path / "out.mkv")]
    assert all(np.array_equal(frame, found[0]) for frame in found[:4])


def test_repeated_frames_are_left_out_where_that_is_asked_for(run, tmp_path, capsys):
    source = make(
        tmp_path / "in.mkv", [0, 40, 80, 120, 160], frames=[scene(0), scene(0), scene(0, 8), scene(0, 8), scene(0, 16)]
    )
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1", "--drop_duplicates", "--fps", 25)
    assert "2 duplicates left out" in capsys.readouterr().out
    found = [frame.to_ndarray()[:48].mean() for frame in frames_of(tmp_path / "out.mkv")]
    steps = np.diff(found)
    assert len(found) == 5
    assert steps == pytest.approx(np.full(4, steps.mean()), abs=0.6)  # evenly, where it stood still and jumped
    assert steps.mean() > 2


# --------------------------------------------------------------------------------------------------- what can go wrong


def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, capsys):
    whole = make(tmp_path / "in.mkv", [40 * n for n in range(20)])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    content = make(tmp_path / "t.mp4", EVEN, codec="libx264").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: content.index(b"moov")])  # its head is at the end
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        container.add_stream("aac", rate=48_000, layout="mono")
    out = ("-o", tmp_path / "new" / "out.mp4", "--model", run)
    for name in ("text.mp4", "empty.mp4", "cut.mp4"):
        assert f"{name} cannot be read as a video" in refused(capsys, tmp_path / name, *out)
    assert "sound.mp4" in refused(capsys, tmp_path / "sound.mp4", *out)
    assert "none.mp4 does not exist" in refused(capsys, tmp_path / "none.mp4", *out)
    small = make(tmp_path / "small.mkv", EVEN[:2], size=(16, 64))
    assert "small.mkv is 64x16 (width x height): each side must be at least 32" in refused(capsys, small, *out)
    before = whole.read_bytes()
    assert "is the input" in refused(capsys, whole, "-o", whole, "--model", run)
    assert whole.read_bytes() == before
    assert "exclude each other" in refused(capsys, whole, *out, "--fps", 50, "--slowmo", 2)
    assert "--multiplier 1 must lie between 2 and 64" in refused(capsys, whole, *out, "--multiplier", 1)
    assert "--input_fps 5.0 is for a folder of frames" in refused(capsys, whole, *out, "--input_fps", 5)
    assert "a video ends in .mp4" in refused(capsys, whole, "-o", tmp_path / "out.avi2", "--model", run)
    assert "need a folder" in refused(capsys, whole, small, *out)
    assert not list((tmp_path / "new").iterdir())


def test_a_truncated_video_is_told_and_taken_when_asked_for(run, tmp_path, capsys):
    frames = [planes(n, "yuv420p") for n in range(24)]
    whole = make(tmp_path / "in.mp4", [40 * n for n in range(24)], codec="mpeg4", frames=frames)
    data = bytearray(whole.read_bytes())
    start = data.index(b"mdat")
    first = start + (data.index(b"moov") - start) // 2  # the head is at the end and stays; half of what it points to is gone
    data[first : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - first)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(bytes(data))
    message = refused(capsys, damaged, "-o", tmp_path / "out.mp4", "--model", run)
    assert "damaged.mp4 is damaged after" in message
    assert "--allow_damaged" in message
    assert not (tmp_path / "out.mp4").exists()
    call(damaged, "-o", tmp_path / "out.mp4", "--model", run, "--allow_damaged")
    assert "damaged.mp4 is damaged: at " in capsys.readouterr().out
    assert 1 < len(frames_of(tmp_path / "out.mp4")) < 47


def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path):
    source = make(tmp_path / "in.mkv", [40 * n for n in range(40)])
    code = f"import sys; from vfi.interpolate import main; main({[str(source), '-o', str(tmp_path / 'out.mkv'), '--codec', 'ffv1', '--model', str(run), '--device', 'cpu']!r})"  # noqa: E501

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    ended = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "cannot be written: File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mkv"]


def test_an_error_of_a_thread_reaches_the_job():
    class Sink:
        pix_fmt = "rgb24"

        def write(self, frame, pts):
            raise JobError("full")

        def copy(self, packet):
            raise AssertionError

    def write() -> None:
        sink = Sink()
        with BackgroundWriter(sink) as behind:
            for number in range(100):
                behind.put(lambda number=number: sink.write(None, number))

    with pytest.raises(JobError, match="full"):
        write()

    def items():
        yield 1
        raise JobError("damaged")

    reading = prefetch(items(), 4)
    assert next(reading) == 1
    with pytest.raises(JobError, match="damaged"):
        next(reading)


def test_no_more_is_read_ahead_than_a_few_frames():
    taken = []
    reading = prefetch((taken.append(n) or n for n in range(1000)), 4)
    for _ in range(5):
        next(reading)
    assert len(taken) < 20
    reading.close()
    assert len(taken) < 20


def test_what_does_not_fit_into_memory_is_made_in_tiles(run, tmp_path, monkeypatch, capsys):
    plain = LoadedModel.predict_several
    asked = []

    def small_memory(self, img0, *rest):
        asked.append(tuple(img0.shape[-2:]))
        if max(img0.shape[-2:]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, img0, *rest)

    source = make(tmp_path / "in.mkv", EVEN[:3], size=(96, 1200))
    call(source, "-o", tmp_path / "whole.mkv", "--model", run, "--codec", "ffv1")
    monkeypatch.setattr(LoadedModel, "predict_several", small_memory)
    room = 600
    call(source, "-o", tmp_path / "tiles.mkv", "--model", run, "--codec", "ffv1")
    assert capsys.readouterr().err.count("1200x96 frames don't fit into memory: they are made in tiles of at most 576x576") == 1
    assert asked[0] == (96, 1200)
    assert set(asked[1:]) == {(96, 512)}
    whole, tiles = (frames_of(tmp_path / name) for name in ("whole.mkv", "tiles.mkv"))
    assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(whole, tiles, strict=True))
    room = 100
    message = refused(capsys, source, "-o", tmp_path / "none.mkv", "--model", run)
    assert "don't fit into the memory of the cpu, not even in tiles of 256 pixels" in message
    assert not (tmp_path / "none.mkv").exists()
    assert "--tile 100 must be at least 256" in refused(capsys, source, "-o", tmp_path / "x.mkv", "--model", run, "--tile", 100)


# ------------------------------------------------------------------------------------------------ folders, several inputs


def test_several_videos_go_into_a_folder(run, tmp_path, capsys):
    first, second = make(tmp_path / "a b.mkv", EVEN[:2]), make(tmp_path / "ü.mp4", EVEN[:3], codec="libx264")
    call(first, second, "-o", tmp_path / "more", "--model", run)
    assert sorted(path.name for path in (tmp_path / "more").iterdir()) == ["a b.mkv", "ü.mp4"]
    assert [len(frames_of(tmp_path / "more" / name)) for name in ("a b.mkv", "ü.mp4")] == [3, 5]
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    (tmp_path / "other").mkdir()
    twin = make(tmp_path / "other" / "ü.mp4", EVEN[:2], codec="libx264")
    assert "two inputs would become the same file" in refused(capsys, second, twin, "-o", tmp_path / "more", "--model", run)


def test_the_encoders_preset_is_what_is_asked_for(run, tmp_path, capsys):
    """libx264 writes its settings into the video; one that it does not know leaves nothing behind."""
    source = make(tmp_path / "in.mkv", EVEN[:3])
    medium = ["--encoder_preset", "medium", "--crf", 16]
    for flags, found in (([], (b" me=hex subme=1 ", b" crf=14.0 ")), (medium, (b"subme=7 ", b" crf=16.0 "))):
        call(source, "-o", tmp_path / "out.mp4", "--model", run, *flags)
        assert all(setting in (tmp_path / "out.mp4").read_bytes() for setting in found)
    line = refused(capsys, source, "-o", tmp_path / "none.mp4", "--model", run, "--encoder_preset", "quick")
    assert line.startswith("error: --codec libx264 can't be used with crf=14 preset=quick and yuv420p: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mkv", "out.mp4"]


def test_a_folder_of_frames_comes_out_and_goes_in(run, tmp_path, capsys):
    source = make(tmp_path / "in.mkv", EVEN[:3], pix_fmt="yuv444p")
    call(source, "-o", tmp_path / "frames", "--model", run)
    assert [path.name for path in sorted((tmp_path / "frames").iterdir())] == [f"{n:08d}.png" for n in range(5)]
    first = interpolate.read_image(tmp_path / "frames" / "00000000.png")
    with VideoInput(source) as video:
        assert np.array_equal(first, to_rgb(next(iter(video.read())), video.colours))
    assert "already exists" in refused(capsys, source, "-o", tmp_path / "frames", "--model", run)
    assert "are for a video" in refused(capsys, source, "-o", tmp_path / "f", "--model", run, "--crf", 3)
    call(tmp_path / "frames", "-o", tmp_path / "back.mp4", "--model", run, "--input_fps", 10, "--fps", 20)
    assert times_of(tmp_path / "back.mp4") == pytest.approx([n / 20 for n in range(10)], abs=1e-3)
    with VideoInput(tmp_path / "back.mp4") as video:
        assert (video.colours.matrix, video.colours.full_range, video.pix_fmt) == (1, False, "yuv420p")


# ------------------------------------------------------------------------------------------------------ pixels of RGB input


def test_lossless_video_of_images_has_their_pixels(run, tmp_path):
    images = [np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8) for number in range(3)]
    (tmp_path / "frames").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "frames" / f"{number}.png")
    call(tmp_path / "frames", "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    found = frames_of(tmp_path / "out.mkv")
    assert found[0].format.is_rgb
    for number, image in enumerate(images):
        assert np.array_equal(found[2 * number].to_ndarray(format="rgb24"), image)
    with av.open(str(tmp_path / "out.mkv")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (0, 2)  # RGB, full range


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_rgb_becomes_4_2_0_of_a_stated_matrix_unless_asked(run, tmp_path, codec):
    source = tmp_path / "in.gif"
    images = [Image.fromarray(np.full((48, 64, 3), (40 + 20 * number, 90, 160), np.uint8)) for number in range(3)]
    images[0].save(source, save_all=True, append_images=images[1:], duration=100)
    call(source, "-o", tmp_path / "out.mp4", "--model", run, "--codec", codec)
    found = frames_of(tmp_path / "out.mp4")
    assert {frame.format.name for frame in found} == {"yuv420p"}
    with VideoInput(tmp_path / "out.mp4") as video:
        assert video.says_matrix == video.colours.matrix == 5  # BT.601 at this size
        for image, frame in zip(images, found[::2], strict=True):
            assert np.abs(to_rgb(frame, video.colours).astype(int) - np.asarray(image)).max() <= 3
        assert video.stream.codec_context.codec_tag == {"libx264": "avc1", "libx265": "hvc1"}[codec]
    call(source, "-o", tmp_path / "full.mp4", "--model", run, "--codec", codec, "--pix_fmt", "yuv444p")
    assert {frame.format.name for frame in frames_of(tmp_path / "full.mp4")} == {"yuv444p"}


def test_transparency_is_left_out_and_said(run, tmp_path, capsys):
    """Frames of the input would keep it, and those made would be opaque: a flicker."""
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 4), 128, np.uint8), format="rgba")
    source = make(
        tmp_path / "in.mkv", EVEN[:3], pix_fmt="yuva420p", frames=[frame.reformat(format="yuva420p") for _ in range(3)]
    )
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    assert "its transparency is left out" in capsys.readouterr().out
    assert {frame.format.name for frame in frames_of(tmp_path / "out.mkv")} == {"yuv420p"}
    message = refused(capsys, source, "-o", tmp_path / "no.mkv", "--model", run, "--codec", "ffv1", "--pix_fmt", "yuva420p")
    assert "--pix_fmt yuva420p has transparency, which is not interpolated" in message


@pytest.mark.parametrize(("alpha", "said"), [(255, False), (128, True)])
def test_transparent_images_are_said(run, tmp_path, capsys, alpha, said):
    (tmp_path / "frames").mkdir()
    for number in (1, 2):
        pixels = np.full((48, 64, 4), 100, np.uint8)
        pixels[..., 3] = alpha
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{number}.png")
    call(tmp_path / "frames" / "1.png", tmp_path / "frames" / "2.png", "-o", tmp_path / "out.png", "--model", run)
    call(tmp_path / "frames", "-o", tmp_path / "out", "--model", run)
    assert capsys.readouterr().out.count("(over black)") == 2 * said


def test_flags_of_tracks_are_kept(run, tmp_path):
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = 48, 64, "yuv420p", Fraction(1, 1000)
        sounds = [container.add_stream("flac", rate=48_000, layout="mono") for _ in range(2)]
        sounds[0].disposition, sounds[1].disposition = av.stream.Disposition.forced, av.stream.Disposition.default
        for number, pts in enumerate(EVEN):
            frame = planes(number, "yuv420p")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
            for sound in sounds:
                piece = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 48_000, number * 1920, Fraction(1, 48_000)
                container.mux(sound.encode(piece))
        for each in (stream, *sounds):
            container.mux(each.encode())
    call(path, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    with av.open(str(tmp_path / "out.mkv")) as container:
        flags = [stream.disposition for stream in container.streams.audio]
        assert flags == [av.stream.Disposition.forced, av.stream.Disposition.default]
