"""What lies between two frames? Two images -> the image between; a folder of frames -> a video at twice the frame rate.

    vfi interpolate A.png B.png -o mid.png
    vfi interpolate A.png B.png -o early.png --model runs/tiny_phase1 --timestep 0.25
    vfi interpolate FRAMES -o clip.mp4 --model runs/tiny_phase1 --fps 15

Images may have any size from 32×32 up. Frames of a folder are taken in the order of their names, numbers by their value. A
video needs even sides: an odd one is made even by repeating the last row or column.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, cast

import av
import numpy as np
import torch
import tyro
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from shards.images import read_image
from shards.schema import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardError
from vfi.checkpoint import CheckpointError, newest_run
from vfi.errors import JobError, clear_errors
from vfi.inference import DeviceName, check_scale, describe_precision, load, pick_device, pick_precision
from vfi.model.interpolator import MIN_SIZE

IMAGE_OUTPUTS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
DEFAULT_FPS = 15.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Two images, or one folder of frames."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Image to write, or .mp4 for a folder of frames."""
    model: Path | None = None
    """Run folder, checkpoint folder or weights file; by default the run in ./runs that was trained last."""
    timestep: float | None = None
    """Where the new image lies: above 0 (the first) and below 1 (the second), by default 0.5. For two images."""
    fps: float | None = None
    """Frames per second of the folder of frames, by default 15; the video has twice as many. For a folder."""
    scale: float | None = None
    """Flow is estimated at this fraction of the frames' size: 1, 0.5 (for 2K) or 0.25 (4K); by default as trained."""
    device: DeviceName = "auto"
    """auto takes a GPU if there is one."""


class Interpolator:
    """A model ready to be called with frames as RGB uint8 [H, W, 3]."""

    def __init__(self, options: Options) -> None:
        self.device = pick_device(options.device)
        self.precision = pick_precision("auto", self.device)
        self.loaded = load(options.model or newest_run(), self.device)
        self.scale = options.scale
        check_scale(self.scale, [self.loaded])

    def __call__(self, img0: np.ndarray, img1: np.ndarray, timestep: float) -> np.ndarray:
        """The frame at `timestep`, rounded to 8 bits."""
        first, second = (torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float() / 255 for image in (img0, img1))
        time = torch.tensor([timestep], device=self.device)
        imgt = self.loaded.predict(first, second, time, self.precision, self.scale)
        return (imgt[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()


@clear_errors(ShardError, CheckpointError)
def main(argv: Sequence[str] | None = None) -> None:
    """The job: check everything, load the model, write one image or one video, say what was written."""
    print(interpolate(tyro.cli(Options, prog="vfi interpolate", description=__doc__, args=argv)))


def interpolate(options: Options) -> str:
    """Do what the options ask for and describe the result in one line.

    Raises JobError, ShardError (an image that cannot be read) or CheckpointError; then nothing has been written.
    """
    for path in options.inputs:
        if not path.exists():
            raise JobError(f"{path} does not exist")
        if path.is_file() and path.suffix.lower() in (VIDEO_EXTENSIONS | {".gif"}):
            raise JobError(
                f"{path} is a video file, and those are not read yet: extract its frames first, for example by "
                f"`ffmpeg -i {path} FRAMES/%06d.png`, and give the folder"
            )
    folders = [path.is_dir() for path in options.inputs]
    if folders == [True]:
        return _folder_to_video(options, options.inputs[0])
    if folders == [False, False]:
        return _images_to_image(options, *options.inputs)
    given = ", ".join(map(str, options.inputs)) or "nothing"
    raise JobError(f"give two images, or one folder of frames; given: {given}")


def _images_to_image(options: Options, path0: Path, path1: Path) -> str:
    timestep = 0.5 if options.timestep is None else options.timestep
    if not 0 < timestep < 1:
        raise JobError(f"--timestep {timestep} must lie between 0 (the first image) and 1 (the second)")
    if options.fps is not None:
        raise JobError("--fps is for a folder of frames; two images make one image")
    _check_output(options.out, IMAGE_OUTPUTS, (path0, path1))
    img0, img1 = read_image(path0), read_image(path1)
    _check_sizes({path0: img0.shape[:2], path1: img1.shape[:2]})
    model = Interpolator(options)
    temporary = _temporary(options.out)
    try:
        Image.fromarray(model(img0, img1, timestep)).save(temporary, quality=95)  # of JPEG and WebP
        temporary.replace(options.out)
    finally:
        temporary.unlink(missing_ok=True)
    height, width = img0.shape[:2]
    return f"{options.out}: {width}x{height}, timestep {timestep:g}, {_made_by(model)}"


def _folder_to_video(options: Options, folder: Path) -> str:
    fps = DEFAULT_FPS if options.fps is None else options.fps
    if not 0.1 <= fps <= 1000:
        raise JobError(f"--fps {fps} must lie between 0.1 and 1000")
    if options.timestep is not None:
        raise JobError("--timestep is for two images; a folder of frames gets one frame in the middle of every two")
    _check_output(options.out, (".mp4",), ())
    paths = frames_of(folder)
    _check_sizes({path: _size_of(path) for path in paths})
    model = Interpolator(options)
    temporary = _temporary(options.out)
    try:
        write_video(temporary, _doubled(model, paths), 2 * fps)
        temporary.replace(options.out)
    finally:
        temporary.unlink(missing_ok=True)
    count = 2 * len(paths) - 1
    return f"{options.out}: {count} frames at {2 * fps:g} per second from {len(paths)} at {fps:g}, {_made_by(model)}"


def frames_of(folder: Path) -> list[Path]:
    """The image files of a folder in the order of their names, frame2 before frame10; JobError for fewer than two."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")]
    if len(paths) < 2:
        raise JobError(f"{folder} holds {len(paths)} images; two or more are needed ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    return sorted(paths, key=lambda path: [(int(n or 0), text) for text, n in re.findall(r"(\D*)(\d*)", path.name)])


def _size_of(path: Path) -> tuple[int, int]:
    """(height, width), read from the head of the file alone."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise JobError(f"{path} cannot be read as an image: {error}") from error


def _doubled(model: Interpolator, paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """All frames with one more between every two."""
    before = read_image(paths[0])
    yield before
    for path in tqdm(paths[1:], unit="frame", desc="interpolate", disable=None):
        after = read_image(path)
        yield model(before, after, 0.5)
        yield after
        before = after


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write RGB uint8 [H, W, 3] frames as mp4 (H.264 where the video library has it, else MPEG-4), BT.709, yuv420p."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001)))
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "16"}
        else:
            stream.bit_rate = 8_000_000
        context = stream.codec_context
        # say which matrix the colours were made with: players guess it from the size otherwise, and guess differently
        context.colorspace = context.color_primaries = context.color_trc = 1  # 1: BT.709
        context.color_range = 1  # 1: 16 … 235
        for number, image in enumerate(frames):
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            if number == 0:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")))
        container.mux(stream.encode())


def _check_output(out: Path, extensions: Sequence[str], inputs: Sequence[Path]) -> None:
    if out.suffix.lower() not in extensions:
        what = "two images make an image" if len(extensions) > 1 else "a folder of frames makes a video"
        raise JobError(f"--out {out}: {what}, so the name must end in {', '.join(extensions)}")
    if out.is_dir():
        raise JobError(f"--out {out} is a folder: give a file name")
    for path in inputs:
        if out.exists() and out.samefile(path):
            raise JobError(f"--out {out} is the input {path}: give another name, inputs are not overwritten")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise JobError(f"--out {out}: {parent} is not a folder")
    out.parent.mkdir(parents=True, exist_ok=True)


def _check_sizes(sizes: dict[Path, tuple[int, ...]]) -> None:
    """All frames of one size, and large enough."""
    first, (height, width) = next(iter(sizes.items()))
    for path, size in sizes.items():
        if size != (height, width):
            raise JobError(
                f"frames must be of one size: {first} is {width}x{height} and {path} is {size[1]}x{size[0]} (width x height)"
            )
    if min(height, width) < MIN_SIZE:
        raise JobError(f"{first} is {width}x{height} (width x height): each side must be at least {MIN_SIZE}")


def _temporary(out: Path) -> Path:
    """Where a file is written before it gets its name; the extension stays, since writers go by it."""
    return out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")


def _made_by(model: Interpolator) -> str:
    return f"by {model.loaded.name} at step {model.loaded.step} ({model.device.type}, {describe_precision(model.precision)})"


if __name__ == "__main__":
    main()
