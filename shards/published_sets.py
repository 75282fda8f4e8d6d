"""Shared conversion of the published sets: groups of frame files -> checks -> plan -> shards.

    def find(options: Options) -> ImageSet: ...      # all that the command of a set adds: where the frames of a sample are
    index = make("shards.ucf101", options, find)

Missing and unexpected files are reported before anything is written. A number of samples or a frame size other than the
published one gives a warning: such shards work, but results on them are not comparable with published ones.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shards import codecs, writer
from shards.cli import run_job
from shards.frame_sources import find_clips
from shards.schema import IMAGE_EXTENSIONS, Index, SampleMeta, ShardError

PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that the commands of all published sets share; each field is a flag of the command."""

    src: Path
    """Folder of the published set."""
    out: Path
    """Shard folder to write."""
    codec: str = "copy"
    """How frames are stored: copy (the PNG files unchanged), or recompressed as png, qoi or jpeg."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    samples_per_shard: int = writer.SAMPLES_PER_SHARD
    """Maximum number of samples per tar."""
    workers: int = 1
    """Number of processes; the bytes written do not depend on it."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The files of one sample, as paths below the source folder in order of time. `name` is unique in the set."""

    name: str
    clip: str
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame as stored in a shard. `name` is its name or number in the source, `size` is (height, width) in pixels."""

    name: str | int
    data: bytes
    size: tuple[int, int]


Reader = Callable[[Any, Group], Iterator[Frame]]  # options and a group -> its frames in order of time
AnyOptions = TypeVar("AnyOptions", bound=Options)


def read_files(options: Options, group: Group) -> Iterator[Frame]:
    """Yield the frames of a group of image files.

    Raises ShardError naming a file that cannot be decoded or is transparent, or that is no PNG with codec copy.
    """
    for file in group.files:
        path = options.src / file
        # decode even if the bytes are copied: a broken file must be found now, not in the middle of a training run
        data, frame = read_frame(path)
        if options.codec == "copy" and not data.startswith(PNG_START):
            raise ShardError(f"{path} is not a PNG file and can't be copied: choose codec png, qoi or jpeg")
        if options.codec != "copy":
            data = codecs.encode(frame, options.codec, options.quality)
        yield Frame(path.name, data, frame.shape[:2])


def read_frame(path: Path) -> tuple[bytes, np.ndarray]:
    """Return a file's bytes and its pixels, RGB uint8 [H, W, 3], of which 16 bits a channel become 8.

    Raises ShardError for one that cannot be decoded, and for transparent pixels.
    """
    data = path.read_bytes()
    frame = codecs.decode(data, path.suffix, str(path))
    codecs.check_opaque(data, str(path))
    return data, frame


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Content of a source folder, and the published number of samples and (height, width) of all frames to compare it with."""

    title: str  # for messages: 'the UCF101 set'
    split: str
    frames: int  # in a sample
    groups: Sequence[Group]
    published_samples: int
    published_size: tuple[int, int] | None = None
    read: Reader = read_files
    color_conversion: str | None = None  # set for frames that were decoded from videos


def make(job: str, options: AnyOptions, find: Callable[[AnyOptions], ImageSet]) -> Index:
    """Write the shard folder and return its index; a folder that is already complete is left as it is.

    Raises ShardError for unusable options, for a set with missing files (before anything is written), for a frame that
    cannot be read, and for an output folder that holds something else.
    """
    _check(options)
    found = find_set(find, options)
    _check_keys(found.groups)
    if len(found.groups) != found.published_samples:
        _warn(job, f"{found.title} has {len(found.groups):,} samples, the published one has {found.published_samples:,}")
    files = stat_files(options.src, found)
    arguments: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "workers")
    }
    source = writer.source_of(job, arguments | {"src": str(options.src.resolve())}, found.color_conversion)
    index = writer.write(options.out, _plan(options, found, source), writer.fingerprint(source, files), options.workers)
    size = found.published_size
    if size is not None and not index.min_size == index.max_size == size:
        _warn(job, f"frames of {found.title} are {_range(index)} pixels, the published ones {size[0]}x{size[1]}")
    return index


def find_set(find: Callable[[AnyOptions], ImageSet], options: AnyOptions) -> ImageSet:
    """Return what `find` does; its ShardError names the subfolder to give where the set lies in one, as in SET/SET."""
    try:
        return find(options)
    except ShardError as error:
        inside = [path for path in options.src.iterdir() if not path.name.startswith((".", "__"))]
        if any(path.suffix.lower() in IMAGE_EXTENSIONS for path in inside):
            raise
        deeper = []
        for folder in filter(Path.is_dir, inside):
            with contextlib.suppress(ShardError):
                find(dataclasses.replace(options, src=folder))
                deeper.append(folder)
        if len(deeper) != 1:
            raise
        raise ShardError(f"{options.src} holds the set one level deeper: give {shlex.quote(str(deeper[0]))}") from error


def main(
    options_type: type[AnyOptions],
    make_set: Callable[[AnyOptions], Index],
    program: str,
    description: str | None,
    argv: Sequence[str] | None,
) -> int:
    """Run the command of a set: parse flags, write the folder and print a summary. Returns the exit code."""

    def job(options: AnyOptions) -> int:
        print(writer.describe(options.out, make_set(options)))
        return 0

    return run_job(options_type, job, program, description, argv)


def check_split(split: str, known: Sequence[str]) -> None:
    """Raise ShardError for a split that the set does not have."""
    if split not in known:
        raise ShardError(f"unknown split {split!r}: choose one of {', '.join(known)}")


def scan(src: Path, folder: str, pattern: str, layout: str, kinds: frozenset[str] = IMAGE_EXTENSIONS) -> list[re.Match[str]]:
    """Match `pattern` with the paths, relative to `src`, of all files of these kinds below `folder`, in natural order.

    Raises ShardError when there are no such files or one does not match; `layout` tells the user what is expected.
    """
    if not (src / folder).is_dir():
        raise ShardError(f"source folder {src} has no folder {folder}: expected {layout}")
    paths = [path for clip in find_clips(src / folder) for path in clip.files() if path.suffix.lower() in kinds]
    names = [path.relative_to(src).as_posix() for path in paths]
    matches = [re.fullmatch(pattern, name) for name in names]
    unexpected = [name for name, match in zip(names, matches, strict=True) if match is None]
    if unexpected:
        raise ShardError(
            f"{len(unexpected):,} files in {src} are not part of the set: {writer.some(unexpected)}; expected {layout}; "
            "nothing was written: move them away"
        )
    if not matches:
        raise ShardError(f"source folder {src / folder} holds no frames of the set: expected {layout}")
    return [match for match in matches if match is not None]


def read_list(path: Path, pattern: str, example: str) -> list[re.Match[str]]:
    """Match `pattern` with the lines of a list, in order; blank lines are skipped, backslashes of Windows are slashes.

    The list is in UTF-8 or, by its byte-order mark, in UTF-16. Raises ShardError for an unreadable or empty list, and naming a
    line that does not match or is repeated.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        lines = [line.strip().replace("\\", "/") for line in text.splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"list {path} cannot be read ({error}): give the folder that holds the set and its lists") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line and not re.fullmatch(pattern, line):
            raise ShardError(f"{path} line {number}: {line!r} is not of the form {example}")
        if line in found:
            raise ShardError(f"{path} line {number}: {line} repeats line {found[line]}")
        if line:
            found[line] = number
    if not found:
        raise ShardError(f"list {path} is empty")
    return [match for line in found if (match := re.fullmatch(pattern, line))]


def key_of(name: str) -> str:
    """Return a group's key: its name with every character that a key can't hold replaced by an underscore."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _check(options: Options) -> None:
    if options.codec != "copy":
        codecs.check_codec(options.codec)
    codecs.check_quality(options.quality)
    if not options.src.is_dir():
        raise ShardError(f"source folder {options.src} does not exist")
    if options.out.resolve() == options.src.resolve() or options.src.resolve() in options.out.resolve().parents:
        raise ShardError(f"output {options.out} lies inside the source {options.src}: give a folder outside of it")


def _check_keys(groups: Sequence[Group]) -> None:
    names = collections.defaultdict(list)
    for group in groups:
        names[key_of(group.name)].append(group.name)
    for key, same in names.items():
        if len(same) > 1:
            raise ShardError(f"{writer.some(same)} would have the same key {key}: rename or remove one of them")


def _warn(job: str, difference: str) -> None:
    print(f"{job}: warning: {difference}: results are not comparable with published ones", file=sys.stderr)


def _range(index: Index) -> str:
    (low, left), (high, right) = index.min_size, index.max_size
    return f"{low}x{left}" + (f" to {high}x{right}" if index.min_size != index.max_size else "")


def stat_files(src: Path, found: ImageSet) -> list[tuple[str, os.stat_result]]:
    """Return every file with its stat result. Raises ShardError with the number of missing files and the first names."""
    stats, missing = [], {}
    for file in (file for group in found.groups for file in group.files):
        try:
            stats.append((file, (src / file).stat()))
        except (FileNotFoundError, NotADirectoryError):
            missing[file] = True  # as a dict, since a file can belong to several samples
    if missing:
        raise ShardError(
            f"{len(missing):,} frame files of {found.title} are missing in {src}: {writer.some(list(missing))}; "
            "nothing was written"
        )
    return stats


def _plan(options: Options, found: ImageSet, source: dict[str, Any]) -> writer.Plan:
    tasks = []
    for part in writer.chunks(len(found.groups), options.samples_per_shard):
        inside = found.groups[part.start : part.stop]
        samples = functools.partial(_samples, options, found.read, found.frames, inside)
        tasks.append(writer.ShardTask(f"{inside[0].name} to {inside[-1].name}", len(inside), samples))
    return writer.Plan(
        split=found.split,
        codec="png" if options.codec == "copy" else options.codec,
        frames=found.frames,
        has_flow=False,
        source=source,
        clips=tuple(dict.fromkeys(group.clip for group in found.groups)),
        shards=tuple(tasks),
    )


def _samples(options: Options, read: Reader, count: int, groups: Sequence[Group]) -> Iterator[writer.Sample]:
    for group in groups:
        frames = list(read(options, group))
        if len(frames) != count:
            raise ShardError(f"{group.name} has {len(frames)} frames instead of {count}")
        if len({frame.size for frame in frames}) > 1:
            raise ShardError(f"{group.name} has frames of different sizes: {sorted({frame.size for frame in frames})}")
        meta = SampleMeta(group.clip, tuple(frame.name for frame in frames), *frames[0].size)
        yield writer.Sample(key_of(group.name), meta, tuple(frame.data for frame in frames))
