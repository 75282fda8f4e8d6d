"""Images of 16 bits a channel, which Pillow reads and writes in 8: PNG and TIFF, by FFmpeg's codecs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext

from shards.codecs import read_image, turn_upright
from shards.schema import ShardError

_ENCODERS = {".png": ("png", "rgb48be"), ".tif": ("tiff", "rgb48le"), ".tiff": ("tiff", "rgb48le")}
DEEP_OUTPUTS = tuple(_ENCODERS)
"""Endings of files that hold 16 bits a channel."""
_GREY, _COLOUR = ("gray16", "ya16"), ("rgb48", "rgba64")


def read_deep(path: Path) -> np.ndarray | None:
    """Read an image of 16 bits a channel to RGB uint16 [H, W, 3], upright and without its transparency.

    Returns None for a file of another kind. ShardError names one that is damaged.
    """
    if path.suffix.lower() not in _ENCODERS:
        return None
    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            if not container.streams.video:
                return None
            kind = (container.streams.video[0].codec_context.pix_fmt or "").removesuffix("be").removesuffix("le")
            if kind not in (*_GREY, *_COLOUR):
                return None
            read_image(path)  # raises for a damaged file, of which FFmpeg decodes what is left
            values = next(container.decode(video=0)).to_ndarray().astype(np.uint16)
    except StopIteration:
        return None
    except (av.FFmpegError, OSError) as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from error
    if kind in _GREY:
        values = np.repeat(values.reshape(*values.shape[:2], -1)[:, :, :1], 3, axis=2)
    with path.open("rb") as file:
        return turn_upright(values[:, :, :3], file, path.suffix)


def write_deep(path: Path, image: np.ndarray) -> None:
    """Write RGB uint16 [H, W, 3] as PNG or TIFF, by the name's ending."""
    encoder, pix_fmt = _ENCODERS[path.suffix.lower()]
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, VideoCodecContext)
    context.height, context.width, context.pix_fmt, context.time_base = *image.shape[:2], pix_fmt, Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=pix_fmt)
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None))))
