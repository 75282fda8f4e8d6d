"""Read frames, in the order and at the times at which they are shown, and packets of sound and subtitles from a video file."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from shards.color_conversion import assume_left_chroma, describe_colours, measure_chroma_location
from shards.schema import ShardError
from vfi.errors import JobError
from vfi.video.comb_detection import find_combs
from vfi.video.field_filters import WHOLE_FRAMES, FieldFilters, FieldMethod, hidden_borders
from vfi.video.hdr_metadata import HdrMetadata, read_hdr_metadata
from vfi.video.pipe import PIPE
from vfi.video.presentation import Clock, FrameTimes, measured_rate

_SHORTEST = 0.95  # of the frames that a file declares: with fewer it was truncated
_FASTEST, _USUAL_RATE = Fraction(300), Fraction(25)  # frames per second; a higher one is the clock's, not the picture's
_FIELD_RATES, _FIELD_ROWS = (Fraction(49, 2), Fraction(31)), 1152  # frames per second and rows of video that may be of fields
_ATTEMPTS = 20  # to read on behind damage
_LOST = {
    "DYNAMIC_HDR_PLUS": "HDR10+",
    "DOVI_METADATA": "Dolby Vision",
}
"""What frames carry that is not written: its type -> what it is."""
_KEPT = ("audio", "subtitle")
_IN_TURN = ("left and right in turn", "right and left in turn")
_STEREO = {
    1: ("left_right", "right_left"),
    2: ("top_bottom", "bottom_top"),
    3: _IN_TURN,
    4: ("checkerboard_lr", "checkerboard_rl"),
    6: ("row_interleaved_lr", "row_interleaved_rl"),
    7: ("col_interleaved_lr", "col_interleaved_rl"),
}
"""Types of libavutil's AVStereo3D -> how Matroska calls them, as they are and with the views exchanged."""


class VideoInput:
    """A video file, open for a single pass. Raises JobError for a file that is not a video.

    It is read up to its first frame, since what comes with that must be known before another video is begun.
    `stream`: number of the stream to read, among all of the file; by default the video that the file marks as the default, else
    the longest one. `fields`: how whole frames are made of fields; without it, interlaced video is refused unless
    `keep_interlaced`.
    """

    def __init__(
        self,
        path: Path,
        allow_damaged: bool = False,
        stream: int | None = None,
        fields: FieldMethod | None = None,
        keep_interlaced: bool = False,
    ) -> None:
        self.path, self.allow_damaged = path, allow_damaged
        self.fields, self.keep_interlaced = fields, keep_interlaced
        self.damage = ""
        """What could not be decoded, where and why."""
        self.name = "pipe:0" if path == PIPE else f"file:{path}"  # or a name such as rec:1.mp4 would be a protocol
        try:
            self.container: InputContainer = av.open(self.name, metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise JobError(f"{path} cannot be read as a video: {error.strerror or error}") from error
        self.notes: list[str] = []
        """What is unusual about the file, and was handled."""
        try:
            self.stream = self._choose(stream)
            self.stream.thread_type = "AUTO"
            assume_left_chroma(self.stream)
            self.others = [stream for stream in self.container.streams if stream.type in _KEPT]
            self.unkept = [
                stream for stream in self.container.streams if stream.type not in (*_KEPT, "video") or _is_cover(stream)
            ]
            context = self.stream.codec_context
            self.width, self.height, self.pix_fmt = context.width, context.height, context.pix_fmt or "yuv420p"
            self.stated_rate = self._rate()
            self.base = self.stream.time_base or 1 / self.stated_rate
            self.rate = self.stated_rate * (fields.rate if fields else 1)
            self.colours = describe_colours(context)
            self.hdr, self.stereo = HdrMetadata(), ""
            self.borders = hidden_borders(self.container, self.stream.index)
            left, right, top, bottom = self.borders
            if left + right >= self.width or top + bottom >= self.height:
                raise JobError(
                    f"{path} hides all of its {self.width}x{self.height} pixels: mend its PixelCrop or clean aperture"
                )
            if any(self.borders):
                self.notes.append(
                    "borders that the file hides are cut off ({} left, {} right, {} top, {} bottom)".format(*self.borders)
                )
            if has_alpha(self.pix_fmt) and context.name != "gif":  # all of whose frames are decoded with transparency
                self.notes.append("its transparency is left out")
            self.says_matrix = context.colorspace
            self.aspect = self.stream.sample_aspect_ratio
            self.chapters: list[Any] = self.container.chapters()
            self.frames = 0
            """Number of frames read so far."""
            self._lost: list[float] = []  # times of what could not be decoded
            self._rest = self._read()
            self._first: list[av.VideoFrame | av.Packet] = []
            while not self.frames and (item := next(self._rest, None)):
                self._first.append(item)
            self._refuse_combs()
        except ShardError as error:
            self.container.close()
            raise JobError(f"{path}: {error}") from error
        except JobError:
            self.container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.container.close()

    @property
    def expected(self) -> int | None:
        """Return the number of frames that the file declares, or None where it declares none."""
        if self.stream.frames:
            return self.stream.frames
        return round(self.container.duration / av.time_base * self.rate) if self.container.duration else None

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Yield frames with increasing `pts`, the file's first time being 0, and packets of the other streams, in its order.

        Frames of another size are scaled to that of the first one. Raises JobError where the file is damaged; with
        `allow_damaged` the frames that can't be decoded are left out.
        """
        while self._first:
            yield self._first.pop(0)
        yield from self._rest

    def _read(self) -> Iterator[av.VideoFrame | av.Packet]:
        clock, times = Clock(self.container), FrameTimes(self.container, round(1 / self.stated_rate / self.base))
        method, borders = self.fields or WHOLE_FRAMES, self.borders
        filters = (
            FieldFilters(self.stream, method, self.base, self.stated_rate, borders) if self.fields or any(borders) else None
        )
        hidden, resized, size = 0, 0, (0, 0)
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
                if not self.frames:
                    size = frame.width, frame.height
                    self._describe(frame)
                if frame.interlaced_frame and not (self.fields or self.keep_interlaced):
                    raise JobError(
                        f"{self.path} is interlaced: --deinterlace makes whole frames of its fields (--detelecine where it was "
                        f"a film), --keep_interlaced takes it as it is"
                    )
                self.frames += 1
                if (frame.width, frame.height) != size:
                    resized += 1
                    frame = frame.reformat(*size)
                yield from filters.push(frame) if filters else (frame,)
        yield from filters.finish() if filters else ()
        if not self._lost and self.frames < _SHORTEST * (self.stream.frames - hidden):
            self._lose(f"it promises {self.stream.frames - hidden} frames", None)
        if self._lost:
            self.damage = f"{self.path} is damaged: at {len(self._lost)} places, first at {self._lost[0]:.2f} s"
        self.notes += [f"its clock jumps at {', '.join(f'{jump:.2f}' for jump in clock.jumps[:3])} s"] if clock.jumps else []
        self.notes += [f"{times.changed} frames had the time of an earlier one and follow it"] if times.changed else []
        self.notes += [f"{resized} frames of another size are scaled to {size[0]}x{size[1]}"] if resized else []

    def _describe(self, frame: av.VideoFrame) -> None:
        """Take over what the first frame says about all."""
        self.colours = dataclasses.replace(self.colours, location=measure_chroma_location(frame))
        left, right, top, bottom = self.borders
        self.width, self.height = frame.width - left - right, frame.height - top - bottom
        self.hdr = read_hdr_metadata(frame)
        lost = [_LOST[name] for data in cast(Any, frame.side_data) if (name := data.type.name) in _LOST]
        self.notes += [f"left out: {', '.join(lost)}"] if lost else []
        self.stereo = self._stereo(frame)
        if frame.interlaced_frame and self.keep_interlaced:
            self.notes.append("its field order is left out: the result says that its frames are whole")

    def _stereo(self, frame: av.VideoFrame) -> str:
        """Return how two views share a frame, in Matroska's words; nothing for one view."""
        stated = self.stream.metadata.get("stereo_mode", "mono")
        for data in cast(Any, frame.side_data):
            if data.type.name == "STEREO3D":
                kind, flags = struct.unpack("=2i", bytes(data)[:8])
                stated = _STEREO[kind][flags & 1] if kind in _STEREO else stated
        if stated in _IN_TURN:
            raise JobError(
                f"{self.path} shows {stated}, and nothing lies between those: put both into one frame first, such as by "
                f"ffmpeg -vf stereo3d=a{stated[0]}:sbsl"
            )
        return "" if stated == "mono" else stated

    def _refuse_combs(self) -> None:
        """Raise JobError where the first frames are combed though they are not marked as interlaced."""
        low, high = _FIELD_RATES
        is_likely = low <= self.stated_rate <= high and self.stream.codec_context.height <= _FIELD_ROWS
        if self.fields or self.keep_interlaced or self.path == PIPE or not is_likely:
            return
        pattern = find_combs(self._opening())
        fix = {
            "telecine": "one or two of five frames combed, as film at 30 frames a second: --detelecine finds its 24",
            "interlaced": "combed frames, though it says that they are whole: --deinterlace makes whole ones of their fields",
        }
        if pattern:
            raise JobError(f"{self.path} has {fix[pattern]}, --keep_interlaced takes it as it is")

    def _opening(self) -> Iterator[av.VideoFrame]:
        """Yield frames from the start of the file once more, up to the first damage."""
        with av.open(self.name, metadata_errors="replace") as container:
            stream = cast(VideoStream, container.streams[self.stream.index])
            stream.thread_type = "AUTO"
            with contextlib.suppress(av.FFmpegError, OSError):  # which is reported when it is read to be converted
                for packet in container.demux(stream):
                    yield from packet.decode()

    def _choose(self, wanted: int | None) -> VideoStream:
        """Return the stream to read, and note the videos that are not read."""
        videos = [one for one in self.container.streams.video if not _is_cover(one)]
        if not videos:
            raise JobError(f"{self.path} has no video in it")
        videos = [one for one in videos if one.codec_context is not None]
        if not videos:
            raise JobError(f"{self.path} has a video of a codec that can't be decoded")
        listed = ", ".join(f"{one.index} ({one.codec_context.name}, {one.width}x{one.height})" for one in videos)
        if wanted is not None:
            found = next((one for one in videos if one.index == wanted), None)
            if found is None:
                raise JobError(f"--video_stream {wanted}: {self.path} has no such video stream; it has {listed}")
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
        measured = measured_rate(self.name, self.stream.index) if self.path != PIPE else None  # which is read only once
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

    def _decode(self, packet: av.Packet) -> list[av.VideoFrame]:
        """Return the intact frames of a packet."""
        at = None if packet.pts is None or packet.time_base is None else float(packet.pts * packet.time_base)
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError) as error:
            self._lose(f"{error.strerror or error}", at)
            return []
        whole = [frame for frame in frames if not frame.is_corrupt]
        for frame in frames:
            if frame.is_corrupt:
                self._lose(f"the frame at {frame.time or 0:.2f} seconds", frame.time)
        return whole

    def _lose(self, why: str, at: float | None) -> None:
        """Note that something could not be decoded; JobError unless that is allowed, and where nothing was decoded before."""
        if not self.allow_damaged or not self.frames:
            raise JobError(
                f"{self.path} is damaged after {self.frames} frames: {why}; --allow_damaged takes what can be decoded"
            )
        self._lost.append(at if at is not None else self.frames / float(self.rate))


def _is_cover(stream: Any) -> bool:
    """Return whether a stream is a cover picture."""
    return stream.type == "video" and bool(stream.disposition & stream.disposition.attached_pic)


def _seconds_of(stream: VideoStream) -> Fraction:
    return (stream.duration or 0) * (stream.time_base or Fraction(0))


def has_alpha(pix_fmt: str) -> bool:
    """Return whether a pixel format has a plane, or a sample of each pixel, for transparency."""
    return any(component.is_alpha for component in av.VideoFormat(pix_fmt).components)
