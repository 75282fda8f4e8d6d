"""Whole frames from the fields of interlaced and telecined video, without the borders that a file hides, by FFmpeg's filters.

filters = FieldFilters(stream, DEINTERLACE, stream.time_base, rate)
for frame in frames:
    yield from filters.push(frame)           # frames come out later than they went in
yield from filters.finish()
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple, cast

import av
import av.logging
from av.container import InputContainer
from av.filter import Graph
from av.video.stream import VideoStream


class FieldMethod(NamedTuple):
    """A chain of filters, and what it does to the frame rate."""

    filters: tuple[tuple[str, str], ...]
    rate: Fraction = Fraction(1)


class Borders(NamedTuple):
    """Columns and rows of a stored frame that are not to be shown."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


WHOLE_FRAMES = FieldMethod(())
DEINTERLACE = FieldMethod((("bwdif", "mode=send_frame:parity=auto:deint=all"),))
DETELECINE = FieldMethod((("fieldmatch", ""), ("decimate", "")), Fraction(4, 5))


def hidden_borders(container: InputContainer, stream: int) -> Borders:
    """Return what Matroska's PixelCrop or MP4's clean aperture hides of a stream's frames.

    PyAV 18.1 doesn't apply it and has no attribute for it: it stands only in the description that FFmpeg prints of a file.
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # a description is a log message
    try:
        text: str = cast(Any, container).dumps_format()
    finally:
        av.logging.set_level(level)
    found = re.search(
        rf"\n  Stream #0:{stream}\b(?:(?!\n  Stream #).)*\n +Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)\n", text, re.DOTALL
    )
    return Borders(*map(int, found.groups())) if found else Borders()


class FieldFilters:
    """A chain of filters on the frames of a stream, whose times stay in units of `base`; first the `borders` are cut off."""

    def __init__(self, stream: VideoStream, method: FieldMethod, base: Fraction, rate: Fraction, borders: Borders) -> None:
        self.base, self.graph = base, Graph()
        chain = [self.graph.add_buffer(template=stream, time_base=base)]
        if any(borders):
            left, right, top, bottom = borders
            chain.append(self.graph.add("crop", f"iw-{left + right}:ih-{top + bottom}:{left}:{top}"))
        if method.rate != 1:  # filters that count frames want a constant rate
            chain.append(self.graph.add("fps", str(rate)))
        chain += [self.graph.add(name, arguments) for name, arguments in method.filters]
        chain.append(self.graph.add("buffersink"))
        self.graph.link_nodes(*chain).configure()
        self.first_in: int | None = None
        self.late: int | None = None  # by how much the first frame comes out late, in units of `base`

    def push(self, frame: av.VideoFrame) -> Iterator[av.VideoFrame]:
        """Give a frame to the filters and yield those that are finished."""
        frame.time_base = self.base
        self.first_in = frame.pts if self.first_in is None else self.first_in
        self.graph.push(frame)
        yield from self._finished()

    def finish(self) -> Iterator[av.VideoFrame]:
        """Yield the frames that are left."""
        self.graph.push(None)
        yield from self._finished()

    def _finished(self) -> Iterator[av.VideoFrame]:
        while True:
            try:
                frame = self.graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            assert isinstance(frame, av.VideoFrame)
            if frame.pts is not None and frame.time_base is not None:
                time = round(frame.pts * frame.time_base / self.base)
                self.late = time - (self.first_in or 0) if self.late is None else self.late
                frame.pts = time - self.late
                frame.duration = round((frame.duration or 0) * frame.time_base / self.base)
            frame.time_base = self.base
            yield frame
