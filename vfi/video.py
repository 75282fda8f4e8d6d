"""How do frames come out of a video and go into another one, with all that belongs to them?

    with VideoInput(path) as source:
        sink = VideoOutput(out, source, size, base, rate, Encoding())
        for item in source.read():                     # one by one: memory does not grow with the length
            if isinstance(item, av.Packet):
                sink.copy(item)                        # sound, subtitles: as they are
            else:
                sink.write(item, pts)                  # a frame of the input, or `from_rgb(array, …)`
        sink.close()

Frames of the input go out as they came, without a way through RGB. Kept are size, pixel format (10 bits stay 10), matrix and
range of the colours, pixel aspect, rotation, language, titles, chapters, and every stream that the new container can hold.
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
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from vfi.errors import JobError
from vfi.partial import Replay

_KEPT = ("audio", "subtitle")
_UNSPECIFIED = 2  # of colour matrix, primaries and transfer, in ITU-T H.273
_BT709, _BT601 = 1, 5
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}  # of H.273 -> the library's conversions: 709, FCC, 601 (twice), 240M, 2020
_HD = 720  # rows: from here on players take BT.709 where nothing is said
_RGB = {8: "rgb24", 16: "rgb48le"}
_PLANES = {8: "gbrp", 16: "gbrp16le"}
# by default colours at half the size are converted a level too dark, and every other frame would be
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_USUAL = {
    "libx264": {"crf": "14"},
    "libx265": {"crf": "18", "x265-params": "log-level=error"},
    "libvpx-vp9": {"crf": "24", "b": "0"},
    "libsvtav1": {"crf": "24"},
}
# with its own preset, medium, libx264 on 16 cores is slower than the model on a GPU, and what veryfast does to find motion to a
# quarter of a pixel is a third of its work; what they lose crf 14 brings back
_USUAL_PRESET = {"libx264": {"preset": "veryfast", "x264-params": "subme=1"}}
_SHORTEST = 0.95  # of the frames that a file promises: with fewer it was cut off


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How the new video is compressed."""

    codec: str = ""
    """Encoder, such as libx264, libx265, libsvtav1, prores_ks; by default one that fits the container and the pixel format."""
    crf: int | None = None
    """Quality for encoders that have it: lower is better."""
    preset: str = ""
    """What the encoder calls its balance of time and file size, such as medium or veryfast."""
    pix_fmt: str = ""
    """Pixel format, such as yuv420p10le; by default the input's, or the nearest that the encoder has."""


@dataclasses.dataclass(frozen=True)
class Colours:
    """How colours are stored, in the numbers of ITU-T H.273; and the bits of each."""

    matrix: int = _BT709
    primaries: int = _BT709
    transfer: int = _BT709
    full_range: bool = False
    bits: int = 8

    @property
    def conversion(self) -> int:
        """The library's number for converting from and to RGB."""
        return _MATRICES.get(self.matrix, _BT709)

    @property
    def depth(self) -> int:
        """Bits of the RGB that holds them."""
        return 8 if self.bits <= 8 else 16


def to_rgb(frame: av.VideoFrame, colours: Colours) -> np.ndarray:
    """`[H, W, 3]` uint8, or uint16 for more than 8 bits. By one thread: several frames are converted side by side.

    The colours of a YUV frame lie one after the other in memory, which the library makes three times as fast as pixels.
    """
    is_rgb = frame.format.is_rgb  # of 10 bits as planes, it loses a level of them on the way to 16
    rgb = frame.reformat(
        format=(_RGB if is_rgb else _PLANES)[colours.depth], src_colorspace=colours.conversion, dst_color_range="JPEG",
        src_color_range="JPEG" if colours.full_range or is_rgb else "MPEG", interpolation=_EXACT, threads=1,
    )  # fmt: skip
    if is_rgb:
        return rgb.to_ndarray()
    rows = (np.frombuffer(memoryview(plane), f"u{colours.depth // 8}").reshape(plane.height, -1) for plane in rgb.planes)
    g, b, r = (row[:, : rgb.width] for row in rows)  # what follows is padding
    return np.stack((r, g, b)).transpose(1, 2, 0)


def from_rgb(image: np.ndarray, colours: Colours, pix_fmt: str) -> av.VideoFrame:
    """The reverse, in a pixel format of a video."""
    frame = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(image), format=_RGB[8 * image.itemsize])
    return frame.reformat(
        format=pix_fmt, dst_colorspace=colours.conversion, src_color_range="JPEG",
        dst_color_range="JPEG" if colours.full_range else "MPEG", interpolation=_EXACT, threads=1,
    )  # fmt: skip


class VideoInput:
    """A video file, open for one reading. JobError for what is none."""

    def __init__(self, path: Path, allow_damaged: bool = False) -> None:
        self.path, self.allow_damaged = path, allow_damaged
        self.damage = ""
        """Where reading ended early, and why."""
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
        self.others = [stream for stream in self.container.streams if stream.type in _KEPT]
        context = self.stream.codec_context
        self.width, self.height, self.pix_fmt = context.width, context.height, context.pix_fmt or "yuv420p"
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self.base = self.stream.time_base or 1 / self.rate
        pixels = av.VideoFormat(self.pix_fmt)
        guess = _BT709 if self.height >= _HD else _BT601
        self.colours = Colours(
            matrix=context.colorspace if context.colorspace in _MATRICES else guess,
            primaries=context.color_primaries,
            transfer=context.color_trc,
            full_range=context.color_range == 2 or self.pix_fmt.startswith("yuvj"),
            bits=max(component.bits for component in pixels.components),
        )
        self.says_matrix = context.colorspace
        self.aspect = self.stream.sample_aspect_ratio
        self.chapters: list[Any] = self.container.chapters()
        self.frames = 0
        """Read so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.container.close()

    @property
    def expected(self) -> int | None:
        """Frames that the file promises; None where it does not say."""
        if self.stream.frames:
            return self.stream.frames
        return round(self.container.duration / av.time_base * self.rate) if self.container.duration else None

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Frames with growing `pts`, and packets of the other streams, in the order of the file.

        JobError, or with `allow_damaged` an early end, where the file is damaged.
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
    """A video file under way. `source`: the video that it is made from, some of which is kept; None for a folder of frames.

    `begun`: the video that an earlier conversion left: the first frames are taken from it, without encoding them again.
    """

    def __init__(
        self, path: Path, source: VideoInput | None, size: tuple[int, int], base: Fraction, rate: Fraction, encoding: Encoding,
        slowdown: int = 1, begun: Replay | None = None,
    ) -> None:  # fmt: skip
        self.path, self.colours = path, source.colours if source else Colours()
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
        # with colours at half the size a side must be even: the last row or column is repeated
        halves = _halves(self.pix_fmt)
        context.height, context.width = (side + side % 2 * half for side, half in zip(size, halves, strict=True))
        context.pix_fmt, context.time_base = self.pix_fmt, base
        context.options = _options(codec, encoding)
        context.thread_type = "AUTO"  # by default in slices alone, by which x264 makes files a sixth larger, and is slower
        context.color_range = 2 if self.colours.full_range else 1
        # say which matrix the colours are in: players guess it from the size otherwise, and guess differently
        context.colorspace = (source.says_matrix if source else _BT709) or self.colours.matrix
        context.color_primaries, context.color_trc = self.colours.primaries, self.colours.transfer
        self.copies: dict[Any, Any] = {}
        self.started = False
        self.early: list[av.Packet] = []
        self.left_out: list[str] = []
        if source:
            self._keep(source, slowdown)
        try:
            context.open()  # it would be at the first frame, and what the encoder does not take is better said now
        except (av.FFmpegError, ValueError) as error:
            given = " ".join(f"{name}={value}" for name, value in context.options.items())
            why = getattr(error, "strerror", None) or error
            raise JobError(f"--codec {codec} can't be used with {given} and {self.pix_fmt}: {why}") from error

    def write(self, frame: av.VideoFrame, pts: int) -> None:
        """Encode a frame, to be shown at `pts` in the output's time base."""
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
        """Put a packet of another stream in, if that stream is kept."""
        if packet.stream not in self.copies:
            return
        packet.stream = self.copies[packet.stream]
        if self.started:
            self._mux([packet])
        else:
            self.early.append(packet)

    def close(self) -> None:
        """Encode what is left and end the file."""
        self._mux(self.stream.encode(None))
        self._do(self.container.close)
        self.closed = True

    def give_up(self) -> None:
        """Let go of a file that is thrown away; does nothing after `close`."""
        if not self.closed:
            with contextlib.suppress(av.FFmpegError, OSError):  # what it is thrown away for has been said
                self.container.close()
            self.closed = True

    def _fitted(self, frame: av.VideoFrame) -> av.VideoFrame:
        context = self.stream.codec_context
        if (frame.height, frame.width) == (context.height, context.width) and not frame.format.is_rgb:
            return frame.reformat(format=self.pix_fmt, interpolation=_EXACT)
        image = to_rgb(frame, self.colours)
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
        """How players are to turn the frames is known from the first of them, and must be said before anything is written."""
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
    """The usual encoder of a container."""
    wanted = {".webm": ("libvpx-vp9", "libsvtav1")}.get(suffix.lower(), ("libx264",) if bits <= 8 else ("libx265", "libx264"))
    return next((codec for codec in (*wanted, "mpeg4") if codec in av.codecs_available), "mpeg4")


def choose_pix_fmt(codec: str, asked: str, given: str, bits: int) -> str:
    """A pixel format that the encoder has: as asked for, the input's, or the nearest by bits and by size of the colours."""
    try:
        formats = [pixels.name for pixels in av.Codec(codec, "w").video_formats or ()]
    except ValueError as error:
        raise JobError(f"--codec {codec} is no encoder of this video library") from error
    if asked and formats and asked not in formats:
        raise JobError(f"--pix_fmt {asked} is not among those of {codec}: choose from {', '.join(formats)}")
    if asked or not formats or given in formats:
        return asked or given
    wanted = av.VideoFormat(given)

    def distance(name: str) -> tuple[bool, int, int]:
        pixels = av.VideoFormat(name)
        found = max(component.bits for component in pixels.components)
        sizes = sum(a != b for a, b in zip(_halves(name), _halves(given), strict=True))
        return pixels.is_rgb != wanted.is_rgb, abs(found - bits) + 100 * (found < bits), sizes

    return min(formats, key=distance)


def _halves(pix_fmt: str) -> tuple[bool, bool]:
    """(rows, columns): are colours stored at half the height, at half the width?"""
    pixels = av.VideoFormat(pix_fmt, 64, 64)
    chroma = [component for component in pixels.components if component.is_chroma]
    return any(one.height < 64 for one in chroma), any(one.width < 64 for one in chroma)


def _options(codec: str, encoding: Encoding) -> dict[str, str]:
    options = dict(_USUAL.get(codec, {}))
    if encoding.crf is not None:
        options["crf"] = str(encoding.crf)
    return options | ({"preset": encoding.preset} if encoding.preset else _USUAL_PRESET.get(codec, {}))
