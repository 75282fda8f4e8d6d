"""Test clips of X4K1000FPS from the distributed video files: all 65 frames, in order, and no clip of another length."""

from __future__ import annotations

import av
import numpy as np
import pytest
from published import PUBLISHED
from sources import digests, members, panning, write_video

from shards import codecs, x4k1000fps
from shards.color_conversion import CONVERSION, describe_colours, to_rgb
from shards.schema import read_index
from shards.verify import verify

CLIPS = ("002/occ008.320", "002/occ008.322", "010/occ1.1")


@pytest.fixture
def src(tmp_path):
    for seed, clip in enumerate(CLIPS):
        write_video(tmp_path / "set" / "encoded_train" / f"{clip}.mp4", panning(65, seed))
    return tmp_path / "set"


def run(src, out, *flags):
    return x4k1000fps.main([str(part) for part in ("--src", src, "--out", out, "--split", "train", *flags)])


def decoded(path):
    """Return the frames of a video, decoded with PyAV alone: uint8 [N, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([to_rgb(frame, describe_colours(frame)) for frame in container.decode(video=0)])


def test_video_files_give_all_frames_in_order(src, tmp_path):
    assert run(src, tmp_path / "out", "--codec", "qoi") == 0
    index = read_index(tmp_path / "out")
    assert (index.codec, index.frames, index.clips) == ("qoi", 65, CLIPS)
    found = members(tmp_path / "out")
    assert list(found) == ["002_occ008_320", "002_occ008_322", "010_occ1_1"]
    for clip, frames in zip(CLIPS, found.values(), strict=True):
        stored = np.stack([codecs.decode(data, "qoi") for data in frames])
        np.testing.assert_array_equal(stored, decoded(src / "encoded_train" / f"{clip}.mp4"))
    assert verify(tmp_path / "out") == []


def test_videos_become_jpeg_unless_told_otherwise(src, tmp_path):
    assert run(src, tmp_path / "out") == 0
    index = read_index(tmp_path / "out")
    assert (index.codec, index.source["arguments"]["codec"]) == ("jpeg", "jpeg")
    assert (index.color_conversion, index.source["jpeg_encoder"]) == (CONVERSION, "pillow")
    stored = np.stack([codecs.decode(data, "jpg") for data in members(tmp_path / "out")["010_occ1_1"]])
    error = stored.astype(int) - decoded(src / "encoded_train" / "010" / "occ1.1.mp4")
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 40


def test_bytes_of_videos_do_not_depend_on_workers(src, tmp_path):
    for name, workers in (("one", "1"), ("two", "2")):
        assert run(src, tmp_path / name, "--samples_per_shard", "1", "--workers", workers) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_frames_are_taken_where_both_are_there(src, tmp_path):
    PUBLISHED["x_train"].build(src)
    assert run(src, tmp_path / "out") == 0
    assert read_index(tmp_path / "out").clips == ("002/occ008.320", "002/occ008.322")


@pytest.mark.parametrize("count", [64, 66])
def test_a_clip_of_another_length_is_named_and_nothing_is_written(src, tmp_path, fails, count):
    write_video(src / "encoded_train" / "010" / "occ1.2.mp4", panning(count))
    message = fails(x4k1000fps.main, "--src", src, "--out", tmp_path / "out", "--split", "train")
    assert f"encoded_train/010/occ1.2.mp4 has {count} frames instead of 65; nothing was written" in message
    assert not (tmp_path / "out").exists()


def test_a_clip_that_turns_out_shorter_than_its_head_says_is_named(src, tmp_path, capsys, monkeypatch):
    write_video(src / "encoded_train" / "010" / "occ1.1.mp4", panning(64))
    monkeypatch.setattr(x4k1000fps, "promised_frames", lambda path: 0)
    assert run(src, tmp_path / "out") == 2
    assert "010/occ1.1 has 64 frames instead of 65" in capsys.readouterr().err


def test_a_cut_off_file_is_named_and_nothing_is_written(src, tmp_path, fails):
    path = src / "encoded_train" / "002" / "occ008.322.mp4"
    path.write_bytes(path.read_bytes()[:1000])
    assert "occ008.322.mp4" in fails(x4k1000fps.main, "--src", src, "--out", tmp_path / "out", "--split", "train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["occ1.mp4", "010/deep/occ1.mp4", "010/occ1.avi"])
def test_an_unexpected_video_is_named(src, tmp_path, fails, file):
    write_video(src / "encoded_train" / file, panning(3))
    message = fails(x4k1000fps.main, "--src", src, "--out", tmp_path / "out", "--split", "train")
    assert f"are not part of the set: encoded_train/{file};" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "train", "--codec", "copy"), "needs frame files"),
        (("--split", "val"), "train, test"),
        (("--split", "test"), "mp4_decoding.py"),
    ],
)
def test_what_videos_are_no_good_for(src, tmp_path, fails, flags, message):
    assert message in fails(x4k1000fps.main, "--src", src, "--out", tmp_path / "out", *flags)
