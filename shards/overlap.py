"""Find the frames of a training set that are also in a test set, by a hash of the decoded pixels.

Names and PNG settings don't matter; a frame that was changed in any way, for example by JPEG compression, is another frame.

    leaks, frames = find_leaks([Path("data/train")], [Path("data/vimeo90k/test")], workers=8)

Each process reads one shard at a time; only the keys and 16 bytes per frame stay in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from shards.parallel import run
from shards.sample_rules import MemberError, count_problem, decode_frame, open_shard, read_member, samples_in
from shards.schema import Index, ShardEntry, ShardError, frame_members, printable, read_index
from shards.tar_index import TarError

_DIGEST = 16  # bytes


@dataclasses.dataclass(frozen=True)
class Place:
    """Location of a frame; `member` is its extension in the tar, such as 'im2.png'."""

    folder: Path
    key: str
    member: str


@dataclasses.dataclass(frozen=True)
class Leak:
    """A frame of the training set and the first of its `copies` identical frames in the test set."""

    train: Place
    test: Place
    copies: int


@dataclasses.dataclass(frozen=True)
class _Shard:
    folder: Path
    entry: ShardEntry
    index: Index = dataclasses.field(compare=False)  # without its shards and clips

    @property
    def path(self) -> Path:
        return self.folder / self.entry.name

    @property
    def members(self) -> list[str]:
        """The frames of a sample."""
        return frame_members(self.index.frames, self.index.codec)


@dataclasses.dataclass(frozen=True)
class _Hashes:
    """The keys of a shard's samples, and the concatenated digests of their frames."""

    keys: tuple[str, ...]
    digests: bytes


def find_leaks(train: Sequence[Path], test: Sequence[Path], workers: int = 1) -> tuple[list[Leak], int]:
    """Return every frame of the `train` folders that is also in a `test` folder, and the number of frames in `train`.

    Raises ShardError for a folder without an index and for a shard that cannot be read.
    """
    shards = {folder: _shards(folder) for folder in dict.fromkeys((*test, *train))}
    tasks = [shard for folder in shards for shard in shards[folder]]
    hashes = dict(zip(tasks, run(_hash_shard, tasks, workers, name=_task_name, title="hash frames"), strict=True))
    known: dict[bytes, tuple[Place, int]] = {}
    for folder in dict.fromkeys(test):
        for digest, place in _places(shards[folder], hashes):
            first, copies = known.get(digest, (place, 0))
            known[digest] = first, copies + 1
    leaks, frames = [], 0
    for folder in dict.fromkeys(train):
        for digest, place in _places(shards[folder], hashes):
            frames += 1
            if digest in known:
                leaks.append(Leak(place, *known[digest]))
    return leaks, frames


def _shards(folder: Path) -> list[_Shard]:
    index = read_index(folder)
    bare = dataclasses.replace(index, shards=(), clips=())
    return [_Shard(folder, entry, bare) for entry in index.shards]


def _task_name(shard: _Shard) -> str:
    return str(shard.path)


def _hash_shard(shard: _Shard) -> _Hashes:
    keys, digests = [], []
    passed_over: list[str] = []
    advice = f"run `python -m shards.verify {shard.folder}`"
    try:
        with open_shard(shard.path) as file:
            for sample in samples_in(file, shard.index, shard.entry, passed_over, {*shard.members}):
                if list(sample.members) != shard.members or not sample.is_first:
                    raise ShardError(f"{shard.path}: sample {printable(sample.key)} is not whole: {advice}")
                keys.append(sample.key)
                for name, member in sample.members.items():
                    digests.append(_digest(decode_frame(read_member(file, member, name, shard.index), name, shard.index)))
    except (TarError, OSError) as error:
        raise ShardError(f"{shard.path} cannot be read to its end: {error}") from error
    except MemberError as error:
        raise ShardError(f"{shard.path}: sample {printable(sample.key)}: {error}: {advice}") from error
    if problem := count_problem(len(keys), shard.entry, passed_over):
        raise ShardError(f"{shard.path} {problem}: {advice}")
    return _Hashes(tuple(keys), b"".join(digests))


def _digest(frame: np.ndarray) -> bytes:
    digest = hashlib.blake2b(repr(frame.shape).encode(), digest_size=_DIGEST)
    digest.update(frame.data)
    return digest.digest()


def _places(shards: Sequence[_Shard], hashes: dict[_Shard, _Hashes]) -> Iterator[tuple[bytes, Place]]:
    """Yield the digest and location of every frame."""
    for shard in shards:
        found = hashes[shard]
        places = ((key, member) for key in found.keys for member in shard.members)
        for number, (key, member) in enumerate(places):
            yield found.digests[number * _DIGEST : (number + 1) * _DIGEST], Place(shard.folder, key, member)
