"""Builders of small data sets: moving textured frames, videos, folders of frames, sets in their published layouts."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96


def texture(seed: int, brightness: int = 128) -> np.ndarray:
    """Return a smooth random picture, wider than a frame: uint8 [H, 4 W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-60, 60, (HEIGHT // 8, WIDTH // 2, 3)) + brightness
    picture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    return np.asarray(picture.resize((4 * WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def panning(count: int, seed: int = 0, speed: int = 2, brightness: int = 128) -> list[np.ndarray]:
    """Return frames of a camera that pans over a texture: uint8 [HEIGHT, WIDTH, 3] each."""
    picture = texture(seed, brightness)
    return [np.ascontiguousarray(picture[:, speed * n : speed * n + WIDTH]) for n in range(count)]


def write_frames(folder: Path, frames: Iterable[np.ndarray], pattern: str = "{}.png") -> Path:
    """Write a folder of numbered images, whose natural order differs from the alphabetical one beyond ten frames."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / pattern.format(number))
    return folder


def write_video(
    path: Path, frames: Sequence[np.ndarray], codec: str = "mpeg4", gop: int = 0, matrix: int = 2, **options: str
) -> Path:
    """Write a video file of RGB frames at 25 fps; `gop` is the distance of key frames (0: the codec's default), `matrix` the
    colour matrix that the file states (2: none).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.colorspace = matrix
        if gop:
            stream.gop_size = gop
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_noise(path: Path, seed: int, size: tuple[int, int] = (16, 24)) -> Path:
    """Write a PNG of random pixels, which differs for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=1)
    return path


def write_set(root: Path, files: Iterable[str], first_seed: int = 0) -> Path:
    """Write random PNG files, all different, at these paths below `root`."""
    for seed, file in enumerate(files, first_seed):
        write_noise(root / file, seed)
    return root


def members(folder: Path) -> dict[str, list[bytes]]:
    """Return the frames of each sample by key, in the order of the members im1, im2 …, read with tarfile alone."""
    found: dict[str, dict[int, bytes]] = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, name, extension = member.name.split(".") if ".im" in member.name else ("", "", "")
                content = tar.extractfile(member)
                if extension and content is not None:
                    found.setdefault(key, {})[int(name.removeprefix("im"))] = content.read()
    assert all(list(frames) == list(range(1, len(frames) + 1)) for frames in found.values())
    return {key: list(frames.values()) for key, frames in found.items()}
