"""Test that verify names what the training reader can't use, and that neither waits, crashes, or takes much memory or time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from shards import synthetic, verify
from shards.overlap import find_leaks
from shards.schema import INDEX_NAME, LARGEST_FRAME, MOST_SHARDS, ShardError, read_index, sha256_of, write_index
from vfi.data.bad_samples import FaultError
from vfi.data.shard_reader import ShardReader, decode_triplet

SHARD = "shard-000000.tar"
SIZE = 32, 40
SECONDS, KIB = 5, 500_000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "shards"
    synthetic.make(synthetic.Options(folder, samples=2, size="32x40", flow=False))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


@contextlib.contextmanager
def bounded():
    """End what takes longer than it may, and compare the growth of the largest memory with what it may be."""

    def end(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIB


def member(name, content=b"", kind=tarfile.REGTYPE, link="", layout=tarfile.GNU_FORMAT, size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content) if size is None else size
    return info.tobuf(layout) + content + bytes(-len(content) % 512)


def whole(parts):
    return b"".join(parts) + bytes(1024)


def renamed(rename):
    return lambda contents: whole(member(rename(name), content) for name, content in contents.items())


def replaced(extension, content):
    def change(contents):
        first = next(iter(contents)).partition(".")[0]
        return whole(member(name, content if name == f"{first}.{extension}" else old) for name, old in contents.items())

    return change


def in_place_of(extension, part):
    """Put other bytes of a tar in place of a member of the first sample."""

    def change(contents):
        first = next(iter(contents)).partition(".")[0]
        return whole(part(name) if name == f"{first}.{extension}" else member(name, old) for name, old in contents.items())

    return change


def before(part):
    return lambda contents: part + renamed(str)(contents)


def image(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def png_of(height, width):
    """A PNG that claims a size and holds nearly nothing."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    )
    bodies = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(bodies)


def comment(length):
    """The extended header of the next member, with a comment of this many bytes."""
    value = b"comment=" + b"c" * length + b"\n"
    digits = len(str(len(value) + 8))
    content = b"%d " % (len(value) + 1 + digits) + value
    return member("extended", content, tarfile.XHDTYPE)


ODD = {
    "absolute names": (renamed(lambda name: f"/data/{name}"), "'/data/synthetic-train-0-000000.json' is passed over"),
    "names with markup": (renamed(lambda name: f"<b>{name}</b>"), "'<b>synthetic-train-0-000000.json</b>' is passed over"),
    "a JPEG named PNG": (replaced("im2.png", image("jpeg")), "sample synthetic-train-0-000000: im2.png: it is not a png file"),
    "a GIF named PNG": (replaced("im2.png", image("gif")), "sample synthetic-train-0-000000: im2.png: it is not a png file"),
    "a long header": (before(comment(5 << 20)), "extended header of member 'extended' at byte 0 claims 5242"),
    "a claimed size": (
        in_place_of("im2.png", lambda name: member(name, size=1 << 40)),
        "member 'synthetic-train-0-000000.im2.png' at byte",
    ),
    "a link to nowhere": (
        in_place_of("im1.png", lambda name: member(name, kind=tarfile.LNKTYPE, link="nowhere")),
        "sample synthetic-train-0-000000: has .*im1.png",
    ),
    "links in a row": (
        before(b"".join(member(f"k.{n}", kind=tarfile.LNKTYPE, link=f"k.{n + 1}") for n in range(5000))),
        "more than 1,096 headers.*member .k.1096. at byte",
    ),
    "a large frame": (replaced("im2.png", png_of(9000, 9000)), "im2.png is 9000x9000 pixels, the index allows 32x40 … 32x40"),
    "a large member": (replaced("im2.png", bytes(4 << 20)), "im2.png has 4194304 bytes, too many for 32x40 pixels"),
}  # fmt: skip


def rewrite(folder, change):
    """Put other bytes in place of the shard, and describe them truly in the index."""
    path = folder / SHARD
    with tarfile.open(path) as tar:
        contents = {info.name: tar.extractfile(info).read() for info in tar}
    path.write_bytes(change(contents))
    index = read_index(folder)
    entry = dataclasses.replace(index.shards[0], bytes=path.stat().st_size, sha256=sha256_of(path))
    write_index(folder, dataclasses.replace(index, shards=(entry,)))


def read(folder):
    reader = ShardReader(folder, read_index(folder))
    return [decode_triplet(reader.read(number), reader.index) for number in range(2)]


@pytest.mark.parametrize("odd", ODD)
def test_odd_tars_are_named_by_both(folder, odd):
    change, message = ODD[odd]
    rewrite(folder, change)
    with bounded():
        problems = verify.verify(folder)
        with pytest.raises(FaultError, match=f"{SHARD}: .*{message}"):
            read(folder)
        with pytest.raises(ShardError, match=SHARD):
            find_leaks([folder], [folder])
    assert any(line.startswith(f"{SHARD}: ") for line in problems)
    assert re.search(message, "\n".join(problems))


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"clip": "c", "frames": [], "height": 1e999, "width": 1}', b" " * (2 << 20)]
)
def test_a_json_is_bounded_and_named(folder, content):
    """The reader needs no json of a sample."""
    rewrite(folder, replaced("json", content))
    with bounded():
        problems = verify.verify(folder)
        read(folder)
    assert len(problems) == 1
    assert problems[0].startswith(f"{SHARD}: sample synthetic-train-0-000000: ")
    assert "json" in problems[0]


def test_flow_with_a_nested_header_is_named(tmp_path):
    folder = tmp_path / "flow"
    synthetic.make(synthetic.Options(folder, samples=2, size="32x40"))
    header = b"-" * 5000 + b"1\n"
    rewrite(folder, replaced("flow_t0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header))
    index = read_index(folder)
    with bounded():
        assert "sample synthetic-train-0-000000: flow_t0.npy: it cannot be read" in verify.verify(folder)[0]
        reader = ShardReader(folder, index, with_flow=True)
        with pytest.raises(FaultError, match=r"flow_t0\.npy: it cannot be read"):
            decode_triplet(reader.read(0), index, with_flow=True)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_in_place_of_a_shard(folder, kind):
    path = folder / SHARD
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind](path)
    with bounded():
        assert verify.verify(folder)[0] == f"{SHARD}: cannot be read to its end: it is not a regular file"
        with pytest.raises(FaultError, match=rf"{SHARD}: cannot be read \(it is not a regular file\)"):
            read(folder)


def shards_of(count):
    entry = {"samples": 1, "bytes": 9, "sha256": ""}
    return [entry | {"name": str(number)} for number in range(count)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 1_000_000}, "1,000,000 frames a sample are out of range: 1 to 1,000"),
        ({"shards": shards_of(MOST_SHARDS + 1)}, "100,001 shards with 100,001 samples are too many for one folder"),
        ({"shards": [shards_of(1)[0] | {"samples": 10**12}]}, "1 shards with 1,000,000,000,000 samples are too many"),
        ({"shards": [shards_of(1)[0] | {"samples": "9"}]}, "of shard 0, samples and bytes must be whole numbers"),
        ({"shards": [shards_of(1)[0] | {"samples": -9}]}, "of shard 0, samples and bytes must be whole numbers"),
        ({"shards": {"a": 1}}, "cannot be used"),
        ({"max_size": [9000, 9000]}, f"frames of 9000x9000 pixels are out of range: 1 to {LARGEST_FRAME:,}"),
        ({"max_size": [8, 8]}, "whole numbers above 0 in their order"),
        ({"min_size": [1.5, "a"]}, "whole numbers above 0 in their order"),
        ({"min_size": 3}, "cannot be used"),
        ({"frames": True}, "whole numbers above 0 in their order"),
        ({"source": []}, "must be objects"),
        ({"clips": [[]]}, "clips names"),
        ({"clips": "c" * (40 << 20)}, "at most 33,554,432 are allowed: use several folders"),
        ({"clips": [{}] * 1_000_001}, "it holds too many objects"),
    ],
)  # fmt: skip
def test_an_index_that_claims_what_cannot_be(folder, changes, message):
    path = folder / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, separators=(",", ":")))
    with bounded():
        for use in (verify.verify, read_index):
            with pytest.raises(ShardError, match=f"index.json .*{message}"):
                use(folder)


def test_a_nested_index_is_damaged(folder):
    (folder / INDEX_NAME).write_text("[" * 100_000)
    with bounded(), pytest.raises(ShardError, match=r"index\.json is damaged"):
        verify.verify(folder)


def test_a_job_does_not_write_what_would_be_refused(tmp_path):
    with pytest.raises(ShardError, match="1,001 frames a sample are out of range"):
        synthetic.make(synthetic.Options(tmp_path / "out", samples=1, size="32x40", frames=1001, flow=False))
    assert not (tmp_path / "out").exists()
