"""Read frames from a video file and write them to another one, with everything that belongs to them.

    with VideoInput(path) as source:
        sink = VideoOutput(out, source, size, base, rate, Encoding())
        for item in source.read():                     # one by one: memory does not grow with the length
            if isinstance(item, av.Packet):
                sink.copy(item)                        # sound and subtitles, unchanged
            else:
                sink.write(item, pts)                  # a frame of the input, or `from_rgb(array, …)`
        sink.close()

Frames of the input are written as they were read, without a conversion to RGB. Size, pixel format (10 bits stay 10), matrix and
range of the colours, pixel aspect, rotation, language, titles, chapters, and every stream that the new container can hold are
kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.frame import PictureType
from av.video.stream import VideoStream

from shards.color_conversion import (
    BT709,
    Colours,
    assume_left_chroma,
    chroma_halves,
    describe_colours,
    from_rgb,
    measure_chroma_location,
    reformat,
    to_rgb,
)
from shards.schema import ShardError
from vfi.errors import JobError
from vfi.video.resume import PartialVideoReader

_KEPT = ("audio", "subtitle")
_USUAL = {
    "libx264": {"crf": "14"},
    "libx265": {"crf": "18", "x265-params": "log-level=error"},
    "libvpx-vp9": {"crf": "24", "b": "0"},
    "libsvtav1": {"crf": "24"},
}
# libx264 on 16 cores with its default preset, medium, is slower than the model on a GPU, and a third of the work of veryfast is
# motion search to a quarter of a pixel; crf 14 restores the quality that both settings cost
_USUAL_PRESET = {"libx264": {"preset": "veryfast", "x264-params": "subme=1"}}
_SHORTEST = 0.95  # of the frames that a file declares: with fewer it was truncated


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Settings of the encoder of the new video."""

    codec: str = ""
    """Encoder, such as libx264, libx265, libsvtav1, prores_ks; by default one that fits the container and the pixel format."""
    crf: int | None = None
    """Quality, for encoders that have this setting: lower is better."""
    preset: str = ""
    """The encoder's own name for its balance of speed and file size, such as medium or veryfast."""
    pix_fmt: str = ""
    """Pixel format, such as yuv420p10le; by default that of the input, or the nearest one that the encoder supports."""


class VideoInput:
    """A video file, open for a single pass. Raises JobError for a file that is not a video."""

    def __init__(self, path: Path, allow_damaged: bool = False) -> None:
        self.path, self.allow_damaged = path, allow_damaged
        self.damage = ""
        """Where and why reading ended early."""
        try:
            self.container: InputContainer = av.open(str(path))
        except (av.FFmpegError, OSError) as error:
            raise JobError(f"{path} cannot be read as a video: {error.strerror or error}") from error
        videos = [stream for stream in self.container.streams.video if not stream.disposition & stream.disposition.attached_pic]
        if not videos:
            self.container.close()
            raise JobError(f"{path} has no video in it")
        self.stream: VideoStream = videos[0]
        self.stream.thread_type = "AUTO"
        assume_left_chroma(self.stream)
        self.others = [stream for stream in self.container.streams if stream.type in _KEPT]
        context = self.stream.codec_context
        self.width, self.height, self.pix_fmt = context.width, context.height, context.pix_fmt or "yuv420p"
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self.base = self.stream.time_base or 1 / self.rate
        try:
            self.colours = describe_colours(context)
        except ShardError as error:
            self.container.close()
            raise JobError(f"{path}: {error}") from error
        self.says_matrix = context.colorspace
        self.aspect = self.stream.sample_aspect_ratio
        self.chapters: list[Any] = self.container.chapters()
        self.frames = 0
        """Number of frames read so far."""

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
        """Yield frames with increasing `pts`, and packets of the other streams, in the order of the file.

        Raises JobError where the file is damaged; with `allow_damaged` the frames end there instead.
        """
        before: int | None = None
        try:
            for packet in self.container.demux(self.stream, *self.others):
                if packet.stream is not self.stream:
                    if packet.dts is not None:
                        yield packet
                    continue
                for frame in cast("list[av.VideoFrame]", packet.decode()):
                    if frame.is_corrupt:
                        self._end_early(f"the frame at {frame.time or 0:.2f} seconds")
                        return
                    duration = frame.duration or round(1 / self.rate / self.base)
                    if frame.pts is None:
                        frame.pts = 0 if before is None else before + duration
                    if before is None:
                        self.colours = dataclasses.replace(self.colours, location=measure_chroma_location(frame))
                    if before is None or frame.pts > before:
                        before, self.frames = frame.pts, self.frames + 1
                        yield frame
        except (av.FFmpegError, OSError) as error:
            self._end_early(f"{error.strerror or error}")
        if self.stream.frames and self.frames < _SHORTEST * self.stream.frames:
            self._end_early(f"it promises {self.stream.frames} frames")

    def _end_early(self, why: str) -> None:
        self.damage = f"{self.path} is damaged after {self.frames} frames: {why}"
        if not self.allow_damaged or not self.frames:
            raise JobError(f"{self.damage}; --allow_damaged takes what comes before")


class VideoOutput:
    """A video file that is being written. `source`: the video that it is made from, parts of which are kept; None for a folder.

    `begun`: the partial video of a stopped conversion: the first frames are copied from it, without encoding them again.
    """

    def __init__(
        self, path: Path, source: VideoInput | None, size: tuple[int, int], base: Fraction, rate: Fraction, encoding: Encoding,
        slowdown: int = 1, begun: PartialVideoReader | None = None,
    ) -> None:  # fmt: skip
        self.path, self.source = path, source
        self.base, self.closed = base, False
        self.begun, self.done, self.count = begun, begun.frames if begun else 0, 0
        try:
            self.container: OutputContainer = av.open(str(path), "w")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise JobError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from error
        given = source.pix_fmt if source else "yuv420p"
        codec = encoding.codec or default_codec(path.suffix, self.colours.bits)
        self.pix_fmt = choose_pix_fmt(codec, encoding.pix_fmt, given, self.colours.bits)
        self.stream = cast(VideoStream, self.container.add_stream(codec, rate=rate.limit_denominator(1 << 16)))
        context = self.stream.codec_context
        # chroma at half the size requires even sides: the last row or column is repeated
        halves = chroma_halves(self.pix_fmt)
        context.height, context.width = (side + side % 2 * half for side, half in zip(size, halves, strict=True))
        context.pix_fmt, context.time_base = self.pix_fmt, base
        context.options = _options(codec, encoding)
        context.thread_type = "AUTO"  # the default is slice threading, which makes files of x264 a sixth larger, and is slower
        context.color_range = 2 if self.colours.full_range else 1
        # state the colour matrix: players guess it from the size otherwise, and disagree
        context.colorspace = (source.says_matrix if source else BT709) or self.colours.matrix
        context.color_primaries, context.color_trc = self.colours.primaries, self.colours.transfer
        self.copies: dict[Any, Any] = {}
        self.started = False
        self.early: list[av.Packet] = []
        self.left_out: list[str] = []
        if source:
            self._keep(source, slowdown)
        try:
            context.open()  # otherwise opened at the first frame: settings that the encoder rejects are better reported now
        except (av.FFmpegError, ValueError) as error:
            given = " ".join(f"{name}={value}" for name, value in context.options.items())
            why = getattr(error, "strerror", None) or error
            raise JobError(f"--codec {codec} can't be used with {given} and {self.pix_fmt}: {why}") from error

    @property
    def colours(self) -> Colours:
        """Return how frames store colours: as the source does, whose colours are known from its first frame on."""
        return self.source.colours if self.source else Colours()

    def write(self, frame: av.VideoFrame, pts: int) -> None:
        """Encode a frame that is shown at `pts`, in the output's time base."""
        context = self.stream.codec_context
        if not self.started:
            self._start(frame)
        self.count += 1
        if self.begun and self.count <= self.done:
            self._mux(self.begun.next(pts, self.base, self.stream))
            return
        if frame.format.name != self.pix_fmt or (frame.height, frame.width) != (context.height, context.width):
            frame = self._fitted(frame)
        frame.pts, frame.time_base, frame.pict_type = pts, self.base, PictureType.NONE
        self._mux(self.stream.encode(frame))

    def copy(self, packet: av.Packet) -> None:
        """Write a packet of another stream, if that stream is kept."""
        if packet.stream not in self.copies:
            return
        packet.stream = self.copies[packet.stream]
        if self.started:
            self._mux([packet])
        else:
            self.early.append(packet)

    def close(self) -> None:
        """Encode the remaining frames and finish the file."""
        self._mux(self.stream.encode(None))
        self._do(self.container.close)
        self.closed = True

    def give_up(self) -> None:
        """Close a file that is discarded; does nothing after `close`."""
        if not self.closed:
            with contextlib.suppress(av.FFmpegError, OSError):  # the reason for discarding it is already reported
                self.container.close()
            self.closed = True

    def _fitted(self, frame: av.VideoFrame) -> av.VideoFrame:
        context = self.stream.codec_context
        if (frame.height, frame.width) == (context.height, context.width) and not frame.format.is_rgb:
            return reformat(frame, self.pix_fmt)
        image = to_rgb(frame, self.colours, self.colours.depth)
        missing = (context.height - image.shape[0], context.width - image.shape[1])
        return from_rgb(np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge"), self.colours, self.pix_fmt)

    def _keep(self, source: VideoInput, slowdown: int) -> None:
        if source.aspect:
            self.stream.codec_context.sample_aspect_ratio = source.aspect
        self.container.metadata.update({k: v for k, v in source.container.metadata.items() if k in _METADATA})
        if language := source.stream.metadata.get("language"):
            self.stream.metadata["language"] = language
        if source.chapters:
            scaled = [one | {"start": one["start"] * slowdown, "end": one["end"] * slowdown} for one in source.chapters]
            self.container.set_chapters(scaled)
        for stream in source.others:
            name = f"{stream.type} {stream.index} ({stream.codec_context.name if stream.codec_context else '?'})"
            if slowdown > 1:
                self.left_out.append(f"{name}: the video is slower")
                continue
            try:
                copy = self.container.add_stream_from_template(stream)
            except (ValueError, av.FFmpegError) as error:
                self.left_out.append(f"{name}: {self.path.suffix} can't hold it ({error}), take .mkv")
                continue
            copy.metadata.update({k: v for k, v in stream.metadata.items() if k in ("language", "title")})
            self.copies[stream] = copy

    def _start(self, frame: av.VideoFrame) -> None:
        """Write the display rotation, which is known from the first frame on and must come before any packet."""
        self.started = True
        if frame.rotation:
            self.stream.set_display_rotation(frame.rotation)
        self._mux(self.early)
        self.early = []

    def _mux(self, packets: Any) -> None:
        self._do(lambda: self.container.mux(packets))

    def _do(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except (av.FFmpegError, OSError) as error:
            raise JobError(f"{self.path} cannot be written: {error.strerror or error}") from error


_METADATA = ("title", "artist", "comment", "description", "date", "creation_time", "copyright", "genre", "location")


def default_codec(suffix: str, bits: int) -> str:
    """Return the usual encoder of a container."""
    wanted = {".webm": ("libvpx-vp9", "libsvtav1")}.get(suffix.lower(), ("libx264",) if bits <= 8 else ("libx265", "libx264"))
    return next((codec for codec in (*wanted, "mpeg4") if codec in av.codecs_available), "mpeg4")


def choose_pix_fmt(codec: str, asked: str, given: str, bits: int) -> str:
    """Return a pixel format of the encoder: the requested one, the input's, or the nearest by bits and chroma size."""
    try:
        formats = [pixels.name for pixels in av.Codec(codec, "w").video_formats or ()]
    except ValueError as error:
        raise JobError(f"--codec {codec} is not an encoder of this video library") from error
    if asked and formats and asked not in formats:
        raise JobError(f"--pix_fmt {asked} is not among those of {codec}: choose from {', '.join(formats)}")
    if asked or not formats or given in formats:
        return asked or given
    wanted = av.VideoFormat(given)

    def distance(name: str) -> tuple[bool, int, int]:
        pixels = av.VideoFormat(name)
        found = max(component.bits for component in pixels.components)
        sizes = sum(a != b for a, b in zip(chroma_halves(name), chroma_halves(given), strict=True))
        return pixels.is_rgb != wanted.is_rgb, abs(found - bits) + 100 * (found < bits), sizes

    return min(formats, key=distance)


def _options(codec: str, encoding: Encoding) -> dict[str, str]:
    options = dict(_USUAL.get(codec, {}))
    if encoding.crf is not None:
        options["crf"] = str(encoding.crf)
    return options | ({"preset": encoding.preset} if encoding.preset else _USUAL_PRESET.get(codec, {}))
