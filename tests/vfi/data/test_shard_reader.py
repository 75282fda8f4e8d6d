"""Faults: whatever a shard holds, it is named and skipped, or ends evaluation; hostile files reach nothing but memory."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.codecs import encode
from shards.schema import Index, ShardError, printable, read_index
from vfi.config.configs import DataConfig
from vfi.data.bad_samples import BadSample, BadSampleCounts, BadSampleMonitor, FaultError, FaultRateError
from vfi.data.evaluation_loader import evaluation_batches
from vfi.data.loader import TrainingLoader
from vfi.data.shard_reader import ShardReader, decode_triplet, usable_sample

CPU = torch.device("cpu")
FRAME = np.random.default_rng(0).integers(0, 256, (72, 80, 3), dtype=np.uint8)


def rewrite(tar: Path, change) -> None:
    """Put what `change` makes of a tar's (info, content) pairs into its place."""
    with tarfile.open(tar) as old:
        members = [(info, old.extractfile(info).read()) for info in old]
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as new:
        for info, content in change(members):
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))


def with_content(name: str, content: bytes | None):
    """A member's content replaced; None: without that member."""
    return lambda members: [
        (info, content if info.name == name else old) for info, old in members if info.name != name or content is not None
    ]


def keys_of(folder: Path, shard: int) -> list[str]:
    with tarfile.open(folder / f"shard-{shard:06d}.tar") as tar:
        return list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))


@pytest.fixture
def folder(train_shards, tmp_path) -> Path:
    """A copy to damage: 22 samples in three shards."""
    return Path(shutil.copytree(train_shards, tmp_path / "copy"))


def batches(folder, count=5, start=None, rank=0, world=1, **changes):
    config = dataclasses.replace(DataConfig(data_path=(str(folder),), batch_size=4, crop=64, num_workers=0), **changes)
    loader = TrainingLoader(config, 3, CPU, accumulation=1, rank=rank, world=world)
    return list(itertools.islice(loader.batches(*([start] if start else [])), count))


def assert_same(one, other):
    assert (one.keys, one.faults) == (other.keys, other.faults)
    for name in ("img0", "imgt", "img1", "timestep"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*sizes: tuple[int, int], data: bytes = b"") -> bytes:
    """A PNG that claims these (width, height), one header after the other."""
    headers = b"".join(chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)) for size in sizes)
    return b"\x89PNG\r\n\x1a\n" + headers + chunk(b"IDAT", data or zlib.compress(bytes(1 << 24))) + chunk(b"IEND", b"")


UNUSABLE = [
    ("im2.png", None, "member", "has no im2.png"),
    ("im2.png", b"", "image", "im2.png: it is not a png file"),
    ("im2.png", b"junk" * 99, "image", "im2.png: it is not a png file"),
    ("im1.png", encode(FRAME, "png")[:3000], "image", "im1.png: image cannot be decoded as png"),
    ("im1.png", encode(FRAME, "jpeg"), "image", "im1.png: it is not a png file"),
    ("im3.png", encode(FRAME[:64], "png"), "size", "im3.png is 64x80 pixels, the index allows 72x80 … 72x80"),
    ("im3.png", png((50_000, 50_000)), "size", "im3.png is 50000x50000 pixels"),
    ("im3.png", png((80, 72), (20_000, 20_000)), "image", "im3.png: image cannot be decoded.*Image size|20000x20000 pixels"),
    ("im3.png", png((80, 72), (9_000, 9_000)), "image", "im3.png: image cannot be decoded as png: it is 9000x9000 pixels"),
    ("im1.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 72\n(x) run\n", "image", "im1.png: it is not a png file"),
    ("im2.png", bytes(4 << 20), "member", "im2.png has 4194304 bytes, too many for 72x80 pixels"),
]  # fmt: skip


@pytest.mark.parametrize(("member", "content", "kind", "why"), UNUSABLE)
def test_a_sample_that_cannot_be_used_is_named(folder, member, content, kind, why):
    key = keys_of(folder, 1)[2]
    rewrite(folder / "shard-000001.tar", with_content(f"{key}.{member}", content))
    with pytest.raises(ShardError, match=rf"copy/shard-000001\.tar: sample {key}: (?:{why})"):
        list(evaluation_batches(folder, CPU))
    found = [fault for batch in batches(folder) for fault in batch.faults]
    assert {(fault.kind, fault.where) for fault in found} == {(kind, f"{folder}/shard-000001.tar: sample {key}")}


def damage_shard(folder: Path, damage: str) -> None:
    path = folder / "shard-000001.tar"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "junk": bytes(range(256)) * 40, "truncated": whole[: len(whole) // 2],
                          "without its end": whole[:-1024], "compressed": zlib.compress(whole)}[damage])  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "a folder", "empty", "junk", "truncated", "compressed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_used_is_named(folder, damage, workers):
    intact = Counter(key for batch in batches(folder) for key in batch.keys)
    bad = set(keys_of(folder, 1))
    damage_shard(folder, damage)
    with pytest.raises(ShardError, match=r"copy/shard-000001\.tar: .*python -m shards\.verify"):
        list(evaluation_batches(folder, CPU, workers=workers))
    found = batches(folder, num_workers=workers)
    assert [len(batch.keys) for batch in found] == [4] * 5
    assert not {key for batch in found for key in batch.keys} & bad
    faults = [fault for batch in found for fault in batch.faults]
    assert {(fault.kind, fault.where) for fault in faults} == {("shard", f"{folder}/shard-000001.tar")}
    assert len(faults) >= sum(count for key, count in intact.items() if key in bad)


def test_a_tar_without_its_last_blocks_is_whole(folder):
    before = batches(folder)
    damage_shard(folder, "without its end")
    for one, other in zip(before, batches(folder), strict=True):
        assert_same(one, other)


def test_too_many_and_too_few_samples(folder):
    key = keys_of(folder, 1)[0]
    rewrite(folder / "shard-000001.tar", lambda members: [m for m in members if not m[0].name.startswith(key)])
    rewrite(folder / "shard-000000.tar", lambda members: members + members)
    reader = ShardReader(folder, read_index(folder))
    with pytest.raises(FaultError, match=r"shard-000000\.tar: holds \d+ or more samples, its index says \d+: run"):
        reader.read(0)
    with pytest.raises(FaultError, match=r"shard-000001\.tar: holds \d+ samples, its index says \d+: run"):
        reader.read(reader.ends[0])


def test_a_key_that_comes_again_is_a_fault_where_it_comes_again(folder):
    first, second, *_ = keys_of(folder, 1)

    def twice(members):
        for info, _ in members:
            info.name = info.name.replace(second, first)
        return members

    rewrite(folder / "shard-000001.tar", twice)
    reader = ShardReader(folder, read_index(folder))
    number = int(reader.ends[0])
    intact = reader.read(number)
    with pytest.raises(FaultError) as error:
        reader.read(number + 1)
    assert error.value.fault == BadSample("duplicate", intact["__where__"], "its key was there before in the same shard")
    assert reader.read(number + 2)["__key__"] not in (first, second)


def hostile(outside: Path):
    """Members that would reach out of the tar, around and between those of its samples."""

    def change(members):
        def member(name, kind=tarfile.REGTYPE, link="", content=b""):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.devmajor, info.devminor = kind, link, 1, 3
            return info, content

        bait = [
            member(str(outside / "absolute.im1.png"), content=b"x"),
            member(f"../../{outside.name}/up.im1.png", content=b"x"),
            member("/etc/passwd.json", content=b"x"),
            member("link.im1.png", tarfile.SYMTYPE, "/etc/passwd"),
            member("hard.im1.png", tarfile.LNKTYPE, "/etc/passwd"),
            member("null.im1.png", tarfile.CHRTYPE),
            member("disk.im1.png", tarfile.BLKTYPE),
            member("pipe.im1.png", tarfile.FIFOTYPE),
            member("folder.im1.png", tarfile.DIRTYPE),
            member("..", tarfile.DIRTYPE),
            member("n" * 300 + ".im1.png", tarfile.SYMTYPE, "l" * 300),
            member("script.py", content=b"raise SystemExit"),
            member("x" * 300 + ".pickle", content=b"x"),
            member("__init__.im9.png", content=b"x"),
        ]
        mixed = [pair for number, pair in enumerate(members) for pair in (bait[number % len(bait)], pair)]
        return [(info.replace(deep=True), content) for info, content in mixed]

    return change


def tree(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*")}


def test_members_that_reach_out_are_not_looked_at(folder, tmp_path):
    before = batches(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    for tar in folder.glob("*.tar"):
        rewrite(tar, hostile(outside))
    state = tree(tmp_path)
    for one, other in zip(before, batches(folder), strict=True):
        assert_same(one, other)
    assert len(list(evaluation_batches(folder, CPU, workers=1))) == 22
    assert tree(tmp_path) == state


def test_a_link_in_the_place_of_a_frame_is_no_frame(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(encode(FRAME, "png"))
    key = keys_of(folder, 0)[0]

    def link(members):
        for info, _ in members:
            if info.name == f"{key}.im2.png":
                info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        return [(info, b"" if info.issym() else content) for info, content in members]

    rewrite(folder / "shard-000000.tar", link)
    with pytest.raises(FaultError, match=r"has no im2\.png"):
        decode_triplet(ShardReader(folder, read_index(folder)).read(0), read_index(folder))


def index_of(codec: str) -> Index:
    return Index("train", codec, 3, (72, 80), (72, 80), False, {}, {}, {}, (), ())


def sample_of(codec: str, data: bytes) -> dict:
    extension = {"jpeg": "jpg"}.get(codec, codec)
    frames = {f"im{number}.{extension}": data for number in (1, 2, 3)}
    return {"__key__": "k", "__number__": 0, "__where__": "t: sample k"} | frames


def scans(count: int, **options: bool) -> bytes:
    """A JPEG whose picture is coded again and again."""
    buffer = io.BytesIO()
    Image.fromarray(FRAME).save(buffer, "jpeg", **options)
    data = buffer.getvalue()
    start = data.index(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def one_by_one(count: int) -> bytes:
    """A sequential JPEG with scans of its first component alone."""
    data = scans(1)
    header = data.index(b"\xff\xda")
    content = header + 2 + int.from_bytes(data[header + 2 : header + 4], "big")
    scan = b"\xff\xda\x00\x08\x01" + data[header + 5 : header + 7] + data[content - 3 : -2]
    return data[:header] + scan * count + data[-2:]


def jpeg_claiming(height: int, width: int) -> bytes:
    data = bytearray(encode(FRAME, "jpeg"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("codec", "data", "why"),
    [
        ("jpeg", jpeg_claiming(65_000, 65_000), "im1.jpg is 65000x65000 pixels"),
        ("jpeg", scans(5000), "Didn't expect more than one scan"),
        ("jpeg", scans(5000, progressive=True), "more than 100 scans"),
        ("jpeg", one_by_one(5000), "more than 100 scans"),
        ("jpeg", png((80, 72)), "it is not a jpg file"),
        ("jpeg", b"\xff\xd8\xff", "its header cannot be read"),
        ("qoi", b"qoif" + struct.pack(">IIBB", 60_000, 60_000, 3, 0) + bytes(8), "im1.qoi is 60000x60000 pixels"),
        ("qoi", b"qoif" + struct.pack(">IIBB", 80, 72, 3, 0) + bytes(8), "cannot be decoded as qoi"),
        ("png", png((80, 72)), None),  # pixels without end behind a true header: what is not asked for is not taken
        ("png", png((80, 72), (13_000, 13_000)), "cannot be decoded as png"),
        ("png", png((2**31 - 1, 2**31 - 1)), "2147483647x2147483647"),
    ],
)
def test_bombs_take_no_memory(codec, data, why):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if why is None:
        decode_triplet(sample_of(codec, data), index_of(codec))
    else:
        with pytest.raises(FaultError, match=why):
            decode_triplet(sample_of(codec, data), index_of(codec))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("codec", ["png", "jpeg", "qoi"])
def test_every_codec_is_read(codec):
    data = encode(FRAME, codec)
    frames = decode_triplet(sample_of(codec, data), index_of(codec))["frames"]
    expected = np.asarray(Image.open(io.BytesIO(data))) if codec == "jpeg" else FRAME
    assert all(np.array_equal(frame, expected) for frame in frames)


@pytest.mark.parametrize("codec", ["png", "jpeg", "qoi"])
def test_damaged_images_are_faults_and_nothing_else(codec):
    whole = encode(FRAME[:, :, :] // 64 * 64, codec)
    rng = np.random.default_rng(0)
    outcomes = Counter()
    for _ in range(400):
        data = bytearray(whole)
        places = rng.integers(0, len(data) if rng.random() < 0.5 else 120, rng.integers(1, 6))
        for place in places:
            data[place] = rng.integers(256)
        if codec == "png" and rng.random() < 0.8:  # with checksums that fit, or all ends there
            data = with_checksums(bytes(data))
        try:
            frames = decode_triplet(sample_of(codec, bytes(data)), index_of(codec))["frames"]
            assert frames[0].shape == (72, 80, 3)
            outcomes["used"] += 1
        except FaultError as error:
            outcomes[error.fault.kind] += 1
    assert outcomes["image"] > 20


def with_checksums(data: bytes) -> bytes:
    fixed, at = data[:8], 8
    while at + 8 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        if at + 12 + length > len(data):
            break
        fixed += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return fixed + data[at:]


@given(st.binary(max_size=300))
def test_junk_of_any_kind_is_a_fault(data):
    for codec, start in (("png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0P\0\0\0H"), ("jpeg", b"\xff\xd8"), ("qoi", b"qoif")):
        for content in (data, start + data):
            with pytest.raises(FaultError):
                decode_triplet(sample_of(codec, content), index_of(codec))


def damage_some(folder: Path) -> set[str]:
    """Three samples of different shards, in different ways; their keys."""
    bad = [keys_of(folder, shard)[3] for shard in range(3)]
    for shard, (key, content) in enumerate(zip(bad, (None, b"junk", encode(FRAME[:64], "png")), strict=True)):
        rewrite(folder / f"shard-{shard:06d}.tar", with_content(f"{key}.im1.png", content))
    return set(bad)


def test_a_replacement_depends_on_neither_workers_nor_ranks(folder):
    bad = damage_some(folder)
    whole = batches(folder, 12)
    assert {fault.kind for batch in whole for fault in batch.faults} == {"member", "image", "size"}
    assert not {key for batch in whole for key in batch.keys} & bad
    assert all(len(batch.keys) == len(batch.imgt) == 4 for batch in whole)
    for workers in (1, 3):
        for one, other in zip(whole, batches(folder, 12, num_workers=workers), strict=True):
            assert_same(one, other)
    by_rank = [batches(folder, 12, batch_size=2, rank=rank, world=2) for rank in range(2)]
    for one, first, second in zip(whole, *by_rank, strict=True):
        assert one.keys == first.keys + second.keys
        assert one.faults == first.faults + second.faults
        assert torch.equal(one.imgt, torch.cat([first.imgt, second.imgt]))


def test_only_the_places_of_bad_samples_change(folder):
    before = batches(folder, 12)
    bad = damage_some(folder)
    for one, other in zip(before, batches(folder, 12), strict=True):
        changed = [number for number in range(4) if one.keys[number] != other.keys[number]]
        assert changed == [number for number in range(4) if one.keys[number] in bad]
        same = [number for number in range(4) if number not in changed]
        assert torch.equal(one.imgt[same], other.imgt[same])


def test_replacements_differ_by_pass_and_seed(folder):
    reader = ShardReader(folder, read_index(folder))
    damage_some(folder)
    bad = 3
    chosen = {usable_sample(reader, bad, seed, passes)["__key__"] for seed in range(4) for passes in range(4)}
    assert len(chosen) > 8
    assert usable_sample(reader, bad, 1, 2)["__key__"] == usable_sample(reader, bad, 1, 2)["__key__"]


def test_a_folder_without_any_usable_sample_ends_training(folder):
    for tar in folder.glob("*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(ShardError, match=r"copy: 50 samples in a row can't be used, the last of them .*it is empty"):
        batches(folder, 1)


def test_names_that_a_hostile_file_chose_stay_on_their_line():
    text = printable("a\nerror: all is well\x1b[2J\udcff" + "x" * 1000)
    assert text.isprintable()
    assert len(text) == 300
    assert printable("clip 1: ümlaut") == "clip 1: ümlaut"


def test_an_error_survives_the_way_out_of_a_loader_process():
    error = FaultError(BadSample("image", "t.tar: sample k", "im1.png: it is not a png file"))
    assert type(error)(str(error)).args == error.args  # how torch raises it again
    assert str(pickle.loads(pickle.dumps(error))) == "t.tar: sample k: im1.png: it is not a png file"


def test_the_rate_is_that_of_all_processes_and_has_a_floor():
    fault = BadSample("image", "t.tar: sample k", "im1.png: it is not a png file")
    skipped, tally = BadSampleMonitor(0.01), BadSampleCounts()
    tally.add(4, [fault, fault])
    assert tally.reads == 6
    assert skipped.add([tally, BadSampleCounts(10, Counter({fault._replace(kind="shard"): 1}))]) == Counter(
        {fault: 2, fault._replace(kind="shard"): 1}
    )
    assert (skipped.reads, skipped.rate) == (16, 3 / 16)
    assert skipped.numbers() == {"reads": 16, "rate": 3 / 16, "shard": 1, "duplicate": 0, "member": 0, "image": 2, "size": 0,
                                 "flow": 0}  # fmt: skip
    skipped.check(fault)  # 3 of 16 is no more than 10 of 1000
    skipped.add([BadSampleCounts(1984, Counter({fault: 17}))])
    skipped.check(fault)  # 20 of 2000
    skipped.add([BadSampleCounts(1, Counter({fault: 1}))])
    with pytest.raises(
        FaultRateError, match=r"21 of 2001 samples read could not be used \(image 20, shard 1\).*0\.01.*sample k"
    ):
        skipped.check(fault)


def test_a_broken_shard_of_a_large_set_is_judged_against_an_epoch():
    """A bundle of lanes stays in a few shards for long: one of 200 that is missing is an eighth of what is read meanwhile."""
    fault = BadSample("shard", "t.tar", "missing")
    skipped = BadSampleMonitor(0.01, epoch=51_200)
    skipped.add([BadSampleCounts(2000, Counter({fault: 256}))])
    skipped.check(fault)
    skipped.add([BadSampleCounts(1000, Counter({fault: 257}))])
    with pytest.raises(FaultRateError, match="judged as of 51200 reads"):
        skipped.check(fault)
    hopeless = BadSampleMonitor(0.01, epoch=10**7)
    hopeless.add([BadSampleCounts(1000, Counter({fault: 501}))])
    with pytest.raises(FaultRateError):
        hopeless.check(fault)


def test_open_files_do_not_pile_up(folder):
    before = len(os.listdir("/proc/self/fd"))
    for damage in ("junk", "missing"):
        damage_shard(folder, damage)
        batches(folder, 8)
    assert len(os.listdir("/proc/self/fd")) <= before
