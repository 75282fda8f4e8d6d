"""Read samples from tars: sample number -> bytes -> frames and, if requested, flow.

Whatever a tar or an image in it claims, nothing is written, nothing is run, and no more memory is taken than the index allows
for: headers are compared with the index first. What does not fit is a FaultError that names the sample. Training continues with
another sample (`usable_sample`), evaluation ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.codecs import decode, decode_flow, header_size
from shards.schema import Index, ShardEntry, ShardError, frame_members
from vfi.config.configs import SequenceKind
from vfi.data.bad_samples import BadSample, FaultError, FaultKind, printable
from vfi.data.shard_cache import ShardFolder, shard_folder
from vfi.data.tar_index import Member, TarError, plain_files
from vfi.data.triplet_sampling import Triplet, middle_triplet

FLOW_MEMBERS = ("flow_t0.npy", "flow_t1.npy")
_KNOWN_SHARDS = 1024  # tars whose table of contents a worker remembers (about 100 bytes a member)
_ATTEMPTS = 50  # samples that are tried in place of one that can't be used
_SPARE_BYTES = 1 << 20  # what the file of a frame may hold beside its pixels: headers, profiles, metadata

Places = dict[str, Member]
"""Extension -> a member and where it lies in its tar."""


class ShardReader:
    """Reads the needed members of samples by their numbers; remembers the tables of contents of the tars.

    `any_triplet`: other frames than the first, middle and last will be requested, too.
    """

    def __init__(
        self, folder: str | Path | ShardFolder, index: Index, with_flow: bool = False, any_triplet: bool = False
    ) -> None:
        self.folder, self.index, self.with_flow = shard_folder(folder), index, with_flow
        frames = frame_members(index.frames, index.codec) if any_triplet else triplet_members(index)
        self.needed = {*frames, *(FLOW_MEMBERS if with_flow else ())}
        self.expected = {"json", *frame_members(index.frames, index.codec), *FLOW_MEMBERS}
        # 12 bytes a pixel: float32 flow with its weight; 8 are 16-bit RGBA that could not be compressed at all
        self.largest = 12 * index.max_size[0] * index.max_size[1] + _SPARE_BYTES
        self.ends = np.cumsum([shard.samples for shard in index.shards])
        self.contents = functools.lru_cache(_KNOWN_SHARDS)(self._contents)

    def read(self, number: int, triplet: Triplet | None = None) -> dict[str, Any]:
        """Return `__key__`, `__number__`, `__where__`, and a member's bytes by extension; FaultError when it can't be read."""
        return self._read(number, {*triplet_members(self.index, triplet), *FLOW_MEMBERS})

    def read_all(self, number: int) -> dict[str, Any]:
        """Return the same with all frames of the sample; for a reader of `any_triplet`."""
        return self._read(number, {*frame_members(self.index.frames, self.index.codec)})

    def _read(self, number: int, wanted: set[str]) -> dict[str, Any]:
        shard = int(np.searchsorted(self.ends, number, side="right"))
        position = number - (int(self.ends[shard - 1]) if shard else 0)
        entry = self.index.shards[shard]
        key, places, is_first = self.contents(shard)[position]
        where = f"{self.folder}/{entry.name}: sample {printable(key)}"
        if not is_first:
            raise _fault("duplicate", where, "its key was there before in the same shard")
        sample: dict[str, Any] = {"__key__": key, "__number__": number, "__where__": where}
        try:
            with self.folder.open(entry) as file:
                for extension, member in places.items():
                    if extension in wanted:
                        sample[extension] = self._member(file, member, where, extension)
        except OSError as error:
            raise _fault("shard", where, f"cannot be read: {error}") from error
        return sample

    def _member(self, file: BinaryIO, member: Member, where: str, extension: str) -> bytes:
        """Return the content of a member."""
        if member.size > self.largest:
            height, width = self.index.max_size
            raise _fault("member", where, f"{extension} has {member.size} bytes, too many for {height}x{width} pixels")
        file.seek(member.offset)
        data = file.read(member.size)
        if len(data) < member.size:
            raise _fault("shard", where, f"{extension} ends after {len(data)} of its {member.size} bytes")
        return data

    def _contents(self, shard: int) -> list[tuple[str, Places, bool]]:
        """Return, for each sample of a tar, its key, its needed members, and whether its key appears for the first time."""
        entry = self.index.shards[shard]
        where = f"{self.folder}/{entry.name}"
        try:
            with self.folder.open(entry) as file:
                samples = self._samples(file, entry)
        except (OSError, TarError) as error:
            raise _fault("shard", where, f"cannot be read ({error}){self.folder.advice}") from error
        if len(samples) != entry.samples:
            more = " or more" if len(samples) > entry.samples else ""
            raise _fault(
                "shard", where, f"holds {len(samples)}{more} samples, its index says {entry.samples}{self.folder.advice}"
            )
        return samples

    def _samples(self, file: BinaryIO, entry: ShardEntry) -> list[tuple[str, Places, bool]]:
        """Group neighbouring members of one key into samples; plain files that the schema doesn't name are ignored."""
        samples: list[tuple[str, Places, bool]] = []
        keys, extensions = set[str](), set[str]()
        for member in plain_files(file):
            key, _, extension = member.name.partition(".")
            if "/" in key or extension not in self.expected:
                continue
            if not samples or samples[-1][0] != key or extension in extensions:
                if len(samples) > entry.samples:
                    break  # a tar that holds more than its index says is a fault already, however much more
                samples.append((key, {}, key not in keys))
                keys.add(key)
                extensions = set()
            extensions.add(extension)
            if extension in self.needed:
                samples[-1][1][extension] = member
        return samples


def triplet_members(index: Index, triplet: Triplet | None = None) -> tuple[str, str, str]:
    """Return the extensions of the frames of a triplet, by default the first, middle and last of a sample."""
    first, middle, last, _ = triplet or middle_triplet(index.frames)
    members = frame_members(index.frames, index.codec)
    return members[first], members[middle], members[last]


def decode_triplet(
    sample: dict[str, Any], index: Index, with_flow: bool = False, triplet: Triplet | None = None
) -> dict[str, Any]:
    """Add the `frames` of the triplet (default: first, middle, last), `[H, W, 3]` uint8, its `timestep` and its `flows`.

    Flows lead to the first and last frame, `[H, W, 3]`: dx, dy and a weight, 1 where none is stored; without `with_flow` there
    are none.

    FaultError names the sample that can't be decoded, or whose frames have a size that the index does not allow.
    """
    triplet = triplet or middle_triplet(index.frames)
    frames = [_decode_frame(sample, member, index) for member in triplet_members(index, triplet)]
    if len({frame.shape for frame in frames}) > 1:
        raise _fault("size", sample["__where__"], f"frames differ in size: {[frame.shape[:2] for frame in frames]}")
    size = frames[0].shape[:2]
    flows = [_decode_member("flow", sample, member, decode_flow, *size) for member in FLOW_MEMBERS] if with_flow else []
    weighted = [flow if flow.shape[2] == 3 else np.dstack((flow, np.ones(size, np.float32))) for flow in flows]
    return sample | {"frames": frames, "flows": weighted, "timestep": triplet.timestep}


def usable_sample(reader: ShardReader, number: int, seed: int, passes: int, triplet: Triplet | None = None) -> dict[str, Any]:
    """Return a decoded sample for `number` in a pass: that one or, if it can't be used, another one of its folder.

    The other one is drawn by (seed, pass, number, attempt), independently of ranks and workers. `faults` lists those that
    failed. Raises ShardError when all attempts failed.
    """
    faults: list[BadSample] = []
    for attempt in range(_ATTEMPTS):
        candidate = number
        if attempt and reader.index.samples > 1:
            others = reader.index.samples - 1
            candidate = (number + 1 + int(np.random.default_rng((seed, passes, number, attempt)).integers(others))) % (
                others + 1
            )
        try:
            sample = decode_triplet(reader.read(candidate, triplet), reader.index, reader.with_flow, triplet)
        except FaultError as error:
            faults.append(error.fault)
            continue
        return sample | {"faults": tuple(faults)}
    raise ShardError(
        f"{reader.folder}: {_ATTEMPTS} samples in a row can't be used, the last of them {faults[-1].where}: {faults[-1].why}"
    )


def _decode_frame(sample: dict[str, Any], name: str, index: Index) -> np.ndarray:
    """Decode a frame after checking its header."""
    extension = name.rpartition(".")[2]
    height, width = size = _decode_member("image", sample, name, header_size, extension)
    (lowest, narrowest), (highest, widest) = index.min_size, index.max_size
    if not (lowest <= height <= highest and narrowest <= width <= widest):
        allowed = f"{lowest}x{narrowest} … {highest}x{widest}"
        raise _fault("size", sample["__where__"], f"{name} is {height}x{width} pixels, the index allows {allowed}")
    return _decode_member("image", sample, name, functools.partial(decode, size=size), extension)


def _decode_member(kind: FaultKind, sample: dict[str, Any], name: str, decoder: Callable[..., Any], *arguments: Any) -> Any:
    """Decode a member of a sample with `decoder`."""
    if name not in sample:
        raise _fault("member", sample["__where__"], f"has no {name}")
    try:
        return decoder(sample[name], *arguments)
    except ShardError as error:
        raise _fault(kind, sample["__where__"], f"{name}: {error}") from error


def _fault(kind: FaultKind, where: str, why: str) -> FaultError:
    """Return a FaultError; names from a hostile file appear in `why` only in printable form."""
    return FaultError(BadSample(kind, where, printable(why)))


def check_has_middle(index: Index, folder: str | Path | ShardFolder, sequence: SequenceKind = "middle") -> None:
    """Raise ShardError when samples have no in-between frame, or (`middle`) none in the middle."""
    if index.frames < 3 or (sequence == "middle" and index.frames % 2 == 0):
        wanted = "an odd number from 3 up is needed, to have a middle one" if sequence == "middle" else "it takes 3 at least"
        raise ShardError(f"{folder} has {index.frames} frames a sample; {wanted}")
