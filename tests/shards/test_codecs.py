"""Test that frames survive encoding and decoding, and that unusual images become 8-bit RGB."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn, idctn
from sources import panning

from shards import codecs
from shards.schema import EXTENSION, ShardError


@pytest.mark.parametrize("codec", ["png", "qoi"])
def test_lossless_codecs_are_exact(codec):
    frame = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    back = codecs.decode(codecs.encode(frame, codec), EXTENSION[codec])
    assert back.dtype == np.uint8
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, frame)


def test_jpeg_is_close_keeps_full_colour_and_follows_quality():
    frame = panning(1)[0]
    data = codecs.encode(frame, "jpeg", quality=95)
    assert np.abs(codecs.decode(data, "jpg").astype(int) - frame).mean() < 1.5
    with Image.open(io.BytesIO(data)) as image:
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # 4:4:4
    assert len(codecs.encode(frame, "jpeg", quality=50)) < len(data)


@pytest.mark.parametrize("quality", [85, 95, 98])
def test_jpeg_loses_what_its_quality_says_and_no_more(quality):
    """Compare with a float64 transform that uses the same quantization tables."""
    rng = np.random.default_rng(0)
    frame = np.clip(np.repeat(np.repeat(panning(1)[0], 2, 0), 2, 1) + rng.normal(0, 4, (128, 192, 3)), 0, 255).astype(np.uint8)
    data = codecs.encode(frame, "jpeg", quality)
    with Image.open(io.BytesIO(data)) as image:
        tables = [np.array(image.quantization[0 if number == 0 else 1]).reshape(8, 8) for number in range(3)]
    to_ycc = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # of JFIF
    planes = np.rint(frame @ to_ycc.T + [-128, 0, 0])
    blocks = planes.reshape(16, 8, 24, 8, 3).transpose(0, 2, 4, 1, 3)
    kept = np.stack([np.rint(dctn(blocks[:, :, n], axes=(2, 3), norm="ortho") / t) * t for n, t in enumerate(tables)], 2)
    back = np.rint(idctn(kept, axes=(3, 4), norm="ortho")).transpose(0, 3, 1, 4, 2).reshape(128, 192, 3)
    reference = np.clip(np.rint((back + np.array([128, 0, 0])) @ np.linalg.inv(to_ycc).T), 0, 255)

    def psnr(image):
        return 10 * np.log10(255**2 / np.mean((image.astype(float) - frame) ** 2))

    assert psnr(codecs.decode(data, "jpg")) > psnr(reference) - 0.1


def test_rgb_order_survives():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 250
    for codec, extension in EXTENSION.items():
        assert codecs.decode(codecs.encode(red, codec), extension)[8, 8].argmax() == 0


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 3), 77), (77, 77, 77)),
        (Image.new("LA", (4, 3), (100, 255)), (100, 100, 100)),
        (Image.new("RGBA", (4, 3), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (4, 3), (10, 20, 30, 0)), (0, 0, 0)),
        (Image.new("1", (4, 3), 1), (255, 255, 255)),
        (Image.new("RGB", (4, 3), (1, 2, 3)).quantize(4), (1, 2, 3)),
        (Image.fromarray(np.full((3, 4), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((3, 4), 257 * 100, np.uint16)), (100, 100, 100)),
    ],
)
def test_other_kinds_of_png_become_rgb(image, expected, tmp_path):
    image.save(tmp_path / "image.png")
    frame = codecs.read_image(tmp_path / "image.png")
    assert frame.shape == (3, 4, 3)
    assert frame.dtype == np.uint8
    assert tuple(frame[1, 1]) == expected


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _png_with(frame: np.ndarray, kind: bytes, content: bytes, behind: bool) -> bytes:
    """A PNG with a chunk before or behind its pixels."""
    data = codecs.encode(frame, "png")
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    at = len(data) - 12 if behind else 33
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"eXIf", _exif(6).removeprefix(b"Exif\0\0")),
        (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(_exif(6)) + _exif(6).hex().encode())),
    ],
)
def test_a_png_is_turned_upright_wherever_and_however_it_says_so(tmp_path, kind, content, behind):
    frame = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    path.write_bytes(_png_with(frame, kind, content, behind))
    assert np.array_equal(codecs.read_image(path), np.rot90(frame, -1))
    assert codecs.upright_size(path) == (9, 6)


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, orientation):
    Image.new("RGB", (9, 6)).save(tmp_path / "image.jpg", exif=_exif(orientation))
    assert codecs.read_image(tmp_path / "image.jpg").shape == (6, 9, 3)
    assert codecs.upright_size(tmp_path / "image.jpg") == (6, 9)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_image_with_damaged_exif_is_read_as_it_is_stored(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    Image.new("RGB", (9, 6)).save(path, exif=b"Exif\0\0of something else")
    assert codecs.read_image(path).shape == (6, 9, 3)
    assert codecs.upright_size(path) == (6, 9)


def test_the_size_of_a_png_is_read_without_its_pixels(tmp_path):
    data = bytearray(_png_with(np.zeros((6, 9, 3), np.uint8), b"tEXt", b"Software\0camera", behind=False))
    at = data.index(b"IDAT") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "image.png").write_bytes(data)
    with pytest.raises(ShardError):
        codecs.read_image(tmp_path / "image.png")
    assert codecs.upright_size(tmp_path / "image.png") == (6, 9)


@pytest.mark.parametrize("extension", ["png", "jpg", "qoi", "webp"])
@pytest.mark.parametrize("data", [b"", b"junk that is no image at all"])
def test_junk_is_named(extension, data):
    with pytest.raises(ShardError, match=f"frame seven cannot be decoded as {extension}"):
        codecs.decode(data, extension, "frame seven")


@pytest.mark.parametrize("codec", ["png", "jpeg", "qoi"])
def test_a_cut_off_image_is_an_error(codec):
    data = codecs.encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), codec)
    with pytest.raises(ShardError):
        codecs.decode(data[: len(data) // 2], EXTENSION[codec])


def test_a_qoi_that_ends_anywhere_before_its_end_is_an_error():
    data = codecs.encode(panning(1)[0], "qoi")
    for length in (0, 13, 14, 15, len(data) // 4, len(data) - 9, len(data) - 8, len(data) - 1):
        with pytest.raises(ShardError, match="cannot be decoded as qoi"):
            codecs.decode(data[:length], "qoi")


def test_wrong_frames_codecs_and_files_are_refused(tmp_path):
    with pytest.raises(ShardError, match="uint8"):
        codecs.encode(np.zeros((4, 4, 3), np.float32), "png")
    with pytest.raises(ShardError, match="png, qoi, jpeg"):
        codecs.encode(np.zeros((4, 4, 3), np.uint8), "gif")
    with pytest.raises(ShardError, match="absent"):
        codecs.read_image(tmp_path / "absent.png")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_flow_is_what_numpy_wrote():
    flow = np.random.default_rng(0).normal(size=(5, 7, 2)).astype(np.float32)
    assert np.array_equal(codecs.decode_flow(npy(flow), 5, 7), flow)


def test_damaged_flow_is_a_clear_error_whatever_the_damage():
    """Any changed header byte, and truncation to any length, gives a ShardError or exactly the same shape."""
    rng = np.random.default_rng(0)
    whole = npy(np.zeros((5, 7, 2), np.float32))
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [whole[:at] + bytes([int(rng.integers(256))]) + whole[at + 1 :] for at in range(128) for _ in range(20)]
    refused = 0
    for data in damaged:
        try:
            assert codecs.decode_flow(data, 5, 7).shape == (5, 7, 2)
        except ShardError:
            refused += 1
    assert refused > 0.5 * len(damaged)


def test_flow_of_a_terabyte_takes_no_memory():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 17, 2)})
    with pytest.raises(ShardError, match="instead of float32"):
        codecs.decode_flow(header.getvalue(), 5, 7)


def test_chunk_that_pillow_stumbles_over_is_a_clear_error():
    """For an empty colour profile after the pixels, Pillow's reader of that chunk raises an IndexError."""
    whole = codecs.encode(np.zeros((4, 5, 3), np.uint8), "png")
    end = whole.index(b"IEND") - 4
    chunk = b"\x00\x00\x00\x01" + b"iCCP" + b"\x00" + zlib.crc32(b"iCCP\x00").to_bytes(4, "big")
    with pytest.raises(ShardError, match="cannot be decoded"):
        codecs.decode(whole[:end] + chunk + whole[end:], "png")
