"""Images of 16 bits a channel: read and written exactly, alone, in folders and to video."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_videos import call, frames_of, new_run
from PIL import Image

from shards.codecs import read_image
from shards.schema import ShardError
from vfi.video.deep_images import read_deep, write_deep

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "fresh")


def picture(seed: int) -> np.ndarray:
    """Smooth, and with values that 8 bits can't hold."""
    y, x = np.mgrid[:48, :64]
    planes = [30_000 + 20_000 * np.sin((x + 2 * y) / 40 + channel) + 700 * seed for channel in range(3)]
    return np.stack(planes, axis=2).astype(np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_what_is_written_is_read(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 65_536, (40, 64, 3), dtype=np.uint16)
    path = tmp_path / f"image{suffix}"
    write_deep(path, image)
    assert np.array_equal(read_deep(path), image)
    assert np.abs(read_image(path).astype(int) - image // 257).max() <= 1  # the same picture to who reads 8 bits


def test_grey_and_other_kinds(tmp_path):
    grey = picture(0)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_deep(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "eight.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "eight.jpg")
    assert read_deep(tmp_path / "eight.png") is None
    assert read_deep(tmp_path / "eight.jpg") is None
    (tmp_path / "none.png").write_bytes(b"no image")
    assert read_deep(tmp_path / "none.png") is None  # who reads it as 8 bits says what it is
    write_deep(tmp_path / "cut.png", picture(0))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-10])
    with pytest.raises(ShardError, match=r"cut\.png cannot be "):
        read_deep(tmp_path / "cut.png")


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_the_image_between_two_has_16_bits(run, tmp_path, suffix):
    first, last = picture(0), picture(3)
    for name, image in (("a", first), ("b", last)):
        write_deep(tmp_path / f"{name}.png", image)
    call(tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / f"out{suffix}", "--model", run)
    found = read_deep(tmp_path / f"out{suffix}")
    assert found is not None
    middle = (first.astype(np.int64) + last) / 2  # which the fresh network makes, in fp32
    assert np.abs(found - middle).max() <= 2
    assert (found % 257 != 0).mean() > 0.9
    call(tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "out.jpg", "--model", run)
    assert np.abs(read_image(tmp_path / "out.jpg").astype(int) - middle / 257).mean() < 2


def test_a_folder_stays_a_folder_of_16_bits_and_becomes_a_video_of_10(run, tmp_path):
    (tmp_path / "frames").mkdir()
    images = [picture(number) for number in range(3)]
    for number, image in enumerate(images):
        write_deep(tmp_path / "frames" / f"{number}.png", image)
    call(tmp_path / "frames", "-o", tmp_path / "out", "--model", run)
    found = [read_deep(path) for path in sorted((tmp_path / "out").iterdir())]
    assert len(found) == 5
    for number, image in enumerate(images):
        assert np.array_equal(found[2 * number], image)
    assert np.abs(found[1] - (images[0].astype(np.int64) + images[1]) / 2).max() <= 2
    call(tmp_path / "frames", "-o", tmp_path / "out.mp4", "--model", run)
    assert {frame.format.name for frame in frames_of(tmp_path / "out.mp4")} == {"yuv420p10le"}


def test_through_a_pipe_a_folder_of_16_bits_is_the_same_video_of_10_as_in_a_file(run, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(2):
        write_deep(tmp_path / "frames" / f"{number}.png", picture(number))
    flags = ["--model", run, "--device", "cpu"]
    command = [sys.executable, "-m", "vfi.interpolate", tmp_path / "frames", "-o", "-", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    (tmp_path / "piped.y4m").write_bytes(done.stdout)
    call(tmp_path / "frames", "-o", tmp_path / "out.mkv", *flags, "--codec", "ffv1", "--pix_fmt", "yuv420p10le")
    piped, filed = frames_of(tmp_path / "piped.y4m"), frames_of(tmp_path / "out.mkv")
    assert len(piped) == len(filed) == 3
    for one, other in zip(piped, filed, strict=True):
        assert one.format.name == other.format.name == "yuv420p10le"
        assert np.array_equal(one.to_ndarray(), other.to_ndarray())
