"""Rules of what a sample of a shard may hold: the training reader and `shards.verify` read by the same ones.

Whatever a tar or an image in it claims, nothing is written, nothing is run, and no more memory is taken than the index allows
for: headers are compared with the index first. What does not fit is a MemberError, which the reader skips and verify reports.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from shards.codecs import decode, decode_flow, header_size
from shards.schema import LARGEST_META, Index, SampleMeta, ShardEntry, ShardError, frame_members, printable
from shards.tar_index import Member, members

FaultKind = Literal["shard", "duplicate", "member", "image", "size", "flow"]
"""shard: a tar that is missing or not what its index says; duplicate: a key that was there before; member: a file that is
missing or too large; image: not to be decoded; size: frames of another size; flow: not of the frame's size, or not finite."""
FLOW_MEMBERS = ("flow_t0.npy", "flow_t1.npy")
_SPARE_BYTES = 1 << 20  # what the file of a frame may hold beside its pixels: headers, profiles, metadata
_SHOWN = 20  # members of a tar that are named when they are passed over


class MemberError(ShardError):
    """Raised for a member of a sample that can't be used."""

    def __init__(self, kind: FaultKind, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class SampleMembers(NamedTuple):
    """A sample of a tar: its key, its members by extension in their order, and whether its key comes for the first time."""

    key: str
    members: dict[str, Member]
    is_first: bool


def open_shard(path: Path) -> BinaryIO:
    """Open a regular file; OSError for anything else: a pipe or a device would be waited for without end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def samples_in(
    file: BinaryIO, index: Index, entry: ShardEntry, passed_over: list[str], needed: Set[str] | None = None
) -> Iterator[SampleMembers]:
    """Yield the samples of a tar, each with its `needed` members (None: all): neighbouring members of one key.

    The first members that belong to no sample are added to `passed_over`, each with the reason. At most one sample more than
    the index says is yielded. Raises TarError, possibly after some samples.
    """
    expected = {"json", *frame_members(index.frames, index.codec), *FLOW_MEMBERS}
    most = 4 * (entry.samples + 1) * len(expected) + 1024  # a long name takes two headers more; foreign members are allowed
    sample, keys, extensions, count = SampleMembers("", {}, True), set[str](), set[str](), 0
    for member in members(file, most):
        key, _, extension = member.name.partition(".")
        why = member.kind and f"is {member.kind}, not a file"
        if not why and (not key or "/" in key):
            why = "its name is not KEY.EXTENSION, with a KEY without slashes"
        elif not why and extension not in expected:
            why = f"samples of {index.frames} {index.codec} frames have no such file"
        if why:
            if len(passed_over) < _SHOWN:
                passed_over.append(f"{printable(member.name)!r} is passed over: {why}")
            continue
        if not extensions or sample.key != key or extension in extensions:
            if extensions:
                yield sample
            count += 1
            if count > entry.samples + 1:
                return
            sample, extensions = SampleMembers(key, {}, key not in keys), set()
            keys.add(key)
        extensions.add(extension)
        if needed is None or extension in needed:
            sample.members[extension] = member
    if extensions:
        yield sample


def count_problem(found: int, entry: ShardEntry, passed_over: list[str]) -> str:
    """Return what is wrong with the number of samples that `samples_in` found; empty if nothing is."""
    if found == entry.samples:
        return ""
    more = " or more" if found > entry.samples else ""
    return f"holds {found}{more} samples, its index says {entry.samples}" + (f"; {passed_over[0]}" if passed_over else "")


def read_member(file: BinaryIO, member: Member, extension: str, index: Index) -> bytes:
    """Return the content of a member."""
    height, width = index.max_size
    # 12 bytes a pixel: float32 flow with its weight; 8 are 16-bit RGBA that could not be compressed at all
    if member.size > (LARGEST_META if extension == "json" else 12 * height * width + _SPARE_BYTES):
        raise MemberError("member", f"{extension} has {member.size} bytes, too many for {height}x{width} pixels")
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) < member.size:
        raise MemberError("shard", f"{extension} ends after {len(data)} of its {member.size} bytes")
    return data


def decode_frame(data: bytes, name: str, index: Index) -> np.ndarray:
    """Decode the frame of this member to RGB uint8 [H, W, 3], after checking its header."""
    extension = name.rpartition(".")[2]
    height, width = size = _decoded("image", name, header_size, data, extension)
    (lowest, narrowest), (highest, widest) = index.min_size, index.max_size
    if not (lowest <= height <= highest and narrowest <= width <= widest):
        allowed = f"{lowest}x{narrowest} … {highest}x{widest}"
        raise MemberError("size", f"{name} is {height}x{width} pixels, the index allows {allowed}")
    frame: np.ndarray = _decoded("image", name, functools.partial(decode, size=size), data, extension)
    return frame


def decode_flow_member(data: bytes, name: str, height: int, width: int) -> np.ndarray:
    """Decode the flow of this member, float32 [height, width, 2 or 3]."""
    flow: np.ndarray = _decoded("flow", name, decode_flow, data, height, width)
    return flow


def decode_meta(data: bytes) -> SampleMeta:
    """Return the content of a sample's json."""
    try:
        content = json.loads(data)
        meta = SampleMeta(content["clip"], tuple(content["frames"]), content["height"], content["width"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MemberError("member", f"its json cannot be used ({error!r})") from error
    if not isinstance(meta.height, int) or not isinstance(meta.width, int):
        raise MemberError("member", "its json cannot be used (height and width are not whole numbers)")
    return meta


def _decoded(kind: FaultKind, name: str, decoder: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return decoder(*arguments)
    except ShardError as error:
        raise MemberError(kind, f"{name}: {error}") from error
