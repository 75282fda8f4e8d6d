"""Whole frames from the fields of interlaced and telecined video, by FFmpeg's filters.

filters = FieldFilters(stream, DEINTERLACE, stream.time_base, rate)
for frame in frames:
    yield from filters.push(frame)           # frames come out later than they went in
yield from filters.finish()
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
from av.filter import Graph
from av.video.stream import VideoStream


class FieldMethod(NamedTuple):
    """A chain of filters, and what it does to the frame rate."""

    filters: tuple[tuple[str, str], ...]
    rate: Fraction = Fraction(1)


DEINTERLACE = FieldMethod((("bwdif", "mode=send_frame:parity=auto:deint=all"),))
DETELECINE = FieldMethod((("fieldmatch", ""), ("decimate", "")), Fraction(4, 5))


class FieldFilters:
    """A chain of filters on the frames of a stream, whose times stay in units of `base`."""

    def __init__(self, stream: VideoStream, method: FieldMethod, base: Fraction, rate: Fraction) -> None:
        self.base, self.graph = base, Graph()
        chain = [self.graph.add_buffer(template=stream, time_base=base)]
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
