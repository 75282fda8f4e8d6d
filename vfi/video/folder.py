"""Folders of frames as input and output of a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

from shards.codecs import read_image
from shards.color_conversion import Colours, to_rgb


class FolderInput:
    """Image files as frames, in the given order, all of one size."""

    colours = Colours()

    def __init__(self, paths: Sequence[Path], fps: Fraction) -> None:
        self.paths, self.rate, self.base = paths, fps, 1 / fps
        self.expected = len(paths)

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Yield each frame, read when it is needed."""
        for number, path in enumerate(self.paths):
            frame = av.VideoFrame.from_ndarray(read_image(path), format="rgb24")
            frame.pts, frame.time_base = number, self.base
            yield frame


class FolderOutput:
    """A folder of numbered PNG files, 00000000.png …, of which `done` are already there."""

    pix_fmt = "rgb24"

    def __init__(self, folder: Path, colours: Colours, done: int = 0) -> None:
        self.folder, self.colours, self.done, self.count = folder, colours, done, 0

    def write(self, frame: av.VideoFrame, pts: int) -> None:
        """Write the next file, unless it is already there."""
        if self.count < self.done:
            self.count += 1
            return
        image = to_rgb(frame, self.colours)
        Image.fromarray(image).save(self.folder / f"{self.count:08d}.png", compress_level=1)
        self.count += 1

    def copy(self, packet: av.Packet) -> None:
        """Ignore the packet: a folder holds frames alone."""
