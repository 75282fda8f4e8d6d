"""Folders of frames as input and output of a conversion."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from shards.codecs import read_image
from shards.color_conversion import Colours, to_rgb
from vfi.video.deep_images import read_deep, write_deep


class FolderInput:
    """Image files as frames, in the given order, all of one size."""

    def __init__(self, paths: Sequence[Path], fps: Fraction, places: Sequence[int] | None = None) -> None:
        """`places`: the number of each frame in the sequence, ascending; by default they follow one another."""
        self.paths, self.rate, self.base = paths, fps, 1 / fps
        self.places = range(len(paths)) if places is None else places
        self.expected = len(paths)
        self.deep = all(read_deep(path) is not None for path in (paths[0], paths[-1]))
        self.colours = Colours(bits=16 if self.deep else 8)
        self.notes = ["transparency is left out (over black)"] if is_transparent(paths[0]) else []

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Yield each frame, read when it is needed."""
        for number, path in zip(self.places, self.paths, strict=True):
            deep = read_deep(path) if self.deep else None
            if deep is None:
                frame = av.VideoFrame.from_ndarray(read_image(path), format="rgb24")
            else:
                frame = av.VideoFrame.from_ndarray(deep, format="rgb48le")
            frame.pts, frame.time_base = number, self.base
            yield frame


def numbered_gaps(paths: Sequence[Path]) -> tuple[list[int], list[int]]:
    """Return the numbers in which the names of images differ, from the first on, and those that are missing between them.

    Both are empty for names that differ in anything but one number.
    """
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", path.name) for path in paths]
    found = [match for match in parts if match]
    if len(found) < len(paths) or len({(match[1], match[3]) for match in found}) > 1:
        return [], []
    numbers = [int(match[2]) - int(found[0][2]) for match in found]
    missing = sorted(set(range(numbers[-1])) - set(numbers))
    return numbers, [number + int(found[0][2]) for number in missing]


def is_animated(path: Path) -> bool:
    """Return whether an image file holds several frames."""
    try:
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except OSError:  # no image, or of a kind that Pillow does not know: said where it is read
        return False


def is_transparent(path: Path) -> bool:
    """Return whether an image file can hold transparency and has a pixel that is not opaque."""
    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                return False
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except OSError:  # such as QOI, which Pillow reads from version 11.1 on; or damaged, which is said elsewhere
        return False
    return bool((alpha < 255).any())


class FolderOutput:
    """A folder of numbered PNG files, 00000000.png …, of which `done` are already there."""

    def __init__(self, folder: Path, colours: Colours, done: int = 0) -> None:
        self.pix_fmt = "rgb24" if colours.depth == 8 else "rgb48le"
        self.folder, self.colours, self.done, self.count = folder, colours, done, 0

    def write(self, frame: av.VideoFrame, pts: int, duration: int = 0, last: bool = False) -> None:
        """Write the next file, unless it is already there."""
        if self.count < self.done:
            self.count += 1
            return
        image, path = to_rgb(frame, self.colours, self.colours.depth), self.folder / f"{self.count:08d}.png"
        if image.dtype == np.uint16:
            write_deep(path, image)
        else:
            Image.fromarray(image).save(path, compress_level=1)
        self.count += 1

    def copy(self, packet: av.Packet) -> None:
        """Ignore the packet: a folder holds frames alone."""
