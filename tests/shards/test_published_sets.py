"""Test that every published layout becomes shards bit for bit and in order of time, and that wrong files are reported first."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from published import PUBLISHED, Layout
from sources import digests, members, write_noise, write_set

from shards import codecs, middlebury, published_sets, snu_film, ucf101, vimeo90k, x4k1000fps, xiph
from shards.schema import INDEX_NAME, ShardError, read_index
from shards.verify import verify


@pytest.fixture(params=PUBLISHED)
def layout(request) -> Layout:
    return PUBLISHED[request.param]


@pytest.fixture
def src(layout, tmp_path):
    return layout.build(tmp_path / "set")


def run(layout, src, out, *flags):
    arguments = ["--src", src, "--out", out, *layout.flags, *flags]
    return layout.job.main([str(argument) for argument in arguments])


def test_frames_are_copied_bit_for_bit_in_order_of_time(layout, src, tmp_path, capsys):
    assert run(layout, src, tmp_path / "out") == 0
    assert f"{len(layout.samples)} samples" in capsys.readouterr().out
    expected = {key: [(src / file).read_bytes() for file in files] for key, files in layout.samples.items()}
    assert members(tmp_path / "out") == expected
    index = read_index(tmp_path / "out")
    assert (index.split, index.codec, index.clips) == (layout.split, "png", layout.clips)
    assert index.frames == len(next(iter(layout.samples.values())))
    assert verify(tmp_path / "out") == []


def test_the_frames_names_and_the_clip_stay_with_a_sample(tmp_path):
    layout = PUBLISHED["middlebury"]
    run(layout, layout.build(tmp_path / "set"), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        meta = json.load(tar.extractfile("Venus.json"))
    assert meta == {"clip": "Venus", "frames": ["frame10.png", "frame10i11.png", "frame11.png"], "height": 16, "width": 24}


def test_bytes_do_not_depend_on_workers(layout, src, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        assert run(layout, src, tmp_path / name, "--samples_per_shard", 1, "--workers", workers) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_killed_job_goes_on(tmp_path):
    """After a real SIGKILL no worker survives, the next run completes the folder, and finished shards are kept."""
    names = [f"{folder}/{frame}" for folder in range(40) for frame in ("frame_00.png", "frame_01_gt.png", "frame_02.png")]
    src = write_set(tmp_path / "set", names)
    arguments = ["--src", str(src), "--samples_per_shard", "1"]
    command = [sys.executable, "-m", "shards.ucf101", "--out", str(tmp_path / "cut"), "--workers", "2", *arguments]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "shard-000003.tar").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    job.kill()
    job.communicate(timeout=30)  # stderr is shared with the workers: it ends when the last of them has gone
    assert not (tmp_path / "cut" / INDEX_NAME).exists()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("shard-*.tar")}
    assert 0 < len(done) < 40
    for name in ("cut", "whole"):
        ucf101.main(["--out", str(tmp_path / name), *arguments])
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in done} == done


def test_a_missing_frame_is_named_and_nothing_is_written(layout, src, tmp_path, capsys):
    gone = next(iter(layout.samples.values()))[1]
    (src / gone).unlink()
    assert run(layout, src, tmp_path / "out") == 2
    assert f"missing in {src}: {gone}; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ucf101", "11/frame_03.png"),
        ("ucf101", "frame_00.png"),
        ("middlebury", "other-data/Venus/flow10.png"),
        ("middlebury", "other-gt-interp/Venus/frame10.png"),
        ("xiph", "Tango-101.png"),
        ("xiph", "Tango-000.png"),
        ("xiph", "Boat-001.png"),
        ("xiph", "FoodMarket2/Tango-002.png"),
        ("x_train", "train/002/occ008.320/0065.png"),
        ("x_train", "train/occ008.320/0000.png"),
        ("x_test", "test/Type1/TEST01_003_f0433/0033.png"),
        ("x_test", "test/Type1/0000.jpg"),
    ],
)
def test_an_unexpected_frame_is_named_and_nothing_is_written(tmp_path, fails, name, file):
    layout = PUBLISHED[name]
    src = layout.build(tmp_path / "set")
    write_noise(src / file, 0)
    message = fails(layout.job.main, "--src", src, "--out", tmp_path / "out", *layout.flags)
    assert f"1 files in {src} are not part of the set: {file}; expected" in message
    assert not (tmp_path / "out").exists()


def test_hidden_files_and_other_kinds_of_files_are_passed_over(tmp_path):
    layout = PUBLISHED["ucf101"]
    src = layout.build(tmp_path / "set")
    (src / "readme.txt").write_text("mine")
    write_noise(src / ".thumbnails" / "1.png", 0)
    assert run(layout, src, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ucf101", 379), ("middlebury", 12), ("xiph", 392), ("snu_film", 310), ("x_train", 4408), ("x_test", 15)],
)
def test_another_number_of_samples_is_a_warning(tmp_path, capsys, name, expected):
    layout = PUBLISHED[name]
    run(layout, layout.build(tmp_path / "set"), tmp_path / "out")
    error = capsys.readouterr().err
    assert f"has {len(layout.samples)} samples, the published one has {expected:,}: results are not comparable" in error


@pytest.mark.parametrize(
    ("name", "size"), [("ucf101", "256x256"), ("xiph", "2160x4096"), ("x_train", "768x768"), ("x_test", "2160x4096")]
)
def test_another_size_is_a_warning(tmp_path, capsys, name, size):
    layout = PUBLISHED[name]
    run(layout, layout.build(tmp_path / "set"), tmp_path / "out")
    assert f"are 16x24 pixels, the published ones {size}: results are not comparable" in capsys.readouterr().err


def test_another_size_of_some_samples_is_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ucf101, "SIZE", (16, 24))
    layout = PUBLISHED["ucf101"]
    src = layout.build(tmp_path / "set")
    for frame in ucf101.FRAMES:
        write_noise(src / "11" / frame, 0, size=(16, 32))
    assert run(layout, src, tmp_path / "out") == 0
    assert "are 16x24 to 16x32 pixels, the published ones 16x24: results" in capsys.readouterr().err


def test_no_warning_for_a_set_as_published(layout, src, tmp_path, capsys, monkeypatch):
    for job in (ucf101, middlebury, xiph, snu_film):
        monkeypatch.setattr(job, "EXPECTED", len(layout.samples))
    for job in (ucf101, xiph):
        monkeypatch.setattr(job, "SIZE", (16, 24))
    monkeypatch.setattr(x4k1000fps, "EXPECTED", {"train": 2, "test": 3})
    monkeypatch.setattr(x4k1000fps, "SIZE", {"train": (16, 24), "test": (16, 24)})
    assert run(layout, src, tmp_path / "out") == 0
    assert capsys.readouterr().err == ""


def test_frames_of_different_sizes_in_a_sample_are_refused(layout, src, tmp_path, capsys):
    write_noise(src / next(iter(layout.samples.values()))[1], 0, size=(24, 16))
    assert run(layout, src, tmp_path / "out") == 2
    assert "has frames of different sizes: [(16, 24), (24, 16)]" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_broken_frame_is_named(layout, src, tmp_path, capsys):
    path = src / next(iter(layout.samples.values()))[2]
    path.write_bytes(path.read_bytes()[:100])
    assert run(layout, src, tmp_path / "out") == 2
    assert f"{path} cannot be decoded" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_file_that_only_says_that_it_is_a_png_is_not_copied(tmp_path, capsys):
    layout = PUBLISHED["ucf101"]
    src = layout.build(tmp_path / "set")
    Image.new("RGB", (24, 16)).save(src / "1" / "frame_02.png", "jpeg")
    assert run(layout, src, tmp_path / "out") == 2
    assert "frame_02.png is not a PNG file and can't be copied" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ["qoi", "jpeg", "png"])
def test_frames_can_be_compressed_anew(tmp_path, codec):
    layout = PUBLISHED["middlebury"]
    src = layout.build(tmp_path / "set")
    assert run(layout, src, tmp_path / "out", "--codec", codec) == 0
    assert read_index(tmp_path / "out").codec == codec
    for key, frames in members(tmp_path / "out").items():
        for file, data in zip(layout.samples[key], frames, strict=True):
            original = np.asarray(Image.open(src / file)).astype(int)
            difference = np.abs(codecs.decode(data, {"jpeg": "jpg"}.get(codec, codec)) - original)
            assert difference.max() <= (0 if codec != "jpeg" else 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "gif"}, "png, qoi, jpeg"),
        ({"quality": 0}, "quality 0"),
        ({"src": "absent"}, "does not exist"),
        ({"samples_per_shard": 0}, "too small"),
        ({"workers": -1}, "negative"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path, capsys, changes, message):
    layout = PUBLISHED["ucf101"]
    values = {"src": layout.build(tmp_path / "set"), "out": tmp_path / "out"} | changes
    assert layout.job.main([str(part) for name, value in values.items() for part in (f"--{name}", value)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_layout_is_said_to_be_one(layout, tmp_path, fails):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "readme.txt").write_text("empty")
    message = fails(layout.job.main, "--src", tmp_path / "set", "--out", tmp_path / "out", *layout.flags)
    assert "holds no" in message or "has no folder" in message or "cannot be read" in message
    assert not (tmp_path / "out").exists()


def test_names_that_give_the_same_key_are_named(tmp_path):
    layout = PUBLISHED["ucf101"]
    src = write_set(tmp_path / "set", (f"{folder}/{name}" for folder in ("a.b", "a b") for name in ucf101.FRAMES))
    with pytest.raises(ShardError, match="same key a_b"):
        layout.job.make(published_sets.Options(src=src, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("a1\n", "line 1: 'a1' is not of the form a"), ("\na\n\na\n", "line 4: a repeats line 2")],
)
def test_bad_lists_are_named(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ShardError, match=message):
        published_sets.read_list(tmp_path / "list.txt", "[a-z]", "a")


@pytest.mark.parametrize("beside", ["", "readme.txt", "__MACOSX/x.png"])
def test_a_set_one_level_deeper_is_named(layout, tmp_path, fails, beside):
    src = layout.build(tmp_path / "my set" / "set")
    if beside:
        (src.parent / beside).parent.mkdir(exist_ok=True)
        (src.parent / beside).touch()
    message = fails(layout.job.main, "--src", src.parent, "--out", tmp_path / "out", *layout.flags)
    assert message.endswith(f"{src.parent} holds the set one level deeper: give '{src}'")
    assert not (tmp_path / "out").exists()


def test_a_subfolder_that_looks_like_a_set_is_not_taken_for_it(tmp_path, fails):
    layout = PUBLISHED["xiph"]
    src = layout.build(tmp_path / "set")
    write_noise(src / "Boat-001.png", 0)
    assert "are not part of the set: Boat-001.png" in fails(layout.job.main, "--src", src, "--out", tmp_path / "out")
    (src / "Boat-001.png").unlink()
    for number in range(1, 101):
        (src / f"Tango-{number:03d}.png").unlink()
    shutil.copytree(src / "FoodMarket2", src / "other")
    assert "are not part of the set: other/" in fails(layout.job.main, "--src", src, "--out", tmp_path / "out")


def png_of(pixels: np.ndarray, color_type: int) -> bytes:
    """A PNG of 16 bits a channel, written by hand."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.reshape(len(pixels), -1))
    head = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, color_type, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    bodies = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(bodies)


@pytest.mark.parametrize("codec", ["copy", "png"])
def test_16_bits_and_an_opaque_alpha_channel_are_read_as_the_interpolator_reads_them(tmp_path, codec):
    layout = PUBLISHED["ucf101"]
    src = layout.build(tmp_path / "set")
    deep = np.random.default_rng(0).integers(0, 65536, (16, 24, 4), dtype=np.uint16)
    deep[..., 3] = 65535
    (src / "1" / "frame_00.png").write_bytes(png_of(deep[..., :3], 2))
    (src / "1" / "frame_01_gt.png").write_bytes(png_of(deep, 6))
    (src / "1" / "frame_02.png").write_bytes(png_of(deep[..., 0], 0))
    assert run(layout, src, tmp_path / "out", "--codec", codec) == 0
    assert verify(tmp_path / "out") == []
    frames = [codecs.decode(data, "png") for data in members(tmp_path / "out")["1"]]
    for frame, values in zip(frames, (deep[..., :3], deep[..., :3], deep[..., :1].repeat(3, axis=2)), strict=True):
        assert np.abs(frame - values / 257).max() < 1
    assert np.array_equal(frames[0], codecs.read_image(src / "1" / "frame_00.png"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_refused_by_name(layout, src, tmp_path, capsys, mode):
    path = src / next(iter(layout.samples.values()))[1]
    image = Image.open(path).convert(mode)
    if mode == "P":
        image.save(path, transparency=image.getpixel((0, 0)))
    else:
        image.putalpha(Image.fromarray(np.tile(np.uint8(255) - np.uint8([1, 0]), (16, 12))))
        image.save(path)
    assert run(layout, src, tmp_path / "out") == 2
    assert f"{path} has transparent pixels" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shard*"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_lists_from_windows_are_read(tmp_path, encoding):
    (tmp_path / "list.txt").write_text("\r\n 00001\\0001 \t\r\n00001\\0002\r\n", encoding=encoding, newline="")
    assert vimeo90k.read_list(tmp_path / "list.txt") == ["00001/0001", "00001/0002"]
