"""Read frames, in the order and at the times at which they are shown, and packets of sound and subtitles from a video file."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.video.stream import VideoStream

from shards.color_conversion import describe_colours, measure_chroma_location
from shards.field_filters import FieldMethod
from shards.schema import ShardError
from shards.video_reader import VideoReader, is_cover
from vfi.errors import JobError
from vfi.video.comb_detection import find_combs
from vfi.video.hdr_metadata import HdrMetadata, read_hdr_metadata
from vfi.video.pipe import PIPE

_FIELD_RATES, _FIELD_ROWS = (Fraction(49, 2), Fraction(31)), 1152  # frames per second and rows of video that may be of fields
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


class VideoInput(VideoReader):
    """A video file, open for a single pass, with all that belongs to it. Raises ShardError or JobError for an unusable file.

    It is read up to its first frame, since what comes with that must be known before another video is begun.

    Without `fields`, interlaced video is refused unless `keep_interlaced`. The other arguments are those of `VideoReader`.
    """

    def __init__(
        self,
        path: Path,
        allow_damaged: bool = False,
        stream: int | None = None,
        fields: FieldMethod | None = None,
        keep_interlaced: bool = False,
    ) -> None:
        super().__init__(path, url="pipe:0" if path == PIPE else "", stream=stream, fields=fields)
        self.allow_damaged, self.keep_interlaced = allow_damaged, keep_interlaced
        self.damage = ""
        """What could not be decoded, where and why."""
        self._lost: list[float] = []  # times of what could not be decoded
        self._size, self._resized = (0, 0), 0  # of the first frame; number of frames that had another one
        try:
            self.others = [stream for stream in self.container.streams if stream.type in _KEPT]
            self.unkept = [
                stream for stream in self.container.streams if stream.type not in (*_KEPT, "video") or is_cover(stream)
            ]
            context = self.stream.codec_context
            self.width, self.height, self.pix_fmt = context.width, context.height, context.pix_fmt or "yuv420p"
            try:
                self.colours = describe_colours(context)
            except ShardError as error:
                raise ShardError(f"{path}: {error}") from error
            self.hdr, self.stereo = HdrMetadata(), ""
            if has_alpha(self.pix_fmt) and context.name != "gif":  # all of whose frames are decoded with transparency
                self.notes.append("its transparency is left out")
            self.says_matrix = context.colorspace
            self.aspect = self.stream.sample_aspect_ratio
            self.chapters: list[Any] = self.container.chapters()
            self._rest = self._read()
            self._first: list[av.VideoFrame | av.Packet] = []
            while not self.frames and (item := next(self._rest, None)):
                self._first.append(item)
            self._refuse_combs()
        except (JobError, ShardError):
            self.container.close()
            raise

    @property
    def expected(self) -> int | None:
        """Return the number of frames that the file declares, or None where it declares none."""
        if self.stream.frames:
            return self.stream.frames
        return round(self.container.duration / av.time_base * self.rate) if self.container.duration else None

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Yield frames and packets as `VideoReader.read` does.

        Frames of another size are scaled to that of the first one. Raises JobError where the file is damaged; with
        `allow_damaged` the frames that can't be decoded are left out.
        """
        while self._first:
            yield self._first.pop(0)
        yield from self._rest

    def _read(self) -> Iterator[av.VideoFrame | av.Packet]:
        yield from super().read()
        if self._lost:
            self.damage = f"{self.path} is damaged: at {len(self._lost)} places, first at {self._lost[0]:.2f} s"
        resized, (width, height) = self._resized, self._size
        self.notes += [f"{resized} frames of another size are scaled to {width}x{height}"] if resized else []

    def _accept(self, frame: av.VideoFrame) -> av.VideoFrame:
        if not self.frames:
            self._describe(frame)
        if frame.interlaced_frame and not (self.fields or self.keep_interlaced):
            raise JobError(
                f"{self.path} is interlaced: --deinterlace makes whole frames of its fields (--detelecine where it was "
                f"a film), --keep_interlaced takes it as it is"
            )
        if (frame.width, frame.height) != self._size:
            self._resized += 1
            frame = frame.reformat(*self._size)
        return frame

    def _check_length(self, hidden: int, end: Fraction) -> None:
        if not self._lost:
            super()._check_length(hidden, end)

    def _describe(self, frame: av.VideoFrame) -> None:
        """Take over what the first frame says about all."""
        self.colours = dataclasses.replace(self.colours, location=measure_chroma_location(frame))
        self._size = frame.width, frame.height
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
        with av.open(self.url, metadata_errors="replace") as container:
            stream = cast(VideoStream, container.streams[self.stream.index])
            stream.thread_type = "AUTO"
            with contextlib.suppress(av.FFmpegError, OSError):  # which is reported when it is read to be converted
                for packet in container.demux(stream):
                    yield from packet.decode()

    def _lose(self, why: str, at: float | None) -> None:
        """Note that something could not be decoded; JobError unless that is allowed, and where nothing was decoded before."""
        if not self.allow_damaged or not self.frames:
            raise JobError(
                f"{self.path} is damaged after {self.frames} frames: {why}; --allow_damaged takes what can be decoded"
            )
        self._lost.append(at if at is not None else self.frames / float(self.rate))


def has_alpha(pix_fmt: str) -> bool:
    """Return whether a pixel format has a plane, or a sample of each pixel, for transparency."""
    return any(component.is_alpha for component in av.VideoFormat(pix_fmt).components)
