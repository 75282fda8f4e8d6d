"""Find the frames of a training set that are also in a test set, by a hash of the decoded pixels.

Names and PNG settings don't matter; a frame that was changed in any way, for example by JPEG compression, is another frame.

    leaks, frames = find_leaks([Path("shards/train")], [Path("shards/vimeo90k/test")], workers=8)

Each process reads one shard at a time; only the keys and 16 bytes per frame stay in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards import codecs
from shards.parallel import run
from shards.schema import ShardError, frame_members, read_index

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
    name: str
    samples: int
    members: tuple[str, ...]  # the frames of a sample


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
    members = tuple(frame_members(index.frames, index.codec))
    return [_Shard(folder, entry.name, entry.samples, members) for entry in index.shards]


def _task_name(shard: _Shard) -> str:
    return str(shard.folder / shard.name)


def _hash_shard(shard: _Shard) -> _Hashes:
    path = shard.folder / shard.name
    found: dict[str, list[str]] = {}
    digests = []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member) if extension in shard.members else None
                if content is not None:
                    found.setdefault(key, []).append(extension)
                    digests.append(_digest(content.read(), extension, member.name))
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{path} cannot be read to its end: {error}") from error
    if len(found) != shard.samples or any(tuple(members) != shard.members for members in found.values()):
        raise ShardError(f"{path} does not hold what its index says: run `python -m shards.verify {shard.folder}`")
    return _Hashes(tuple(found), b"".join(digests))


def _digest(data: bytes, extension: str, name: str) -> bytes:
    frame = codecs.decode(data, extension.rpartition(".")[2], name)
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
