"""Frames of a benchmark, read from the published folder or from shards of it: sample number -> frames.

Both give the same pixels: shards are accepted only if their codec is lossless. Missing files, and another number or size of
samples than published, are errors that name the difference; with `partial` another number or size is accepted, and the results
state it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shards.published_sets import find_set, key_of, read_frame, stat_files
from shards.schema import INDEX_NAME, Index, ShardError
from vfi.data.shard_cache import ShardFolder, shard_folder
from vfi.data.shard_reader import ShardReader
from vfi.errors import JobError
from vfi.evaluation.protocols import PROTOCOLS, Protocol
from vfi.model.interpolator import MIN_SIZE

_LOSSLESS = ("png", "qoi")


@dataclasses.dataclass(frozen=True)
class FrameSet:
    """The samples of a protocol, in the order of the published list."""

    keys: tuple[str, ...]
    read: Callable[[int], list[np.ndarray]]
    """Sample number -> its frames, `[H, W, 3]` uint8, checked."""
    differs: str
    """How the samples differ from the published set; empty if they do not."""


def open_frames(location: str, folder: ShardFolder, protocol: Protocol, partial: bool = False) -> FrameSet:
    """Open and check the data set at `location` (`folder`: the same location as shards). Raises JobError or ShardError."""
    path = Path(location)
    if path.is_dir() and not (path / INDEX_NAME).is_file():
        keys, read = _published(path, protocol)
    else:
        keys, read = _shards(folder, protocol)
    if len(keys) != protocol.count and not partial:
        raise JobError(
            f"--data {location} has {len(keys):,} samples of {protocol.title}, the published set has {protocol.count:,}: what "
            f"is measured on them can't be compared. Complete it, or use --allow_partial, which labels the results"
        )

    if not keys:
        raise JobError(f"--data {location} holds no samples of {protocol.title}")
    size, differs = protocol.size, [] if len(keys) == protocol.count else [f"{len(keys):,} of {protocol.count:,} samples"]
    if size and partial and (found := read(0)[0].shape[:2]) != size:
        differs.append(f"frames of {found[0]}x{found[1]} instead of {size[0]}x{size[1]}")
        size = found

    def checked(number: int) -> list[np.ndarray]:
        frames = read(number)
        sizes = sorted({frame.shape[:2] for frame in frames})
        if len(sizes) > 1:
            raise JobError(f"--data {location}: sample {keys[number]} has frames of different sizes: {sizes}")
        if min(sizes[0]) < MIN_SIZE:
            raise JobError(
                f"--data {location}: sample {keys[number]} is {sizes[0][0]}x{sizes[0][1]}: each side must be at least "
                f"{MIN_SIZE}; give a set of larger frames"
            )
        if size and sizes != [size]:
            raise JobError(
                f"--data {location}: sample {keys[number]} is {sizes[0][0]}x{sizes[0][1]}, the frames of {protocol.title} are "
                f"{size[0]}x{size[1]}; --allow_partial takes a set of another size, and labels the results"
            )
        return frames

    return FrameSet(tuple(keys), checked, ", ".join(differs))


def find_sets(root: Path) -> dict[str, Path]:
    """Find the protocols that a folder, or one up to two levels below it, has data for -> the first such place of each."""
    if not root.is_dir():
        raise JobError(f"--data_root {root} is not a folder")
    places = [root, *sorted(path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir())]
    found: dict[str, Path] = {}
    for name, protocol in PROTOCOLS.items():
        for place in places:
            if _is_of(place, protocol):
                found[name] = place
                break
    return found


def _is_of(place: Path, protocol: Protocol) -> bool:
    """Return whether the folder holds shards of the set, or is its published folder."""
    if (place / INDEX_NAME).is_file():
        source = shard_folder(place).read_index().source
        arguments = source.get("arguments", {})
        return source.get("job") == protocol.job and all(arguments.get(k) == v for k, v in protocol.arguments.items())
    return any(next(place.glob(sign), None) for sign in protocol.signs)


def _published(path: Path, protocol: Protocol) -> tuple[list[str], Callable[[int], list[np.ndarray]]]:
    """Read the set's published folder; missing files are named before anything is read."""
    job = importlib.import_module(protocol.job)
    found = find_set(job.find, job.Options(src=path, out=path, **protocol.arguments))
    stat_files(path, found)

    def read(number: int) -> list[np.ndarray]:
        return [read_frame(path / file)[1] for file in found.groups[number].files]

    return [key_of(group.name) for group in found.groups], read


def _shards(folder: ShardFolder, protocol: Protocol) -> tuple[list[str], Callable[[int], list[np.ndarray]]]:
    """Read shards that the set's command wrote with the arguments of this protocol."""
    index = folder.read_index()
    _check_source(folder, index, protocol)
    reader = ShardReader(folder, index, any_triplet=True)
    keys = [key for number in range(len(index.shards)) for key, _, _ in reader.contents(number)]
    return keys, reader.read_all


def _check_source(folder: ShardFolder, index: Index, protocol: Protocol) -> None:
    job, arguments = index.source.get("job"), index.source.get("arguments", {})
    flags = " ".join(f"--{name} {value}" for name, value in protocol.arguments.items())
    command = f"`python -m {protocol.job} --src SET --out SHARDS {flags}`".replace(" `", "`")
    if job != protocol.job or any(arguments.get(name) != value for name, value in protocol.arguments.items()):
        made = " ".join([str(job), *(f"--{name} {arguments[name]}" for name in protocol.arguments if name in arguments)])
        raise JobError(
            f"{folder} holds shards of {made}, not of {protocol.title}: make them by {command}, or give the set's own folder"
        )
    if index.codec not in _LOSSLESS:
        raise ShardError(f"{folder} holds {index.codec} frames, not the published pixels: make png shards by {command}")
    if index.frames != protocol.frames:
        raise ShardError(f"{folder} has {index.frames} frames a sample, {protocol.title} has {protocol.frames}")
