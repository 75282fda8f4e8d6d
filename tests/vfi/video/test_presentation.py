"""Times of real files: clocks that jump, containers without times, gaps, the last frame; streams, sizes and names."""

from __future__ import annotations

import itertools
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_videos import EVEN, call, frames_of, make, new_run, packets_of, pixels, planes, refused, times_of
from warm import ROOT

from shards.color_conversion import describe_colours, to_rgb
from shards.frame_sources import find_clips, read_clip
from shards.presentation import FrameTimes
from vfi.video.video_input import VideoInput

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "fresh")


def read(path: Path, **options: object) -> tuple[list[float], VideoInput]:
    """The times of a file's frames in seconds, and the file after reading."""
    with VideoInput(path, **options) as video:
        times = [float(frame.pts * video.base) for frame in video.read() if isinstance(frame, av.VideoFrame)]
    return times, video


def joined(path: Path, parts: int = 2, sound: bool = False, size: tuple[int, int] = (48, 64)) -> Path:
    """Transport streams of ten frames, the clock of each starting where that of the first did; later ones of `size`."""
    content = b""
    for part in range(parts):
        shape = (48, 64) if part == 0 else size
        frames = [planes(number, "yuv420p", shape) for number in range(10)]
        one = make(path.with_name(f"{part}.ts"), range(0, 400, 40), codec="libx264", frames=frames, size=shape)
        content += one.read_bytes()
    path.write_bytes(content)
    return path


def test_a_clock_that_starts_again_goes_on(run, tmp_path, capsys):
    source = joined(tmp_path / "in.ts", parts=3)
    times, video = read(source)
    assert times == pytest.approx([0.04 * number for number in range(30)], abs=1e-4)
    assert len(video.notes) == 1
    assert video.notes[0].startswith("its clock jumps at ")
    assert video.notes[0].count(",") == 1  # two jumps
    call(source, "-o", tmp_path / "out.mp4", "--model", run)
    assert times_of(tmp_path / "out.mp4") == pytest.approx([0.02 * number for number in range(59)], abs=1e-4)
    printed = capsys.readouterr().out
    assert "59 frames at 50 per second from 30 at 25, " in printed
    assert "its clock jumps at " in printed


def test_frames_of_another_size_are_scaled_and_said(run, tmp_path, capsys):
    source = joined(tmp_path / "in.ts", size=(64, 96))
    call(source, "-o", tmp_path / "out.mp4", "--model", run)
    assert "10 frames of another size are scaled to 64x48" in capsys.readouterr().out
    found = frames_of(tmp_path / "out.mp4")
    assert {(frame.height, frame.width) for frame in found} == {(48, 64)}
    assert len(found) == 39


def test_a_late_start_is_zero_and_slow_motion_is_not_later_still(run, tmp_path):
    source = make(tmp_path / "in.ts", EVEN, codec="libx264", start=40_000_000)
    assert read(source)[0] == pytest.approx([time / 1000 for time in EVEN], abs=1e-4)
    call(source, "-o", tmp_path / "out.mp4", "--model", run, "--slowmo", 2)
    assert times_of(tmp_path / "out.mp4") == pytest.approx([time / 1000 for time in range(0, 321, 40)], abs=1e-4)


def test_sound_keeps_its_distance_to_the_picture(run, tmp_path):
    source = make(tmp_path / "in.mkv", EVEN, sound=True, start=500)
    before = packets_of(source, "audio")[0][0] - times_of(source)[0]
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    assert packets_of(tmp_path / "out.mkv", "audio")[0][0] - times_of(tmp_path / "out.mkv")[0] == pytest.approx(
        before, abs=2e-3
    )


def test_avi_with_reordered_frames_loses_none(run, tmp_path):
    """AVI has no presentation times: what its reader makes up is out of order."""
    source = tmp_path / "in.avi"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = 48, 64, "yuv420p", {"bf": "2", "b-adapt": "0"}
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(20):
            frame = planes(number, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(source)) as container:
        assert np.diff([frame.pts for frame in container.decode(video=0)]).min() < 0
    times, video = read(source)
    assert len(times) == 20
    assert np.diff(times) == pytest.approx([0.04] * 19, abs=2e-3)
    assert video.notes == []
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    assert len(frames_of(tmp_path / "out.mkv")) == 39


def test_no_frame_is_dropped_for_its_time():
    """Whatever times a decoder gives, those of the output increase, and good ones stay as they are."""
    times = FrameTimes(type("Container", (), {"format": type("Format", (), {"name": "mov"})()})(), usual=10)
    found = []
    for pts in (0, 10, 10, 5, None, 40, 40, 60):
        frame = av.VideoFrame(16, 16, "gray")
        frame.pts = pts
        times.assign(frame)
        found.append(frame.pts)
    assert found == [0, 10, 15, 20, 30, 40, 45, 60]
    assert times.changed == 3
    assert all(before < after for before, after in itertools.pairwise(found))


def test_nothing_is_blended_across_a_gap(run, tmp_path, capsys):
    """Ten frames a second, a screen that is still for three, then another picture."""
    times = [0, 100, 200, 3200, 3300]
    frames = [planes(number, "yuv420p") for number in (0, 1, 2, 12, 13)]
    source, out = make(tmp_path / "in.mkv", times, frames=frames), tmp_path / "out.mkv"
    call(source, "-o", out, "--model", run, "--codec", "ffv1", "--scene_cut", 0)
    assert "1 gaps that are not interpolated (--max_gap)" in capsys.readouterr().out
    before, after = frames_of(source), frames_of(out)
    assert np.array_equal(pixels(after[5]), pixels(before[2]))  # held, and no mean of both
    assert not np.array_equal(pixels(after[3]), pixels(before[1]))
    call(source, "-o", tmp_path / "all.mkv", "--model", run, "--codec", "ffv1", "--scene_cut", 0, "--max_gap", 5)
    assert not np.array_equal(pixels(frames_of(tmp_path / "all.mkv")[5]), pixels(before[2]))


def test_slow_frames_at_equal_distances_are_no_gaps(run, tmp_path, capsys):
    source = make(tmp_path / "in.mp4", [0, 1000, 2000, 3000], codec="libx264")
    call(source, "-o", tmp_path / "out.mp4", "--model", run)
    assert "gaps" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_the_last_frame_is_shown_as_long_as_in_the_input(run, tmp_path, suffix):
    """A GIF states how long each picture stays."""
    source, out = tmp_path / "in.gif", tmp_path / f"out{suffix}"
    from PIL import Image

    images = [Image.fromarray(np.full((48, 64, 3), 20 * number, np.uint8)) for number in range(6)]
    images[0].save(source, save_all=True, append_images=images[1:], duration=[100, 100, 300, 100, 100, 2000])
    call(source, "-o", out, "--model", run)
    with av.open(str(out)) as container:
        assert container.duration / av.time_base == pytest.approx(2.7, abs=2e-3)
    assert times_of(out)[-1] == pytest.approx(0.7, abs=1e-3)
    assert len(times_of(out)) == 11


def test_the_default_video_is_read_and_the_others_are_named(run, tmp_path, capsys):
    """A still picture before the film, which is marked as the default."""
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as container:
        still, film = (container.add_stream("ffv1", rate=25) for _ in range(2))
        for stream, size in ((still, (64, 64)), (film, (48, 64))):
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
        still.disposition, film.disposition = 0, av.stream.Disposition.default
        for number in range(5):
            for stream, size in ((still, (64, 64)), (film, (48, 64))) if number == 0 else ((film, (48, 64)),):
                frame = planes(number, "yuv420p", size)
                frame.pts, frame.time_base = 40 * number, Fraction(1, 1000)
                container.mux(stream.encode(frame))
        for stream in (still, film):
            container.mux(stream.encode())
    call(path, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    assert "of its video streams 0 (ffv1, 64x64), 1 (ffv1, 64x48), 1 is read" in capsys.readouterr().out
    assert len(frames_of(tmp_path / "out.mkv")) == 9
    call(path, "-o", tmp_path / "still.mkv", "--model", run, "--codec", "ffv1", "--video_stream", 0)
    assert [frame.height for frame in frames_of(tmp_path / "still.mkv")] == [64]
    message = refused(capsys, path, "-o", tmp_path / "no.mkv", "--model", run, "--video_stream", 7)
    assert "--video_stream 7: " in message
    assert "it has 0 (ffv1, 64x64), 1 (ffv1, 64x48)" in message


def test_shards_read_the_same_frames(run, tmp_path):
    """Both ways to read a file give the frames of its default stream, whatever the clock of its container."""
    folder = tmp_path / "src"
    folder.mkdir()
    joined(folder / "joined.ts")
    with av.open(str(folder / "reordered.avi"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(20):
            container.mux(stream.encode(planes(number, "yuv420p")))
        container.mux(stream.encode())
    make(folder / "rec:12.mkv", range(0, 400, 40), start=500, options={"g": "1"})
    with av.open(str(folder / "two.mp4"), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.height, stream.width, stream.pix_fmt = 48, 64 + 32 * number, "yuv420p"
            stream.disposition = stream.disposition.default if number else 0
        for number in (0, 1, 1, 1):
            stream = streams[number]
            container.mux(stream.encode(planes(0, "yuv420p", (stream.height, stream.width))))
        for stream in streams:
            container.mux(stream.encode())
    counts = {}
    for clip in find_clips(folder):
        with VideoInput(clip.path) as video:
            whole = [to_rgb(frame, describe_colours(frame)) for frame in video.read() if isinstance(frame, av.VideoFrame)]
        found = [frame.rgb() for frame in read_clip(clip)]
        assert all(np.array_equal(one, other) for one, other in zip(whole, found, strict=True))
        counts[clip.name] = len(found)
    assert counts == {"0.ts": 10, "1.ts": 10, "joined.ts": 20, "rec:12.mkv": 10, "reordered.avi": 20, "two.mp4": 3}


def test_a_damaged_packet_costs_its_frames_only(run, tmp_path, capsys):
    """One of 24 key frames is overwritten."""
    frames = [planes(number, "yuv420p") for number in range(24)]
    whole = make(tmp_path / "in.mkv", [40 * number for number in range(24)], codec="mjpeg", pix_fmt="yuvj420p", frames=None)
    with av.open(str(whole)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert len(packets) == len(frames)
    data = whole.read_bytes()
    at = data.index(packets[12])
    damaged = tmp_path / "damaged.mkv"
    damaged.write_bytes(data[:at] + bytes(len(packets[12])) + data[at + len(packets[12]) :])
    assert "is damaged after 12 frames" in refused(capsys, damaged, "-o", tmp_path / "no.mkv", "--model", run)
    call(damaged, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1", "--allow_damaged")
    assert "45 frames at 50 per second from 23 at 25" in (printed := capsys.readouterr().out)
    assert "damaged.mkv is damaged: at 1 places, first at 0.48 s" in printed
    assert times_of(tmp_path / "out.mkv")[-1] == pytest.approx(0.92, abs=1e-3)


@pytest.mark.parametrize("suffix", [".mov", ".webm"])
def test_sound_that_a_container_cannot_hold_is_left_out_and_named(run, tmp_path, capsys, suffix):
    source = make(tmp_path / "in.mkv", EVEN, sound=True)
    call(source, "-o", tmp_path / f"out{suffix}", "--model", run)
    assert f"left out: audio 1 (flac): {suffix} can't hold it, .mkv may" in capsys.readouterr().out
    assert len(frames_of(tmp_path / f"out{suffix}")) == 9


@pytest.mark.parametrize("name", ["rec:12.mkv", "a%d b#?.mkv", "-.mkv", "ä'\"&.mkv"])
def test_any_name_is_a_file(run, tmp_path, name, monkeypatch):
    make(tmp_path / "in.mkv", EVEN)
    (tmp_path / "in.mkv").rename(tmp_path / name)
    call(tmp_path / name, "-o", tmp_path / f"out {name}", "--model", run, "--codec", "ffv1")
    assert len(frames_of(Path(f"file:{tmp_path / f'out {name}'}"))) == 9


def interlaced(path: Path, flag: bool = True) -> Path:
    """Ten frames of a bar that moves by 4 pixels a field: the odd rows show it half a frame later."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.options = {"x264-params": f"interlaced={int(flag)}:tff=1" if flag else "", "crf": "5"}
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(10):
            image = np.full((64, 96, 3), 40, np.uint8)
            for field in (0, 1):
                left = 8 * number + 4 * field
                image[field::2, left : left + 12] = 200
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def combs(path: Path) -> float:
    """How much neighbouring rows differ, on average over the frames."""
    images = [frame.to_ndarray(format="gray").astype(float) for frame in frames_of(path)]
    return float(np.mean([np.abs(image[1:] - image[:-1]).mean() for image in images]))


def test_interlaced_video_is_refused_with_the_fix_or_made_whole(run, tmp_path, capsys):
    source, out = interlaced(tmp_path / "in.mp4"), tmp_path / "out.mkv"
    common = ("--model", run, "--codec", "ffv1")
    message = refused(capsys, source, "-o", out, *common)
    assert "in.mp4 is interlaced: --deinterlace makes whole frames of its fields" in message
    assert not out.exists()
    call(source, "-o", out, *common, "--deinterlace")
    call(source, "-o", tmp_path / "kept.mkv", *common, "--keep_interlaced")
    assert "its field order is left out" in capsys.readouterr().out
    assert len(frames_of(out)) == len(frames_of(tmp_path / "kept.mkv")) == 19
    assert not any(frame.interlaced_frame for frame in frames_of(out))
    assert combs(out) < 0.3 * combs(tmp_path / "kept.mkv")
    assert times_of(out) == pytest.approx([0.02 * number for number in range(19)], abs=1e-3)
    unmarked = interlaced(tmp_path / "unmarked.mp4", flag=False)
    assert "unmarked.mp4 has combed frames, though it says" in refused(capsys, unmarked, "-o", tmp_path / "no.mkv", *common)
    call(unmarked, "-o", tmp_path / "yes.mkv", *common, "--keep_interlaced")
    line = refused(capsys, source, "-o", tmp_path / "no.mkv", *common, "--deinterlace", "--detelecine")
    assert "exclude each other" in line


def test_telecine_becomes_the_frames_of_the_film(run, tmp_path, capsys):
    """24 frames a second as 30, two of five woven from the fields of neighbours; every fifth frame goes."""
    film = []
    for number in range(24):
        image = np.full((64, 96, 3), 40, np.uint8)
        image[:, 3 * number : 3 * number + 12] = 200
        film.append(image)
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.options = 64, 96, "yuv420p", {"crf": "5"}
        stream.codec_context.time_base = Fraction(1, 30)
        shown = [(4 * group + a, 4 * group + b) for group in range(6) for a, b in ((0, 0), (1, 1), (1, 2), (2, 3), (3, 3))]
        for number, (top, bottom) in enumerate(shown):
            image = film[top].copy()
            image[1::2] = film[bottom][1::2]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    message = refused(capsys, path, "-o", tmp_path / "out.mkv", "--model", run)
    assert message.endswith("--detelecine finds its 24, --keep_interlaced takes it as it is")
    call(path, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1", "--detelecine")
    times = times_of(tmp_path / "out.mkv")
    assert len(times) == 2 * 24 - 1
    assert times[0] == 0
    assert np.diff(times) == pytest.approx([1 / 48] * 46, abs=2e-3)
    assert combs(tmp_path / "out.mkv") < 0.5


def test_a_small_thing_that_moves_is_no_duplicate_and_the_end_is_kept(run, tmp_path, capsys):
    """A box of 16x10 pixels in 640x360, on frames that repeat at the end; with loss, so that no frame repeats exactly."""
    frames = []
    for number in (0, 1, 2, 3, 4, 5, 5, 5):
        image = np.full((360, 640, 3), 90, np.uint8)
        image[100:110, 50 + 5 * number : 66 + 5 * number] = 220
        frames.append(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p"))
    source = make(tmp_path / "in.mkv", [40 * n for n in range(8)], codec="libx264", size=(360, 640), frames=frames)
    call(source, "-o", tmp_path / "out.mkv", "--model", run, "--drop_duplicates", "--codec", "ffv1")
    assert "2 duplicates left out" in capsys.readouterr().out
    assert times_of(tmp_path / "out.mkv") == pytest.approx([0.02 * number for number in range(11)], abs=1e-3)
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.duration / av.time_base == pytest.approx(0.32, abs=2e-3)


def through_pipe(content: bytes, *flags: object) -> tuple[bytes, str]:
    """Standard output and standard error of a conversion of `content` from standard input."""
    command = [sys.executable, "-m", "vfi.interpolate", "-", "-o", "-", "--device", "cpu", *map(str, flags)]
    done = subprocess.run(command, input=content, cwd=ROOT, capture_output=True, timeout=120, check=False)
    return done.stdout, done.stderr.decode()


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_standard_input_to_standard_output(run, tmp_path, pix_fmt):
    """The same frames as through files, at a rate of 30000 / 1001 a second."""
    path, rate = tmp_path / "in.y4m", Fraction(30_000, 1001)
    with av.open(str(path), "w", container_options={"strict": "-1"}) as container:
        stream = container.add_stream("wrapped_avframe", rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = 48, 64, pix_fmt, 1 / rate
        for number in range(4):
            frame = planes(number, pix_fmt)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
    written, said = through_pipe(path.read_bytes(), "--model", run)
    assert "-: 7 frames at 59.9401 per second from 4 at 29.97" in said
    (tmp_path / "piped.y4m").write_bytes(written)
    call(path, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    piped, filed = frames_of(tmp_path / "piped.y4m"), frames_of(tmp_path / "out.mkv")
    assert {frame.format.name for frame in piped} == {pix_fmt}
    assert len(piped) == len(filed) == 7
    assert all(np.array_equal(pixels(one), pixels(other)) for one, other in zip(piped, filed, strict=True))
    with av.open(str(tmp_path / "piped.y4m")) as container:
        assert container.streams.video[0].average_rate == 2 * rate


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume"], "--resume needs files"),
        (["--codec", "ffv1"], "--codec, --crf and --encoder_preset are for files"),
        (["--pix_fmt", "rgb24"], "--pix_fmt rgb24 can't be written to standard output: choose from yuv420p"),
    ],
)
def test_what_a_pipe_cannot_do_is_one_line(run, tmp_path, flags, words):
    source = make(tmp_path / "in.mkv", EVEN)
    written, said = through_pipe(source.read_bytes(), "--model", run, *flags)
    assert written == b""
    assert [line for line in said.splitlines() if line.startswith(f"error: {words}")]
    assert "Traceback" not in said


def test_an_empty_pipe_is_one_line(run):
    written, said = through_pipe(b"", "--model", run)
    assert written == b""
    assert "error: - cannot be read as a video" in said
