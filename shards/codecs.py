"""Encode and decode frames, always RGB uint8 [H, W, 3], as PNG, QOI (both lossless) or JPEG (4:4:4); decode flow from .npy.

data = encode(frame, "png")
frame = decode(data, "png")
frame = read_image(Path("frame_00.webp"))     # any supported kind of image file
"""

from __future__ import annotations

import io
import struct
import tokenize
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import qoi
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shards.schema import EXTENSION, ShardError

_MAX_SCANS = 100  # of a JPEG: encoders write 1 to 12; each is decoded over the whole image though it may take only 20 bytes
# errors of decoders for damaged images; Pillow's chunk readers also raise those of indexing and unpacking
_BROKEN = (ValueError, RuntimeError, OSError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
           struct.error, zlib.error, UnidentifiedImageError, Image.DecompressionBombError)  # fmt: skip
JPEG_ENCODER = "pillow"
"""Name of the encoder in index.json. It is not simplejpeg, the decoder, whose transform is coarse below quality 96."""
PNG_LEVEL = 4  # zlib level: within 3 % of the size of the default 6 at less than half of its time
_ORIENTATION = 0x0112  # of Exif
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS, _LONGEST_KEYWORD = (b"tEXt", b"zTXt", b"iTXt"), 80  # chunks of PNG that begin with a keyword and a zero byte
_EXIF_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of those that can state an orientation
_WITH_EXIF = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}
"""Orientation that Exif states -> what turns the pixels upright."""
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


def check_codec(codec: str) -> None:
    """Raise ShardError unless `codec` is one that shards may hold."""
    if codec not in EXTENSION:
        raise ShardError(f"unknown codec {codec!r}: choose one of {', '.join(EXTENSION)}")


def check_quality(quality: int) -> None:
    """Raise ShardError unless `quality` is a JPEG quality, 1 to 100."""
    if not 1 <= quality <= 100:
        raise ShardError(f"quality {quality} is out of range: JPEG quality goes from 1 to 100")


def encode(frame: np.ndarray, codec: str, quality: int = 95) -> bytes:
    """Compress an RGB uint8 frame [H, W, 3]. `quality` (1-100) applies to jpeg only; png and qoi are lossless."""
    check_codec(codec)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ShardError(f"a frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    frame = np.ascontiguousarray(frame)
    if codec == "qoi":
        return bytes(qoi.encode(frame))
    buffer = io.BytesIO()
    if codec == "jpeg":
        Image.fromarray(frame).save(buffer, "jpeg", quality=quality, subsampling="4:4:4")
    else:
        Image.fromarray(frame).save(buffer, "png", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def decode(data: bytes, extension: str, name: str = "image", size: tuple[int, int] | None = None) -> np.ndarray:
    """Decompress one frame to RGB uint8 [H, W, 3], contiguous.

    `extension` is the file extension with or without its dot ('png', '.jpg' …); errors call the image `name`; `size` is the
    (height, width) from `header_size`, and Pillow does not decode an image that turns out to have another one. Grey, palette,
    transparent (over black) and 16-bit images become 8-bit RGB. Raises ShardError for a broken image.
    """
    extension = extension.lower().lstrip(".")
    try:
        if extension in ("jpg", "jpeg") and simplejpeg.is_jpeg(data):
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
        if extension == "qoi":
            return np.ascontiguousarray(qoi.decode(data)[:, :, :3])
        with Image.open(io.BytesIO(data)) as image:
            if size and image.size[::-1] != size:  # Pillow uses the last header that it finds, not the first
                raise ValueError(f"it is {image.size[1]}x{image.size[0]} pixels instead of {size[0]}x{size[1]}")
            return _to_rgb(image)
    except _BROKEN as error:
        raise ShardError(f"{name} cannot be decoded as {extension}: {error}") from error


def header_size(data: bytes, extension: str) -> tuple[int, int]:
    """Return the (height, width) in the header of a png, qoi or jpg without decoding the image.

    Raises ShardError for anything else, even if Pillow could read it, and for images that take long to decode for their size.
    """
    if extension == "png" and data[:8] == _PNG and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
    elif extension == "qoi" and data[:4] == b"qoif" and len(data) >= 14:
        width, height = struct.unpack(">II", data[4:12])
    elif extension == "jpg" and data[:2] == b"\xff\xd8":
        if not _has_one_scan(data) and data.count(b"\xff\xda") > _MAX_SCANS:
            raise ShardError(f"it has more than {_MAX_SCANS} scans")
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise ShardError(f"its header cannot be read: {error}") from error
    else:
        raise ShardError(f"it is not a {extension} file")
    return height, width


def _has_one_scan(data: bytes) -> bool:
    """Return whether a JPEG is sequential with all components in its first scan, so that a decoder ignores any further one."""
    at, components = 2, 0
    while len(data) > at + 9 and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # a scan
            return data[at + 4] == components
        if marker in (0xC0, 0xC1):  # the sequential frames of libjpeg
            components = data[at + 9]
        elif length < 2 or not (marker == 0xC4 or marker > 0xDA):  # not a table or a comment, which have a length
            return False
        at += 2 + length
    return False


def decode_flow(data: bytes, height: int, width: int) -> np.ndarray:
    """Return the float32 [height, width, 2] or, with weights in 0..1, [height, width, 3] of a .npy file.

    Raises ShardError for anything else, for non-finite values and for other weights.

    The header is checked before memory is allocated. `np.load` is avoided, since it also opens archives and pickles, which can
    run code.
    """
    file = io.BytesIO(data)
    try:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, column_major, dtype = read_header[np.lib.format.read_magic(file)](file)
    except (
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        SyntaxError,
        tokenize.TokenError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ShardError(f"it cannot be read ({error!r})") from error
    if dtype != np.float32 or shape not in ((height, width, 2), (height, width, 3)):
        raise ShardError(
            f"it is {dtype} {list(shape)} instead of float32 {[height, width, 2]}, or with weights {[height, width, 3]}"
        )
    values = file.read()
    if column_major or len(values) != 4 * height * width * shape[2]:
        raise ShardError(f"it cannot be read (column-major: {column_major}, {len(values)} bytes of values)")
    flow = np.frombuffer(values, dtype).reshape(shape)
    if not np.isfinite(flow).all():
        raise ShardError("it has values that are not finite")
    if shape[2] == 3 and not ((flow[..., 2] >= 0) & (flow[..., 2] <= 1)).all():
        raise ShardError("it has weights that are not between 0 and 1")
    return flow


def read_image(path: Path) -> np.ndarray:
    """Read an image file to RGB uint8 [H, W, 3], upright. Raises ShardError naming the file when it is missing or broken."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error
    return turn_upright(decode(data, path.suffix, name=str(path)), io.BytesIO(data), path.suffix)


def check_opaque(data: bytes, name: str) -> None:
    """Raise ShardError, which calls the image `name`, where a pixel is transparent; an alpha channel alone is no matter."""
    with Image.open(io.BytesIO(data)) as image:
        if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise ShardError(f"{name} has transparent pixels, whose colours are not known: put it over a background first")


def turn_upright(pixels: np.ndarray, file: BinaryIO, extension: str) -> np.ndarray:
    """Turn the pixels [H, W, C] of an image file, open at any place, as its Exif orientation says, if it has one."""
    return np.ascontiguousarray(_UPRIGHT.get(_orientation(file, extension), np.asarray)(pixels))


def upright_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) of an image file once it is turned upright, from its head, or from the Exif behind its pixels.

    Raises OSError for a file that is missing, or is not an image.
    """
    with path.open("rb") as file:
        with Image.open(file) as image:
            width, height = image.size
        return (width, height) if _orientation(file, path.suffix) in _SIDEWAYS else (height, width)


def _orientation(file: BinaryIO, extension: str) -> int:
    if extension.lower() not in _WITH_EXIF or _is_png_without_exif(file):
        return 1
    file.seek(0)
    with Image.open(file) as image:
        try:
            orientation: int = image.getexif().get(_ORIENTATION, 1)
        except _BROKEN:  # only what describes the pixels is damaged: they are taken as they are stored
            return 1
    return orientation


def _is_png_without_exif(file: BinaryIO) -> bool:
    """Return whether a file is a PNG without a chunk that can state an orientation: Pillow decodes all of it to see that."""
    file.seek(0)
    if file.read(8) != _PNG:
        return False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = file.read(min(length, _LONGEST_KEYWORD)) if kind in _TEXTS else b""
        if kind == b"eXIf" or start.partition(b"\0")[0] in _EXIF_TEXTS:
            return False
        file.seek(length - len(start) + 4, io.SEEK_CUR)
    return True


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips 16-bit grey to 255 on conversion: scale instead, so that white stays white
        return np.repeat(_grey_to_8_bit(image)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert copies in any case


def _grey_to_8_bit(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = values * 255 if values.max(initial=0) <= 1 else values
    elif image.mode.startswith("I;16") or values.max(initial=0) > 255:
        values = values / 257  # 65535 -> 255
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
