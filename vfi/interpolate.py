"""Interpolate frames: a video -> one with more frames or slow motion; two images -> the image between them.

    vfi interpolate in.mp4 -o out.mp4                                      twice as many frames
    vfi interpolate in.mkv -o out.mkv --multiplier 4                       … 3, 4, 8 times
    vfi interpolate in.mp4 -o out.mp4 --fps 60                             a fixed frame rate, evenly spaced
    vfi interpolate in.mp4 -o slow.mp4 --slowmo 4                          four times slower, as smooth as before
    vfi interpolate a.mp4 b.mp4 -o more/                                   several videos, into a folder
    vfi interpolate FRAMES -o clip.mp4 --input_fps 15                      a folder of images as input …
    vfi interpolate in.mp4 -o FRAMES/                                      … or as output
    vfi interpolate A.png B.png -o mid.png --timestep 0.25
    ffmpeg -i in.mkv -f yuv4mpegpipe - | vfi interpolate - -o - | mpv -    through pipes, as YUV4MPEG2

Sound, subtitles, chapters, rotation and colours of a video are kept (vfi/video/container.py); scene cuts are not blended
(vfi/video/pipeline.py). A result gets its name when it is complete; after Ctrl-C the frames that are done are next to it as
NAME_partial, which is playable, and from which --resume resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from shards.cli import parse_flags
from shards.codecs import read_image
from shards.schema import IMAGE_EXTENSIONS, ShardError
from vfi.config.renamed_flags import with_new_names
from vfi.errors import CheckpointError, JobError, clear_errors
from vfi.io.writer_lock import writer_lock
from vfi.video.convert import ConversionSettings, build_engine, check_sizes, convert, made_by, new_timeline, temporary_path
from vfi.video.deep_images import DEEP_OUTPUTS, read_deep, write_deep
from vfi.video.folder import is_animated, is_transparent
from vfi.video.pipe import PIPE

IMAGE_OUTPUTS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_OUTPUTS = (".mp4", ".mkv", ".mov", ".webm", ".m4v")


@dataclasses.dataclass(frozen=True)
class Options:
    """Input and output of `vfi interpolate`; each field is a command-line flag."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Videos, folders of frames, or two images."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Video or folder to write; for two images an image, for several videos a folder."""
    conversion: tyro.conf.OmitArgPrefixes[ConversionSettings] = dataclasses.field(default_factory=ConversionSettings)


@clear_errors(ShardError, CheckpointError)
def main(argv: Sequence[str] | None = None) -> None:
    """Check everything, load the model, write the results, and print a line about each."""
    argv = with_new_names(sys.argv[1:] if argv is None else argv, {"keep_still": "static_regions"})
    options = parse_flags(Options, "vfi interpolate", __doc__, argv)
    for line in interpolate(options):
        print(line, file=sys.stderr if options.out == PIPE else sys.stdout)


def interpolate(options: Options) -> Iterator[str]:
    """Convert all inputs as the options say, and yield a line about each result once it is written.

    Raises JobError, ShardError (an image that cannot be read) or CheckpointError; then nothing has been written.
    """
    for path in options.inputs:
        if path != PIPE and not path.exists():
            raise JobError(f"{path} does not exist")
    images = [path for path in options.inputs if path.is_file() and path.suffix.lower() in IMAGE_EXTENSIONS]
    if animated := [path for path in images if is_animated(path)]:
        raise JobError(f"{animated[0]} is an animation, which is read as GIF or video only: convert it, such as by ffmpeg -i")
    if images and len(options.inputs) == len(images) == 2:
        yield _images_to_image(options, *options.inputs)
        return
    if images or not options.inputs:
        given = ", ".join(map(str, options.inputs)) or "nothing"
        raise JobError(f"give videos, folders of frames, or two images; given: {given}")
    if options.conversion.timestep is not None:
        raise JobError("--timestep is for two images; for a video take --multiplier, --fps or --slowmo")
    new_timeline(options.conversion)
    places = _places(options)
    with contextlib.ExitStack() as locks:
        for out in places.values():
            if out != PIPE:
                locks.enter_context(writer_lock(out, "give another --out"))
        model = build_engine(options.conversion)
        for path, out in places.items():
            yield convert(options.conversion, path, out, model)


def _places(options: Options) -> dict[Path, Path]:
    """Return the output path of each input. Raises JobError if something would be overwritten."""
    out = options.out
    several = len(options.inputs) > 1
    if PIPE in (out, *options.inputs) and several:
        raise JobError(f"standard input and output (-) are for one video, and {len(options.inputs)} inputs were given")
    if out == PIPE:
        return {options.inputs[0]: out}
    if several and out.suffix:
        raise JobError(f"--out {out}: {len(options.inputs)} inputs need a folder, such as --out {out.with_suffix('')}")
    if not several and out.suffix and out.suffix.lower() not in VIDEO_OUTPUTS:
        raise JobError(
            f"--out {out}: a video ends in {', '.join(VIDEO_OUTPUTS)}; a name without an ending is a folder of frames"
        )
    names = [path.with_suffix(path.suffix if path.suffix.lower() in VIDEO_OUTPUTS else ".mp4").name for path in options.inputs]
    places = dict(zip(options.inputs, (out / name for name in names), strict=True)) if several else {options.inputs[0]: out}
    if len(set(places.values())) < len(options.inputs):
        raise JobError(f"two inputs would become the same file in {out}: {', '.join(names)}")
    for path, place in places.items():
        _check_place(place, path)
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    return places


def _check_place(place: Path, source: Path) -> None:
    if place.exists() and place.samefile(source):
        raise JobError(f"--out {place} is the input {source}: give another name, inputs are not overwritten")
    if place.suffix and place.is_dir():
        raise JobError(f"--out {place} is a folder: give a file name")
    if not place.suffix and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise JobError(f"--out {place} already exists and is not an empty folder: give another name")
    for parent in place.parents:
        if parent.exists() and not parent.is_dir():
            raise JobError(f"--out {place}: {parent} is not a folder")


def _images_to_image(options: Options, path0: Path, path1: Path) -> str:
    timestep = 0.5 if options.conversion.timestep is None else options.conversion.timestep
    if not 0 < timestep < 1:
        raise JobError(f"--timestep {timestep} must lie between 0 (the first image) and 1 (the second)")
    if options.conversion.fps is not None or options.conversion.multiplier is not None or options.conversion.slowmo is not None:
        raise JobError("--multiplier, --fps and --slowmo are for videos; two images make one image")
    _check_output(options.out, IMAGE_OUTPUTS, (path0, path1))
    img0, img1 = _read_pair(path0, path1, options.out.suffix.lower() in DEEP_OUTPUTS)
    check_sizes({path0: img0.shape[:2], path1: img1.shape[:2]})
    with writer_lock(options.out, "give another --out"):
        model = build_engine(options.conversion)
        temporary = temporary_path(options.out)
        try:
            image = model(img0, img1, [timestep])[0]
            if image.dtype == np.uint16:
                write_deep(temporary, image)
            else:
                Image.fromarray(image).save(temporary, quality=95)  # for JPEG and WebP
            temporary.replace(options.out)
        finally:
            temporary.unlink(missing_ok=True)
    height, width = img0.shape[:2]
    lost = ", transparency left out (over black)" if any(map(is_transparent, (path0, path1))) else ""
    return f"{options.out}: {width}x{height}, timestep {timestep:g}{lost}, {made_by(model)}"


def _read_pair(path0: Path, path1: Path, keeps_16_bits: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read two images, as uint16 where both have 16 bits a channel and the output can hold them."""
    deep = (read_deep(path0), read_deep(path1)) if keeps_16_bits else (None, None)
    if deep[0] is not None and deep[1] is not None:
        return deep[0], deep[1]
    return read_image(path0), read_image(path1)


def _check_output(out: Path, extensions: Sequence[str], inputs: Sequence[Path]) -> None:
    if out.suffix.lower() not in extensions:
        raise JobError(f"--out {out}: two images make an image, so the name must end in {', '.join(extensions)}")
    if out.is_dir():
        raise JobError(f"--out {out} is a folder: give a file name")
    for path in inputs:
        if out.exists() and out.samefile(path):
            raise JobError(f"--out {out} is the input {path}: give another name, inputs are not overwritten")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise JobError(f"--out {out}: {parent} is not a folder")
    out.parent.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main()
