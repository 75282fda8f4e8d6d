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
import io
import math
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import PictureType
from av.video.stream import VideoStream

from shards.color_conversion import (
    Colours,
    chroma_halves,
    from_rgb,
    is_rgb,
    reformat,
    to_rgb,
    with_property,
)
from vfi.errors import JobError
from vfi.video.hdr_metadata import HdrMetadata
from vfi.video.resume import PartialVideoReader
from vfi.video.video_input import VideoInput, has_alpha

_USUAL = {
    "libx264": {"crf": "14"},
    "libx265": {"crf": "18", "x265-params": "log-level=error"},
    "libvpx-vp9": {"crf": "24", "b": "0"},
    "libsvtav1": {"crf": "24"},
}
# libx264 on 16 cores with its default preset, medium, is slower than the model on a GPU, and a third of the work of veryfast is
# motion search to a quarter of a pixel; crf 14 restores the quality that both settings cost
_USUAL_PRESET = {"libx264": {"preset": "veryfast", "x264-params": "subme=1"}}
_FRAME_DURATION = 1 << 8  # AV_CODEC_FLAG_FRAME_DURATION: the last frame is shown for as long as it says
_STATES_ASPECT = ("libx264", "libx265", "mpeg4", "mpeg2video", "ffv1")
_FRAME_PACKING = {"checkerboard_lr": 0, "col_interleaved_lr": 1, "row_interleaved_lr": 2, "left_right": 3, "top_bottom": 4}
"""Layouts of stereo frames that H.264 can state."""
_HEVC = ("hevc", "libx265", "hevc_nvenc", "hevc_videotoolbox")
_NO_MATRIX = 0  # of ITU-T H.273: the planes are red, green and blue
_MOMENT = Fraction(1, 1000)  # seconds: a unit of the coarsest container


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


class VideoOutput:
    """A video file that is being written. `source`: the video that it is made from, parts of which are kept; None for a folder.

    `images`: how the images of a folder store colours.

    `begun`: the partial video of a stopped conversion: the first frames are copied from it, without encoding them again.
    """

    def __init__(
        self, path: Path, source: VideoInput | None, size: tuple[int, int], base: Fraction, rate: Fraction, encoding: Encoding,
        slowdown: int = 1, begun: PartialVideoReader | None = None, images: Colours | None = None,
    ) -> None:  # fmt: skip
        self.path, self.source, self.images = path, source, images or Colours()
        self.base, self.closed = base, False
        self.begun, self.done, self.count = begun, begun.frames if begun else 0, 0
        try:
            self.container: OutputContainer = av.open(f"file:{path}", "w")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise JobError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from error
        codec = encoding.codec or default_codec(path.suffix, self.colours.bits)
        self.pix_fmt = choose_pix_fmt(codec, encoding.pix_fmt, source.pix_fmt if source else "rgb24", self.colours.bits)
        self.stream = cast(VideoStream, self.container.add_stream(codec, rate=rate.limit_denominator(1 << 16)))
        context = self.stream.codec_context
        # chroma at half the size requires even sides: the last row or column is repeated
        halves = chroma_halves(self.pix_fmt)
        context.height, context.width = (side + side % 2 * half for side, half in zip(size, halves, strict=True))
        context.pix_fmt, context.time_base = self.pix_fmt, base
        context.options = _options(codec, encoding)
        self.left_out: list[str] = []
        self._keep_properties(context.name)
        context.flags |= _FRAME_DURATION
        context.thread_type = "AUTO"  # the default is slice threading, which makes files of x264 a sixth larger, and is slower
        rgb = is_rgb(av.VideoFormat(self.pix_fmt))
        context.color_range = 2 if self.colours.full_range or rgb else 1
        # state the colour matrix: players guess it from the size otherwise, and disagree
        stated = source.says_matrix if source and not is_rgb(av.VideoFormat(source.pix_fmt)) else 0
        context.colorspace = _NO_MATRIX if rgb else stated or self.colours.matrix
        if self.stream.codec_context.name in _HEVC and path.suffix.lower() in (".mp4", ".mov", ".m4v"):
            context.codec_tag = "hvc1"  # with hev1, which FFmpeg takes by itself, players of Apple show nothing
        context.color_primaries, context.color_trc = self.colours.primaries, self.colours.transfer
        self.copies: dict[Any, Any] = {}
        self.copied: dict[int, Fraction] = {}  # stream -> decoding time of its last packet
        self.started = False
        self.early: list[av.Packet] = []
        if source:
            self._keep(source, slowdown)
        try:
            context.open()  # otherwise opened at the first frame: settings that the encoder rejects are better reported now
        except (av.FFmpegError, ValueError) as error:
            given = " ".join(f"{name}={value}" for name, value in _options(codec, encoding).items())
            why = getattr(error, "strerror", None) or error
            raise JobError(f"--codec {codec} can't be used with {given} and {self.pix_fmt}: {why}") from error

    @property
    def colours(self) -> Colours:
        """Return how frames store colours: as the source does."""
        return self.source.colours if self.source else self.images

    def write(self, frame: av.VideoFrame, pts: int, duration: int = 0, last: bool = False) -> None:
        """Encode a frame that is shown at `pts` for `duration`, in the output's time base; 0: until the next one.

        The `last` one is a key frame: MP4 keeps the duration of what is decoded last, and that would be a frame before it.
        """
        context = self.stream.codec_context
        if not self.started:
            self._start(frame)
        self.count += 1
        if self.begun and self.count <= self.done:
            self._mux(self.begun.next(pts, self.base, self.stream))
            return
        if frame.format.name != self.pix_fmt or (frame.height, frame.width) != (context.height, context.width):
            frame = self._fitted(frame)
        if context.name == "ffv1" and context.sample_aspect_ratio:  # which takes it from the frames, and made ones have none
            frame = with_property(frame, "setsar", str(context.sample_aspect_ratio))
        frame.pts, frame.duration, frame.time_base = pts, duration, self.base
        frame.pict_type = PictureType.I if last else PictureType.NONE
        self._mux(self.stream.encode(frame))

    def copy(self, packet: av.Packet) -> None:
        """Write a packet of another stream, if that stream is kept."""
        if packet.stream not in self.copies:
            return
        packet.stream = self.copies[packet.stream]
        self._keep_increasing(packet)
        if self.started:
            self._mux([packet])
        else:
            self.early.append(packet)

    def _keep_increasing(self, packet: av.Packet) -> None:
        """Move a packet behind the one before it in its stream: where a clock jumps, sound may overlap by a moment."""
        assert packet.dts is not None
        assert packet.time_base is not None
        time, before = packet.dts * packet.time_base, self.copied.get(packet.stream.index)
        if before is not None and time <= before:
            late = math.ceil((before + _MOMENT - time) / packet.time_base)
            packet.dts += late
            packet.pts = None if packet.pts is None else packet.pts + late
        self.copied[packet.stream.index] = packet.dts * packet.time_base

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
        self.stream.disposition = source.stream.disposition
        for stream in source.unkept:
            kind = "cover picture" if stream.type == "video" else stream.type
            self.left_out.append(f"{kind} {stream.index}: only sound and subtitles are copied")
        for stream in source.others:
            name = f"{stream.type} {stream.index} ({stream.codec_context.name if stream.codec_context else '?'})"
            if slowdown > 1:
                self.left_out.append(f"{name}: the video is slower")
                continue
            if not _can_hold(self.container.format.name, stream):
                self.left_out.append(f"{name}: {self.path.suffix} can't hold it, .mkv may")
                continue
            copy = self.container.add_stream_from_template(stream)
            copy.metadata.update({k: v for k, v in stream.metadata.items() if k in ("language", "title")})
            copy.disposition = stream.disposition
            self.copies[stream] = copy

    def _keep_properties(self, codec: str) -> None:
        """Have encoder and container state what the source states about its picture, and name what they can't."""
        suffix, matroska = self.path.suffix, self.container.format.name in ("matroska", "webm")
        options = self.stream.codec_context.options
        if chroma_halves(self.pix_fmt) == (True, True):
            location = options["chroma_sample_location"] = self.colours.location
            if location not in ("left", *_locations(codec, matroska)):
                self.left_out.append(f"the location of chroma ({location}): {codec} in {suffix} can't say it")
        if self.source:
            added = self.source.hdr.encoder_options(codec)
            if self.source.hdr != HdrMetadata() and not added:
                self.left_out.append(f"the HDR mastering display and light level: {codec} can't write them, libx265 can")
            stereo, square = self.source.stereo, self.source.aspect in (None, 1)
            packed = stereo in _FRAME_PACKING and codec == "libx264"
            if not square and matroska and (codec not in _STATES_ASPECT or (stereo and not packed)):
                aspect = f"the aspect of pixels ({self.source.aspect})"  # which PyAV 18.1 gives to the encoder alone
                self.left_out.append(f"{aspect}: {codec} in {suffix} can't say it, libx264 can")
            if packed and (not matroska or not square):
                added = {"x264-params": ":".join([*added.values(), f"frame-packing={_FRAME_PACKING[stereo]}"])}
            elif stereo and matroska:
                self.stream.metadata["stereo_mode"] = stereo
            elif stereo:
                self.left_out.append(f"the layout of stereo frames ({stereo}): {suffix} can't hold it, .mkv can")
            options |= {name: ":".join(filter(None, (options.get(name), value))) for name, value in added.items()}
        self.stream.codec_context.options = options

    def _start(self, frame: av.VideoFrame) -> None:
        """Write how a player turns and mirrors frames, which the first one says, before any packet."""
        self.started = True
        for data in cast(Any, frame.side_data):
            if data.type.name == "DISPLAYMATRIX":
                self.stream.set_display_matrix(struct.unpack("=9i", bytes(data)))
        self._mux(self.early)
        self.early = []

    def _mux(self, packets: Any) -> None:
        self._do(lambda: self.container.mux(packets))

    def _do(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except (av.FFmpegError, OSError) as error:
            raise JobError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _can_hold(container: str, stream: Any) -> bool:
    """Return whether a kind of container takes a stream as it is: some refuse it only when their head is written."""
    try:
        with av.open(io.BytesIO(), "w", format=container) as trial:
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (ValueError, av.FFmpegError):
        return False
    return True


def _locations(codec: str, matroska: bool) -> tuple[str, ...]:
    """Return the locations of chroma, other than left, that an encoder or a container can state."""
    if codec in ("libx264", "libx265"):
        return ("center", "topleft", "top", "bottomleft", "bottom")
    if matroska:
        return ("center", "topleft")
    return ("topleft",) if codec == "libsvtav1" else ()


_METADATA = ("title", "artist", "comment", "description", "date", "creation_time", "copyright", "genre", "location")


def default_codec(suffix: str, bits: int) -> str:
    """Return the usual encoder of a container."""
    wanted = {".webm": ("libvpx-vp9", "libsvtav1")}.get(suffix.lower(), ("libx264",) if bits <= 8 else ("libx265", "libx264"))
    return next((codec for codec in (*wanted, "mpeg4") if codec in av.codecs_available), "mpeg4")


def choose_pix_fmt(codec: str, asked: str, given: str, bits: int) -> str:
    """Return a pixel format of the encoder: the requested one, the input's, or the nearest by bits and chroma size.

    The usual encoders get RGB as 4:2:0, since many players refuse their other formats; a lossless one keeps it.
    """
    try:
        formats = [pixels.name for pixels in av.Codec(codec, "w").video_formats or () if not has_alpha(pixels.name)]
    except ValueError as error:
        raise JobError(f"--codec {codec} is not an encoder of this video library") from error
    if asked and has_alpha(asked):
        raise JobError(f"--pix_fmt {asked} has transparency, which is not interpolated: give one without")
    if asked and formats and asked not in formats:
        raise JobError(f"--pix_fmt {asked} is not among those of {codec}: choose from {', '.join(formats)}")
    if not asked and codec in _USUAL and is_rgb(av.VideoFormat(given)):
        given = "yuv420p" if bits <= 8 else "yuv420p10le"
    if asked or ((given in formats or not formats) and not has_alpha(given)):
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
