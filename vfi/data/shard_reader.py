"""Read samples from tars: sample number -> bytes -> frames and, if requested, flow.

What a sample may hold is said by shards/sample_rules.py. What does not fit is a FaultError that names the sample. Training
continues with another sample (`usable_sample`), evaluation ends.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from shards.sample_rules import (
    FLOW_MEMBERS,
    FaultKind,
    MemberError,
    SampleMembers,
    count_problem,
    decode_flow_member,
    decode_frame,
    read_member,
    samples_in,
)
from shards.schema import Index, ShardError, frame_members, printable
from shards.tar_index import TarError
from vfi.config.configs import SequenceKind
from vfi.data.bad_samples import BadSample, FaultError
from vfi.data.shard_cache import ShardFolder, shard_folder
from vfi.data.triplet_sampling import Triplet, middle_triplet

_KNOWN_SHARDS = 1024  # tars whose table of contents a worker remembers (about 100 bytes a member)
_ATTEMPTS = 50  # samples that are tried in place of one that can't be used


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
        self.ends = np.cumsum([shard.samples for shard in index.shards])
        self.contents = functools.lru_cache(_KNOWN_SHARDS)(self._contents)

    def read(self, number: int, triplet: Triplet | None = None) -> dict[str, Any]:
        """Return `__key__`, `__number__`, `__where__`, and a member's bytes by extension; FaultError when it can't be read."""
        return self._read(number, {*triplet_members(self.index, triplet), *FLOW_MEMBERS})

    def read_all(self, number: int) -> list[np.ndarray]:
        """Return all frames of the sample, `[H, W, 3]` uint8 each; for a reader of `any_triplet`."""
        names = frame_members(self.index.frames, self.index.codec)
        sample = self._read(number, {*names})
        try:
            return [decode_frame(_content(sample, name), name, self.index) for name in names]
        except MemberError as error:
            raise _fault(error.kind, sample["__where__"], str(error)) from error

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
                        sample[extension] = read_member(file, member, extension, self.index)
        except MemberError as error:
            raise _fault(error.kind, where, str(error)) from error
        except OSError as error:
            raise _fault("shard", where, f"cannot be read: {error}") from error
        return sample

    def _contents(self, shard: int) -> list[SampleMembers]:
        """Return the samples of a tar with their needed members."""
        entry = self.index.shards[shard]
        where = f"{self.folder}/{entry.name}"
        passed_over: list[str] = []
        try:
            with self.folder.open(entry) as file:
                samples = list(samples_in(file, self.index, entry, passed_over, self.needed))
        except (OSError, TarError) as error:
            raise _fault("shard", where, f"cannot be read ({error}){self.folder.advice}") from error
        if problem := count_problem(len(samples), entry, passed_over):
            raise _fault("shard", where, problem + self.folder.advice)
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
    try:
        frames = [decode_frame(_content(sample, name), name, index) for name in triplet_members(index, triplet)]
        if len({frame.shape for frame in frames}) > 1:
            raise MemberError("size", f"frames differ in size: {[frame.shape[:2] for frame in frames]}")
        size = frames[0].shape[:2]
        names = FLOW_MEMBERS if with_flow else ()
        flows = [decode_flow_member(_content(sample, name), name, *size) for name in names]
    except MemberError as error:
        raise _fault(error.kind, sample["__where__"], str(error)) from error
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


def _content(sample: dict[str, Any], name: str) -> bytes:
    if name not in sample:
        raise MemberError("member", f"has no {name}")
    data: bytes = sample[name]
    return data


def _fault(kind: FaultKind, where: str, why: str) -> FaultError:
    """Return a FaultError; names from a hostile file appear in `why` only in printable form."""
    return FaultError(BadSample(kind, where, printable(why)))


def check_has_middle(index: Index, folder: str | Path | ShardFolder, sequence: SequenceKind = "middle") -> None:
    """Raise ShardError when samples have no in-between frame, or (`middle`) none in the middle."""
    if index.frames < 3 or (sequence == "middle" and index.frames % 2 == 0):
        wanted = "an odd number from 3 up is needed, to have a middle one" if sequence == "middle" else "it takes 3 at least"
        raise ShardError(f"{folder} has {index.frames} frames a sample; {wanted}")
