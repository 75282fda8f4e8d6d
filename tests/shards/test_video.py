"""Test which sequences of videos and folders of frames are taken or left out, and what happens to broken files."""

from __future__ import annotations

import dataclasses
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from sources import HEIGHT, WIDTH, digests, panning, write_frames, write_video

from shards import codecs, frame_sources, video
from shards.color_conversion import CONVERSION
from shards.frame_sources import find_clips, natural, read_clip
from shards.schema import INDEX_NAME, read_index
from shards.sequence_filter import find_sequences
from shards.verify import verify


def turn(path):
    """Make an MP4 state that it is to be displayed rotated a quarter turn clockwise."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def run(src, out, *flags):
    return video.main(["--src", str(src), "--out", str(out), *(str(flag) for flag in flags)])


def samples_of(folder):
    """Return (json, frames) by key of a whole shard folder, read with tarfile alone."""
    samples = {}
    for entry in read_index(folder).shards:
        with tarfile.open(folder / entry.name) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                data = tar.extractfile(member).read()
                meta, frames = samples.setdefault(key, ({}, []))
                if kind == "json":
                    meta.update(json.loads(data))
                else:
                    frames.append(codecs.decode(data, kind.rpartition(".")[2]))
    return samples


@pytest.fixture
def mixed(tmp_path):
    """Return a folder with three clips (a folder of frames, a video next to it, a video in a subfolder) and other files."""
    src = tmp_path / "src"
    write_frames(src / "walk in park", panning(12, seed=1), "frame{}.png")
    write_video(src / "cars.mp4", panning(10, seed=2))
    write_video(src / "deep" / "er" / "boat.mkv", panning(9, seed=3))
    (src / "readme.txt").write_text("no clip")
    (src / ".hidden").mkdir()
    write_video(src / ".hidden" / "no.mp4", panning(5))
    return src


def test_all_clips_are_found_and_their_frames_kept_exactly(mixed, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(mixed, out, "--samples_per_shard", "10") == 0
    assert "25 samples of 3 frames (png, train) from 3 clips" in capsys.readouterr().out
    index = read_index(out)
    assert index.clips == ("cars.mp4", "deep/er/boat.mkv", "walk in park")
    assert (index.min_size, index.max_size) == ((HEIGHT, WIDTH), (HEIGHT, WIDTH))
    assert (index.filtered, index.skipped) == ({"scene_cut": 0, "duplicate": 0}, {})
    samples = samples_of(out)
    assert next(iter(samples)) == "cars-000000"
    assert "deep__er__boat-000006" in samples
    meta, frames = samples["walk_in_park-000009"]
    assert meta == {"clip": "walk in park", "frames": ["frame9.png", "frame10.png", "frame11.png"], "height": 64, "width": 96}
    np.testing.assert_array_equal(frames, panning(12, seed=1)[9:12])
    whole = [frame.rgb() for frame in read_clip(find_clips(mixed)[1])]
    meta, frames = samples["deep__er__boat-000004"]
    assert meta["frames"] == [4, 5, 6]
    np.testing.assert_array_equal(frames, whole[4:7])
    assert verify(out) == []


def test_bytes_do_not_depend_on_workers_or_on_interruptions(mixed, tmp_path, capsys):
    for name, workers in (("one", 1), ("two", 2), ("cut", 1)):
        assert run(mixed, tmp_path / name, "--samples_per_shard", "4", "--workers", workers) == 0
    (tmp_path / "cut" / INDEX_NAME).unlink()
    for number in (3, 5):
        (tmp_path / "cut" / f"shard-00000{number}.tar").unlink()
    assert run(mixed, tmp_path / "cut", "--samples_per_shard", "4", "--workers", 2) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "cut")
    capsys.readouterr()
    assert run(mixed, tmp_path / "one", "--samples_per_shard", "4") == 0
    assert "complete already" in capsys.readouterr().err


def test_the_index_says_which_conversion_made_the_colours(mixed, tmp_path, monkeypatch, fails):
    out, frames = tmp_path / "out", tmp_path / "frames"
    assert run(mixed, out) == 0
    assert (
        read_index(out).color_conversion
        == CONVERSION
        == json.loads((out / INDEX_NAME).read_text())["source"]["color_conversion"]
    )
    assert run(mixed / "walk in park", frames) == 0
    assert read_index(frames).color_conversion is None
    # shards of before it was noted stay readable
    content = json.loads((out / INDEX_NAME).read_text())
    del content["source"]["color_conversion"]
    (out / INDEX_NAME).write_text(json.dumps(content))
    assert read_index(out).color_conversion is None
    # shards of two conversions don't get mixed in one folder
    monkeypatch.setattr(video, "CONVERSION", "another")
    assert "shards of another job" in fails(video.main, "--src", mixed, "--out", out)


def test_colours_that_can_not_be_converted_are_named_and_the_clip_passed_over(mixed, tmp_path, capsys):
    write_video(mixed / "strange.mkv", panning(5), "libx264", matrix=8)  # YCgCo
    assert run(mixed, tmp_path / "out") == 0
    assert "matrix 8 of ITU-T H.273, which can't be converted" in read_index(tmp_path / "out").skipped["strange.mkv"]
    assert "strange.mkv" in capsys.readouterr().err


def test_stride_step_and_frames(mixed, tmp_path):
    assert run(mixed, tmp_path / "out", "--frames", 4, "--stride", 2, "--step", 3, "--codec", "qoi") == 0
    samples = samples_of(tmp_path / "out")
    assert [key for key in samples if key.startswith("walk")] == ["walk_in_park-000000", "walk_in_park-000003"]
    meta, frames = samples["walk_in_park-000003"]
    assert meta["frames"] == ["frame3.png", "frame5.png", "frame7.png", "frame9.png"]
    np.testing.assert_array_equal(frames, panning(12, seed=1)[3:10:2])


def test_scene_cuts_are_left_out_and_counted(tmp_path):
    src = tmp_path / "src"
    frames = panning(8, seed=1, brightness=90) + panning(7, seed=2, brightness=170) + panning(6, seed=5, brightness=110)
    write_frames(src / "cuts", frames)
    write_video(src / "cuts.mp4", frames)
    assert run(src, tmp_path / "out", "--codec", "jpeg") == 0
    index = read_index(tmp_path / "out")
    assert index.filtered == {"scene_cut": 8, "duplicate": 0}  # each cut spoils two triplets of each clip
    starts = [int(key[-6:]) for key in samples_of(tmp_path / "out")]
    assert starts == 2 * [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 15, 16, 17, 18]


def test_a_cut_between_the_frames_of_a_wide_stride_counts(tmp_path):
    frames = panning(9, seed=1, brightness=90) + panning(9, seed=2, brightness=170)
    clip = find_clips(write_frames(tmp_path / "cuts", frames))[0]
    found = find_sequences(clip, frames=3, stride=3, step=1)
    assert found.starts == (0, 1, 2, 9, 10, 11)
    assert found.scene_cut == 6


def test_fast_motion_is_no_cut(tmp_path):
    clip = find_clips(write_frames(tmp_path / "fast", panning(9, speed=24)))[0]
    found = find_sequences(clip, frames=3, stride=1, step=1)
    assert (len(found.starts), found.scene_cut) == (7, 0)


def test_repeated_frames_are_left_out_and_counted(tmp_path):
    moving = panning(10)
    noisy = moving[4] + (np.random.default_rng(0).random((HEIGHT, WIDTH, 1)) < 0.2).astype(np.uint8)
    src = tmp_path / "src"
    write_frames(src / "repeats", [*moving[:5], noisy, *moving[5:]])
    assert run(src, tmp_path / "out") == 0
    assert read_index(tmp_path / "out").filtered == {"scene_cut": 0, "duplicate": 2}
    assert [int(key[-6:]) for key in samples_of(tmp_path / "out")] == [0, 1, 2, 5, 6, 7, 8]
    # frames 4 and 5 are never two apart: with stride 2 they lie in no pair of neighbours
    clip = find_clips(src)[0]
    assert find_sequences(clip, frames=3, stride=2, step=1).duplicate == 0


def test_frames_of_different_sizes_are_never_in_one_sequence(tmp_path):
    frames = panning(8)
    write_frames(tmp_path / "src" / "sizes", [*frames[:4], *(np.ascontiguousarray(f[:48, :80]) for f in frames[4:])])
    assert run(tmp_path / "src", tmp_path / "out") == 0
    index = read_index(tmp_path / "out")
    assert (index.samples, index.min_size, index.max_size) == (4, (48, 80), (64, 96))
    assert verify(tmp_path / "out") == []


def test_one_clip_never_spans_two_splits(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    for number in range(8):
        write_frames(src / f"clip{number}", panning(4, seed=number))
    assert run(src, out, "--val_fraction", 0.25) == 0
    train, val = read_index(out / "train"), read_index(out / "val")
    assert (train.split, val.split) == ("train", "val")
    assert set(train.clips) | set(val.clips) == {f"clip{number}" for number in range(8)}
    assert not set(train.clips) & set(val.clips)
    for folder, index in ((out / "train", train), (out / "val", val)):
        assert {meta["clip"] for meta, _ in samples_of(folder).values()} == set(index.clips)
    # a clip's side depends on its name: one more clip moves none of the others
    write_frames(src / "another", panning(4, seed=99))
    assert run(src, tmp_path / "more", "--val_fraction", 0.25) == 0
    assert set(val.clips) - {"another"} == set(read_index(tmp_path / "more" / "val").clips) - {"another"}
    assert run(src, out, "--val_fraction", 0.25) == 2  # other sources: refused


@pytest.mark.parametrize(("name", "split"), [("val", "val"), ("test", "test"), ("clips", "train")])
def test_a_folder_named_after_a_split_is_of_it_unless_said_otherwise(tmp_path, name, split):
    write_frames(tmp_path / "src" / "clip", panning(4))
    assert run(tmp_path / "src", tmp_path / name) == 0
    assert read_index(tmp_path / name).split == split
    assert run(tmp_path / "src", tmp_path / "own" / name, "--split", "train") == 0
    assert read_index(tmp_path / "own" / name).split == "train"


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_splits_get_a_clip(tmp_path, fraction):
    for number in range(3):
        write_frames(tmp_path / "src" / f"clip{number}", panning(4, seed=number))
    assert run(tmp_path / "src", tmp_path / "out", "--val_fraction", fraction) == 0
    assert min(read_index(tmp_path / "out" / split).samples for split in ("train", "val")) >= 2


def test_names_that_look_alike_get_keys_of_their_own(tmp_path):
    src = tmp_path / "src"
    long = "x" * 70
    for seed, name in enumerate(("a b", "a_b", "a.b", f"{long}1", f"{long}2")):
        write_frames(src / name, panning(4, seed=seed))
    write_video(src / "a_b.mp4", panning(4, seed=9))
    assert run(src, tmp_path / "out") == 0
    assert len(samples_of(tmp_path / "out")) == 12
    assert verify(tmp_path / "out") == []


def test_max_height_makes_frames_smaller(tmp_path):
    src = tmp_path / "src"
    frames = [np.ascontiguousarray(np.repeat(np.repeat(f, 3, 0), 3, 1))[:, :252] for f in panning(4)]
    write_frames(src / "big", frames)
    write_frames(src / "small", panning(4))
    assert run(src, tmp_path / "out", "--max_height", 97) == 0
    index = read_index(tmp_path / "out")
    assert (index.min_size, index.max_size) == ((64, 96), (96, 126))
    # antialiased: stripes one pixel wide become grey and do not alias
    stripes = np.zeros((300, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(frame_sources.shrink(stripes, 75)[5:-5, 5:-5].astype(int)) < 20
    path = write_video(tmp_path / "stripes" / "s.mkv", [stripes], "ffv1")
    small = next(read_clip(find_clips(path.parent)[0])).rgb(75)
    assert small.shape == (74, 98, 3)
    assert np.ptp(small[5:-5, 5:-5].astype(int)) < 20


def test_a_video_is_made_smaller_as_its_frames_are(tmp_path):
    """Downscaling together with the conversion agrees with Pillow on the converted frames, also for a rotated video."""
    rng = np.random.default_rng(0)
    path = write_video(tmp_path / "v" / "v.mp4", [rng.integers(0, 256, (6, 9, 3), np.uint8).repeat(40, 0).repeat(40, 1)])
    clip = find_clips(path.parent)[0]
    for turned in (False, True):
        if turned:
            turn(path)
        frame = next(read_clip(clip))
        for max_height in (48, 101, 200, 500):
            small, expected = frame.rgb(max_height), frame_sources.shrink(frame.rgb(), max_height)
            assert small.shape == expected.shape
            error = small.astype(float) - expected
            assert np.abs(error.mean((0, 1))).max() < 0.1
            assert np.sqrt((error**2).mean()) < 1.5


def test_an_upright_phone_video_is_turned(tmp_path):
    path = write_video(tmp_path / "src" / "phone.mp4", panning(4))
    plain = next(read_clip(find_clips(tmp_path / "src")[0])).rgb()
    turn(path)
    np.testing.assert_array_equal(next(read_clip(find_clips(tmp_path / "src")[0])).rgb(), np.rot90(plain, -1))
    assert run(tmp_path / "src", tmp_path / "out") == 0
    assert read_index(tmp_path / "out").min_size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_jumping_into_a_long_video_gives_the_same_frames(tmp_path, monkeypatch, codec):
    write_video(tmp_path / "src" / "long.mkv", panning(90), codec, gop=12)
    clip = find_clips(tmp_path / "src")[0]
    found = find_sequences(clip, frames=3, stride=1, step=1)
    whole = [frame.rgb() for frame in read_clip(clip)]
    assert len(found.entries) > 2
    monkeypatch.setattr(frame_sources, "FAR", 10)
    jumps = 0
    for first in (0, 9, 10, 35, 36, 37, 70, 89):
        entry = frame_sources.nearest_entry(found.entries, found.checksums, first)
        jumps += entry is not None
        assert entry is None or first - 40 <= entry.number <= first
        np.testing.assert_array_equal([frame.rgb() for frame in read_clip(clip, first, entry)], whole[first:])
        # a jump that does not lead to the very frame seen before is not trusted
        for wrong in ({"checksum": 1}, {"pts": 10**9}, {"pts": -5}):
            astray = dataclasses.replace(entry or frame_sources.Entry(0, 0, 0), **wrong)
            np.testing.assert_array_equal(next(read_clip(clip, first, astray)).rgb(), whole[first])
    assert jumps >= 5
    assert run(tmp_path / "src", tmp_path / "jumped", "--samples_per_shard", 9) == 0
    monkeypatch.setattr(frame_sources, "FAR", 1000)
    assert run(tmp_path / "src", tmp_path / "plain", "--samples_per_shard", 9) == 0
    assert digests(tmp_path / "jumped") == digests(tmp_path / "plain")


def test_broken_videos_are_named_and_the_good_ones_kept(mixed, tmp_path, capsys):
    (mixed / "junk.mp4").write_bytes(b"this is no video" * 100)
    (mixed / "empty.mkv").write_bytes(b"")
    assert run(mixed, tmp_path / "out") == 0
    printed = capsys.readouterr()
    index = read_index(tmp_path / "out")
    assert index.samples == 25
    assert set(index.skipped) == {"junk.mp4", "empty.mkv"}
    assert "2 source files with faults" in printed.out
    assert all(name in printed.err for name in index.skipped)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("v.mp4", "libx264", {"movflags": "faststart"}), ("v.mkv", "libx264", {}), ("v.avi", "mpeg4", {})],
)
def test_a_video_that_breaks_off_keeps_the_frames_before(tmp_path, name, codec, options):
    rng = np.random.default_rng(0)
    frames = [np.ascontiguousarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8) // 2 + 10 * (n % 9)) for n in range(30)]
    path = write_video(tmp_path / "src" / name, frames, codec, **options)
    clip = find_clips(tmp_path / "src")[0]
    whole = [frame.rgb() for frame in read_clip(clip)]
    assert len(whole) == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    assert run(tmp_path / "src", tmp_path / "out") == 0
    index = read_index(tmp_path / "out")
    assert 5 < index.samples < 28
    assert "are kept" in index.skipped[name]
    for key, (_, kept) in samples_of(tmp_path / "out").items():
        start = int(key[-6:])
        np.testing.assert_array_equal(kept, whole[start : start + 3])


def test_a_broken_frame_file_keeps_the_frames_before(tmp_path, capsys):
    folder = write_frames(tmp_path / "src" / "clip", panning(9))
    (folder / "5.png").write_bytes(b"junk")
    assert run(tmp_path / "src", tmp_path / "out") == 0
    assert list(samples_of(tmp_path / "out")) == ["clip-000000", "clip-000001", "clip-000002"]
    assert "5.png cannot be decoded" in read_index(tmp_path / "out").skipped["clip"]
    assert "the 5 frames before that are kept" in capsys.readouterr().err


def test_a_folder_of_frames_given_itself_is_one_clip_and_links_are_followed_once(tmp_path):
    write_frames(tmp_path / "clip", panning(4))
    (tmp_path / "clip" / "round").symlink_to(tmp_path / "clip")
    assert [clip.name for clip in find_clips(tmp_path / "clip")] == ["clip"]


def test_natural_order():
    assert sorted(["f10.png", "f9.png", "F1.png", "f01.png", "g"], key=natural) == [
        "F1.png",
        "f01.png",
        "f9.png",
        "f10.png",
        "g",
    ]


def test_sources_without_use_are_one_clear_line(tmp_path, fails):
    out = tmp_path / "out"

    def message(src: Path, *flags):
        return fails(video.main, "--src", src, "--out", out, *flags)

    assert "does not exist" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no videos" in message(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in message(tmp_path / "file")
    write_frames(tmp_path / "still" / "clip", 5 * panning(1))
    write_frames(tmp_path / "still" / "short", panning(2))
    said = message(tmp_path / "still")
    assert "no usable sequence" in said
    assert "2 clips, 1 too short" in said
    assert "3 for duplicate frames" in said
    write_frames(tmp_path / "one" / "clip", panning(5))
    assert "val_fraction needs two clips" in message(tmp_path / "one", "--val_fraction", 0.5)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codec", "gif"], "png, qoi, jpeg"),
        (["--quality", "101"], "quality"),
        (["--split", "dev"], "train, val, test"),
        (["--frames", "1"], "frames 1"),
        (["--stride", "0"], "stride 0"),
        (["--step", "0"], "step 0"),
        (["--samples_per_shard", "0"], "samples_per_shard 0"),
        (["--max_height", "4"], "max_height"),
        (["--val_fraction", "1"], "val_fraction"),
        (["--val_fraction", "0.5", "--split", "test"], "leave out split"),
        (["--workers", "-2"], "workers"),
    ],
)
def test_bad_options_are_one_clear_line(mixed, tmp_path, fails, flags, message):
    assert message in fails(video.main, "--src", mixed, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_used_are_left_untouched(mixed, tmp_path, fails):
    before = digests(mixed)
    assert "lies inside the source" in fails(video.main, "--src", mixed, "--out", mixed)
    assert "lies inside the source" in fails(video.main, "--src", mixed, "--out", mixed / "shards")
    assert "holds other things" in fails(video.main, "--src", mixed / "deep", "--out", mixed / "walk in park")
    assert "holds other things" in fails(video.main, "--src", mixed / "deep", "--out", mixed, "--val_fraction", 0.5)
    assert digests(mixed) == before
    assert run(mixed, tmp_path / "out") == 0
    before = digests(tmp_path / "out")
    assert "another job" in fails(video.main, "--src", mixed, "--out", tmp_path / "out", "--codec", "qoi")
    assert digests(tmp_path / "out") == before


def test_flags_are_accepted_with_both_dashes(mixed, tmp_path):
    assert run(mixed, tmp_path / "one", "--max-height", 32, "--samples-per-shard", 5) == 0
    assert run(mixed, tmp_path / "two", "--max_height", 32, "--samples_per_shard", 5) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
