"""Read the frames of a video file in the order and at the times at which they are shown, whatever its container does.

    with VideoReader(path) as video:
        for frame in video.read():               # pts are in units of video.base, and start at 0
            …

The shard commands and the video interpolator read files by it: the same stream, the same frames, without the borders that the
file hides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from shards.color_conversion import assume_left_chroma
from shards.field_filters import WHOLE_FRAMES, FieldFilters, FieldMethod, hidden_borders
from shards.presentation import Clock, FrameTimes, measured_rate
from shards.schema import ShardError

_SHORTEST = 0.95  # of the frames that a file declares: with fewer it was truncated
_SHORTEST_TIME = 0.9  # likewise of the length of a track of Matroska
_FASTEST, _USUAL_RATE = Fraction(300), Fraction(25)  # frames per second; a higher one is the clock's, not the picture's
_ATTEMPTS = 20  # to read on behind damage


class VideoReader:
    """A video file, open for a single pass. Raises ShardError for a file that is not a video.

    `name`: how errors call it, by default its path. `url`: what FFmpeg opens instead of the path. `stream`: number of the
    stream to read, among all of the file; by default the video that the file marks as the default, else the longest one.
    `fields`: how whole frames are made of fields. `threads` of the decoder; 0: as many as it likes.
    """

    def __init__(
        self, path: Path, name: str = "", *, url: str = "", stream: int | None = None, fields: FieldMethod | None = None,
        threads: int = 0,
    ) -> None:  # fmt: skip
        self.path, self.name, self.fields = path, name or str(path), fields
        self.url = url or f"file:{path}"  # a name such as rec:1.mp4 would be a protocol
        self.notes: list[str] = []
        """What is unusual about the file, and was handled."""
        self.frames = 0
        """Number of frames read so far."""
        self.others: Sequence[Any] = ()
        """Streams whose packets are read, too."""
        try:
            self.container: InputContainer = av.open(self.url, metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise ShardError(f"{self.name} cannot be read as a video: {error.strerror or error}") from error
        try:
            self.stream = self._choose(stream)
            self.stream.thread_type = "AUTO"
            self.stream.codec_context.thread_count = threads
            assume_left_chroma(self.stream)
            self.stated_rate = self._rate()
            self.rate = self.stated_rate * (fields.rate if fields else 1)
            self.base = self.stream.time_base or 1 / self.stated_rate
            self.borders = hidden_borders(self.container, self.stream.index)
        except ShardError:
            self.container.close()
            raise
        if any(self.borders):
            self.notes.append(
                "borders that the file hides are cut off ({} left, {} right, {} top, {} bottom)".format(*self.borders)
            )
        self._clock, self._jumped = Clock(self.container), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.container.close()

    def seek(self, pts: int) -> None:
        """Jump to the key frame at `pts` or the one before; times of frames stay those of a file without jumps of its clock."""
        self._jumped = True
        self.container.seek(self._clock.stored(pts, self.base), stream=self.stream)

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Yield frames with increasing `pts`, the file's first time being 0, and packets of the `others`, in its order.

        Raises ShardError where the file is damaged, and at the end where frames are missing that it declares.
        """
        clock, times = self._clock, FrameTimes(self.container, round(1 / self.stated_rate / self.base))
        method, borders = self.fields or WHOLE_FRAMES, self.borders
        filters = (
            FieldFilters(self.stream, method, self.base, self.stated_rate, borders) if self.fields or any(borders) else None
        )
        hidden, size, end = 0, (0, 0), 0
        for packet in self._packets():
            clock.adjust(packet)
            if packet.stream is not self.stream:
                if packet.dts is not None:
                    yield packet
                continue
            hidden += packet.is_discard  # an edit list has it decoded, but not shown
            times.register(packet)
            for frame in self._decode(packet):
                times.assign(frame)
                end = frame.pts or 0
                size = size if self.frames else (frame.width, frame.height)
                frame = self._accept(frame)
                self.frames += 1
                yield from filters.push(frame) if filters and (frame.width, frame.height) == size else (frame,)
        yield from filters.finish() if filters else ()
        if not self._jumped:
            self._check_length(hidden, end * self.base)
        self.notes += [f"its clock jumps at {', '.join(f'{jump:.2f}' for jump in clock.jumps[:3])} s"] if clock.jumps else []
        self.notes += [f"{times.changed} frames had the time of an earlier one and follow it"] if times.changed else []

    def _accept(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return a decoded frame, for a subclass to look at or to change."""
        return frame

    def _lose(self, why: str, at: float | None) -> None:
        """Raise ShardError since something could not be decoded, `at` seconds if that is known."""
        raise ShardError(f"{self.name} is damaged after {self.frames} frames: {why}")

    def _check_length(self, hidden: int, end: Fraction) -> None:
        """Compare with the file's header, if it states a length: a truncated file often just ends."""
        promised = self.stream.frames - hidden
        if self.frames < _SHORTEST * promised:
            self._lose(f"it promises {promised} frames", None)
        seconds, last = _seconds(self.stream.metadata.get("DURATION", "")), float(end) + self._clock.start
        if last < _SHORTEST_TIME * seconds and seconds - last > 2 / float(self.stated_rate):
            self._lose(f"it promises {seconds:.2f} seconds", None)

    def _choose(self, wanted: int | None) -> VideoStream:
        """Return the stream to read, and note the videos that are not read."""
        videos = [one for one in self.container.streams.video if not is_cover(one)]
        if not videos:
            raise ShardError(f"{self.name} has no video in it")
        videos = [one for one in videos if one.codec_context is not None]
        if not videos:
            raise ShardError(f"{self.name} has a video of a codec that can't be decoded")
        listed = ", ".join(f"{one.index} ({one.codec_context.name}, {one.width}x{one.height})" for one in videos)
        if wanted is not None:
            found = next((one for one in videos if one.index == wanted), None)
            if found is None:
                raise ShardError(f"--video_stream {wanted}: {self.name} has no such video stream; it has {listed}")
            return found
        chosen = max(videos, key=lambda one: (bool(one.disposition & one.disposition.default), _seconds_of(one), -one.index))
        if len(videos) > 1:
            self.notes.append(f"of its video streams {listed}, {chosen.index} is read; --video_stream takes another")
        return chosen

    def _rate(self) -> Fraction:
        """Return the frames per second: as stated, unless that is no rate of a video."""
        stated = self.stream.average_rate or self.stream.guessed_rate
        if stated and stated <= _FASTEST and self.stream.average_rate:
            return stated
        is_file = self.url.startswith("file:")  # a pipe is read only once
        measured = measured_rate(self.url, self.stream.index) if is_file else None
        return measured or min(stated or _USUAL_RATE, _FASTEST)

    def _packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the file; behind damage, reading goes on a limited number of times."""
        for _ in range(_ATTEMPTS):
            try:
                yield from self.container.demux(self.stream, *self.others)
            except (av.FFmpegError, OSError) as error:
                self._lose(f"{error.strerror or error}", None)
            else:
                return

    def _decode(self, packet: av.Packet) -> Iterator[av.VideoFrame]:
        """Yield the intact frames of a packet."""
        at = None if packet.pts is None or packet.time_base is None else float(packet.pts * packet.time_base)
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError) as error:
            self._lose(f"{error.strerror or error}", at)
            return
        for frame in frames:
            if frame.is_corrupt:
                self._lose(f"the frame at {frame.time or 0:.2f} seconds", frame.time)
            else:
                yield frame


def is_cover(stream: Any) -> bool:
    """Return whether a stream is a cover picture."""
    return stream.type == "video" and bool(stream.disposition & stream.disposition.attached_pic)


def _seconds_of(stream: VideoStream) -> Fraction:
    return (stream.duration or 0) * (stream.time_base or Fraction(0))


def _seconds(text: str) -> float:
    """Convert a track's length in Matroska's notation, '00:01:02.500000000', to seconds; return 0 for anything else."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0
