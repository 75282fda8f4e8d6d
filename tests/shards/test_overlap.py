"""Test that exactly the frames that are in both a training and a test set are found by their pixels."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from sources import members, write_noise, write_set

from shards import codecs, ucf101, verify
from shards.overlap import find_leaks
from shards.published_sets import Options

FRAMES = ("frame_00.png", "frame_01_gt.png", "frame_02.png")


def make(root, name, change=lambda src: None, codec="copy", first_seed=0, samples=6):
    """Write shards of random triplets, whose frame files `change` edits first."""
    src = write_set(root / f"{name}_src", (f"{n}/{frame}" for n in range(samples) for frame in FRAMES), first_seed)
    change(src)
    ucf101.make(Options(src=src, out=root / name, codec=codec, samples_per_shard=2))
    return root / name


@pytest.fixture
def folders(tmp_path):
    """Return a training and a test set that share the frames 2/im2, 3/im1 and 5/im3, the last one twice in the test set."""

    def put_in(src):
        test = tmp_path / "test_src"
        shutil.copy(test / "1" / "frame_00.png", src / "2" / "frame_01_gt.png")
        Image.open(test / "4" / "frame_01_gt.png").save(src / "3" / "frame_00.png", compress_level=9)  # other bytes
        shutil.copy(test / "4" / "frame_02.png", src / "5" / "frame_02.png")

    def repeat(src):
        shutil.copy(src / "4" / "frame_02.png", src / "0" / "frame_00.png")

    test = make(tmp_path, "test", repeat, first_seed=1000)
    return make(tmp_path, "train", put_in, codec="qoi"), test


def by_hand(train, test, extension):
    """Return (key, number, count of equals) of the frames of `train` in `test`, by comparing the pixels of all pairs."""
    known = [codecs.decode(data, "png") for frames in members(test).values() for data in frames]
    found = set()
    for key, frames in members(train).items():
        for number, data in enumerate(frames, 1):
            equal = sum(np.array_equal(codecs.decode(data, extension), other) for other in known)
            if equal:
                found.add((key, f"im{number}.{extension}", equal))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_all_shared_frames_are_found_and_no_others(folders, workers):
    train, test = folders
    leaks, frames = find_leaks([train], [test], workers)
    assert frames == 18
    found = {(leak.train.key, leak.train.member, leak.copies) for leak in leaks}
    assert found == by_hand(train, test, "qoi") == {("2", "im2.qoi", 1), ("3", "im1.qoi", 1), ("5", "im3.qoi", 2)}
    assert {leak.test.key for leak in leaks} == {"0", "1", "4"}


def test_the_job_names_each_frame_counts_them_and_fails(folders, capsys):
    train, test = folders
    assert verify.main([str(train), "--against", str(test)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{train}: sample 2 im2.qoi is also in {test}: sample 1 im1.png",
        f"{train}: sample 3 im1.qoi is also in {test}: sample 4 im2.png",
        f"{train}: sample 5 im3.qoi is also in {test}: sample 0 im1.png and 1 more",
        f"{train}: 3 of 18 frames, in 3 samples, are also in {test}",
        "Compared are all pixels: the same picture at another size, cropped or compressed again is not found.",
    ]
    assert err == ""


def test_sets_without_a_common_frame(folders, tmp_path, capsys):
    other = make(tmp_path, "other", first_seed=5000)
    assert verify.main([str(other), "--against", *map(str, folders)]) == 0
    assert "0 of 18 frames" in capsys.readouterr().out


def test_several_folders_on_both_sides(folders, tmp_path):
    train, test = folders
    other = make(tmp_path, "other", first_seed=5000)
    leaks, frames = find_leaks([other, train], [other, test])
    assert frames == 36
    assert sum(leak.train.folder == other for leak in leaks) == 18  # a folder against itself: every frame
    assert sum(leak.train.folder == train for leak in leaks) == 3


def test_the_same_bytes_in_another_shape_are_another_frame(tmp_path):
    def black(size):
        def paint(src):
            for path in src.rglob("*.png"):
                Image.new("RGB", size).save(path)

        return paint

    wide, high, same = (
        make(tmp_path, f"s{n}", black(size), samples=1) for n, size in enumerate([(24, 16), (16, 24), (24, 16)])
    )
    assert find_leaks([wide], [high]) == ([], 3)
    assert len(find_leaks([wide], [same])[0]) == 3


def test_one_changed_pixel_is_another_frame(tmp_path):
    def change(src):
        for path in src.rglob("*.png"):
            pixels = np.array(Image.open(path))
            pixels[-1, -1, -1] ^= 1
            Image.fromarray(pixels).save(path)

    assert find_leaks([make(tmp_path, "train")], [make(tmp_path, "test", change)]) == ([], 18)


def test_jpeg_frames_get_a_warning(folders, tmp_path, capsys):
    test = folders[1]
    lossy = make(tmp_path, "lossy", codec="jpeg", first_seed=1000)
    capsys.readouterr()
    assert verify.main([str(lossy), "--against", str(test)]) == 0
    assert f"warning: {lossy} holds JPEG frames" in capsys.readouterr().err


def test_a_shard_that_cannot_be_read_is_named(folders, capsys):
    train, test = folders
    path = train / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    assert verify.main([str(train), "--against", str(test)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_raw_folder_is_no_test_set(folders, tmp_path, fails):
    write_noise(tmp_path / "raw" / "1" / "frame_01_gt.png", 0)
    assert "python -m shards.ucf101" in fails(verify.main, folders[0], "--against", tmp_path / "raw")
