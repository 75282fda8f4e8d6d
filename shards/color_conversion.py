"""Exact conversion between frames of a video and RGB, by the formulas of ITU-R BT.601, BT.709 and BT.2020.

    assume_left_chroma(stream)                      # before the first frame is decoded
    colours = describe_colours(frame)               # properties stated by the file, with defaults for the others
    image = to_rgb(frame, colours)                  # uint8 [H, W, 3]
    frame = from_rgb(image, colours, "yuv420p")     # for an encoder

The shard commands and the video interpolator share this conversion, so that a model is used on the kind of pictures that it was
trained on.

FFmpeg's libswscale does the conversion. With the settings below it is exact between 8 bits of limited range and 8-bit RGB. In
other cases it takes white to be 256 times a power of two rather than the largest value, puts the middle of full-range chroma
half a level too low, and treats all grey as full range; tables correct these results.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.format import VideoFormat
from av.video.plane import VideoPlane
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from shards.schema import ShardError

CONVERSION = "itu-exact-1"
"""Name of this conversion in index.json; it must change whenever the resulting pixels change."""
BT709, BT601 = 1, 5  # matrices, as numbered in ITU-T H.273
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}  # H.273 -> libswscale: BT.709, FCC, BT.601 (twice), SMPTE 240M, BT.2020
_UNSAID = (0, 2, 3)  # identity (used by RGB only), unspecified, reserved
_HD = (720, 1280)  # rows, columns: a video that reaches either and does not state its matrix has BT.709
_LIMITED, _FULL = 1, 2  # values of `color_range`
# without ACCURATE_RND, chroma at half the height makes frames a level too dark; with BITEXACT all processors give the same
_CARE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_EXACT = Interpolation.BICUBIC | _CARE
_SHRINKING = Interpolation.LANCZOS | _CARE
_SUBSAMPLING = {(32, 32): "420", (64, 32): "422", (64, 64): "444"}  # (rows, columns) of chroma for 64x64 of luma -> name
# (columns, rows) from the first of four luma samples to the chroma sample that they share
_LOCATIONS = {
    (0.0, 0.5): "left", (0.5, 0.5): "center", (0.0, 0.0): "topleft",
    (0.5, 0.0): "top", (0.0, 1.0): "bottomleft", (0.5, 1.0): "bottom",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Colours:
    """Colour properties of a video; matrix, primaries and transfer are numbers of ITU-T H.273."""

    matrix: int = BT709
    primaries: int = BT709
    transfer: int = BT709
    full_range: bool = False
    bits: int = 8
    location: str = "left"
    """Location of chroma samples relative to luma: left, center, topleft, top, bottomleft or bottom."""

    @property
    def depth(self) -> int:
        """Return the bits per channel of the RGB that holds these colours: 8 or 16."""
        return 8 if self.bits <= 8 else 16


def describe_colours(video: av.VideoFrame | VideoCodecContext) -> Colours:
    """Return the colour properties of a frame, or of every frame of a decoder.

    A video that does not state its matrix has BT.709 from 720 rows or 1280 columns on, and BT.601 below. One that does not
    state its range has limited range, or full range if it is grey. Raises ShardError for a matrix that can't be converted, and
    for an unknown pixel format.
    """
    pixels, matrix = video.format, video.colorspace
    if pixels is None:
        raise ShardError("its pixel format is not known, so it can't be decoded")
    if matrix in _UNSAID or is_rgb(pixels):
        matrix = BT709 if video.height >= _HD[0] or video.width >= _HD[1] else BT601
    if matrix not in _MATRICES:
        raise ShardError(
            f"its colours are stored by matrix {matrix} of ITU-T H.273, which can't be converted: possible are "
            f"{', '.join(map(str, _MATRICES))}; encode it with BT.709 (1) first"
        )
    says_full = video.color_range == _FULL or pixels.name.startswith("yuvj")
    return Colours(
        matrix=matrix,
        primaries=video.color_primaries,
        transfer=video.color_trc,
        full_range=says_full or (_is_grey(pixels) and video.color_range != _LIMITED),
        bits=_bits(pixels),
    )


def assume_left_chroma(stream: VideoStream) -> None:
    """Place chroma samples left, as players do, if a video does not state their location; call it before decoding starts.

    Otherwise libswscale assumes the center, half a pixel off, for VP9, ProRes and most AV1. The defaults of the decoders of
    H.264, HEVC, MPEG-2, MPEG-4 and JPEG remain in force, as does the location stated by containers of raw video such as Y4M.
    """
    context = stream.codec_context
    if context.name != "rawvideo":
        context.options = {**context.options, "chroma_sample_location": "left"}


def to_rgb(frame: av.VideoFrame, colours: Colours, most_bits: int = 8, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return a frame as RGB [H, W, 3] whose white is the largest value of its type.

    The result is uint8, or uint16 with `most_bits` 16 and more than 8 bits in the frame. `size` (height, width) downscales in
    the same step, antialiased, unless the frame is RGB already. Transparency is dropped. The conversion uses one thread, since
    callers convert several frames in parallel.
    """
    return np.stack(_rgb_planes(frame, colours, most_bits, size or (frame.height, frame.width)), axis=2)


def to_planes(frame: av.VideoFrame, colours: Colours, most_bits: int = 8) -> np.ndarray:
    """Return the result of `to_rgb` as [3, H, W], which is faster."""
    return np.stack(_rgb_planes(frame, colours, most_bits, (frame.height, frame.width)))


def from_rgb(image: np.ndarray, colours: Colours, pix_fmt: str) -> av.VideoFrame:
    """Convert RGB [H, W, 3], uint8 or uint16, to a frame of the pixel format `pix_fmt`: the inverse of `to_rgb`."""
    pixels = VideoFormat(pix_fmt)
    if is_rgb(pixels):
        return _rgb_as(pixels, image)
    bits, grey = _bits(pixels), _is_grey(pixels)
    location = f"chroma_location={colours.location}"
    source = with_property(_rgb_frame(image), "setparams", location)
    matrix = _MATRICES[colours.matrix]
    to_limited = functools.partial(reformat, source, dst_colorspace=matrix, src_color_range="JPEG", dst_color_range="MPEG")
    if image.dtype == np.uint8 and bits == 8 and not colours.full_range and not grey:
        return to_limited(pix_fmt)
    layout = _SUBSAMPLING.get((pixels.chroma_height(64), pixels.chroma_width(64)), "444")
    limited = to_limited(f"yuv{layout}p16le")
    depth = "" if bits == 8 else f"{bits}le"
    made = av.VideoFrame(limited.width, limited.height, f"gray{depth}" if grey else f"yuv{layout}p{depth}")
    for number, plane in enumerate(made.planes):
        table = _from_limited(number > 0, 255 << 8 if image.dtype == np.uint16 else 65_535, bits, colours.full_range)
        _samples(plane, bits)[:] = table[_samples(limited.planes[number], 16)]
    made.colorspace, made.color_range = limited.colorspace, _FULL if colours.full_range else _LIMITED
    # what remains is the order of the samples, as in NV12 and P010, and subsampling without a 16-bit format
    return made if made.format.name == pix_fmt else reformat(with_property(made, "setparams", location), pix_fmt)


def is_rgb(pixels: VideoFormat) -> bool:
    """Return whether the samples of a pixel format are red, green and blue, palette indices of such colours, or XYZ."""
    return pixels.is_rgb or pixels.has_palette or pixels.name.startswith("xyz")


def chroma_halves(pix_fmt: str) -> tuple[bool, bool]:
    """Return (rows, columns): whether chroma is stored at half the height or less, and at half the width or less."""
    chroma = [component for component in VideoFormat(pix_fmt, 64, 64).components if component.is_chroma]
    return any(one.height < 64 for one in chroma), any(one.width < 64 for one in chroma)


def measure_chroma_location(frame: av.VideoFrame) -> str:
    """Return the location of a frame's chroma samples, as in `Colours.location`.

    PyAV does not expose this property. A small frame that inherits it is filled with a chroma ramp, first along columns and
    then along rows, and the offset of the ramp is measured in its RGB.
    """
    side = 32 if frame.width != 32 else 34  # another size than the frame's, which would return the frame itself
    small = reformat(frame, "yuv420p", width=side, height=side, interpolation=Interpolation.POINT)
    offsets = []
    for axis in (1, 0):
        number = np.indices((side // 2, side // 2))[axis]
        for plane, values in zip(small.planes, (128, 128, 64 + 4 * number), strict=True):
            _samples(plane, 8)[:] = values
        red = to_planes(small, Colours(BT601, full_range=True))[0].astype(np.float64)
        found = ((red - 128) / 1.402 + 128 - 64) / 4  # index of the chroma sample at each pixel
        offset = np.indices((side, side))[axis] - 2 * found
        offsets.append(round(2 * float(offset[8:-8, 8:-8].mean())) / 2)
    return _LOCATIONS[offsets[0], offsets[1]]


def _rgb_planes(frame: av.VideoFrame, colours: Colours, most_bits: int, size: tuple[int, int]) -> list[np.ndarray]:
    pixels = frame.format
    bits, grey = _bits(pixels), _is_grey(pixels)
    top = 2 ** (8 if bits <= 8 else most_bits) - 1
    if is_rgb(pixels):  # packed: as planes, 10 bits lose a level on the way to 16
        rgb = reformat(frame, "rgb24" if bits <= 8 else "rgb48le", src_color_range="JPEG", dst_color_range="JPEG")
        planes, black, white = list(np.moveaxis(rgb.to_ndarray(), 2, 0)), 0, 255 if bits <= 8 else 65_535
    else:
        wide = 16 if bits > 8 and (top > 255 or colours.full_range or grey) else 8
        # planar output is three times as fast as packed pixels
        made = reformat(
            frame, "gbrp" if wide == 8 else "gbrp16le", src_colorspace=_MATRICES[colours.matrix],
            src_color_range="JPEG" if colours.full_range else "MPEG", dst_color_range="JPEG", height=size[0], width=size[1],
            interpolation=_EXACT if size == (frame.height, frame.width) else _SHRINKING,
        )  # fmt: skip
        green, blue, red = (_samples(plane, wide) for plane in made.planes)
        planes, black, white = [red, green, blue], 0, 255 << wide - 8
        if grey and not colours.full_range:
            black, white = 16 << wide - 8, 235 << wide - 8
        elif wide == 16 and colours.full_range:
            white = 2**bits - 1 << 16 - bits
    if (black, white) == (0, top):
        return planes
    table = _linear(1 << (8 * planes[0].itemsize), top / (white - black), -black * top / (white - black), top)
    return [table[plane] for plane in planes]


def _rgb_as(pixels: VideoFormat, image: np.ndarray) -> av.VideoFrame:
    bits = _bits(pixels)
    if image.dtype == np.uint16 and bits <= 8:
        image = _linear(65_536, 255 / 65_535, 0, 255)[image]
    elif bits > 8:  # libswscale takes the highest bits
        given, top = np.iinfo(image.dtype).max, 2**bits - 1
        image = _linear(given + 1, top / given, 0, top)[image].astype(np.uint16) << 16 - bits
    return reformat(_rgb_frame(image), pixels.name, src_color_range="JPEG", dst_color_range="JPEG")


def _rgb_frame(image: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(image), format="rgb24" if image.itemsize == 1 else "rgb48le")


def reformat(frame: av.VideoFrame, pix_fmt: str, interpolation: int = _EXACT, **options: Any) -> av.VideoFrame:
    """Return a frame in another pixel format, by one thread; `options` are those of `av.VideoFrame.reformat`."""
    return frame.reformat(format=pix_fmt, interpolation=interpolation, threads=1, **options)


def with_property(frame: av.VideoFrame, setter: str, value: str) -> av.VideoFrame:
    """Return the frame, with shared samples and a property that one of FFmpeg's filters sets: setparams or setsar."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add(setter, value), graph.add("buffersink")).configure()
    source.push(frame)
    made = graph.pull()
    assert isinstance(made, av.VideoFrame)
    return made


def _samples(plane: VideoPlane, bits: int) -> np.ndarray:
    """Return a view [height, width] of a plane's samples without the padding of its rows; writing to it changes the plane."""
    return np.frombuffer(memoryview(plane), np.uint8 if bits == 8 else "<u2").reshape(plane.height, -1)[:, : plane.width]


@functools.cache
def _linear(count: int, gain: float, offset: float, top: int) -> np.ndarray:
    """Return a table that maps 0 … count - 1 by gain and offset to integers in 0 … top."""
    return np.clip(np.rint(np.arange(count) * gain + offset), 0, top).astype(np.uint8 if top <= 255 else np.uint16)


def _from_limited(chroma: bool, white: int, bits: int, full_range: bool) -> np.ndarray:
    """Return a table from 16 bits of limited range, converted from RGB with `white` as its white, to samples of a video."""
    correction = white / 65_535
    zero, span = (128, 224) if chroma else (16, 219)
    top = 2**bits - 1
    if full_range:
        new_zero, new_span = (2 ** (bits - 1), top) if chroma else (0, top)
    else:
        new_zero, new_span = zero << bits - 8, span << bits - 8
    gain = new_span * correction / (256 * span)
    return _linear(65_536, gain, new_zero - 256 * zero * gain, top)


def _bits(pixels: VideoFormat) -> int:
    return min(max(component.bits for component in pixels.components), 16)  # floating point has 32


def _is_grey(pixels: VideoFormat) -> bool:
    return not is_rgb(pixels) and sum(not component.is_alpha for component in pixels.components) == 1
