"""Verify that the tars of a shard folder match its index: hash every byte and decode every frame.

    python -m shards.verify data/mine/train --workers 8
    python -m shards.verify data/mine/train --against data/vimeo90k/test     # instead, find frames that are in both

Prints every problem and one summary line. Exit code 0: no problems; 1: problems; 2: not a shard folder. With --against, the
frames of the folders are compared with those of the test folders, pixel by pixel; a frame that is in both is a problem.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, BinaryIO

import tyro

from shards import overlap
from shards.cli import run_job
from shards.parallel import run
from shards.sample_rules import (
    FLOW_MEMBERS,
    MemberError,
    SampleMembers,
    count_problem,
    decode_flow_member,
    decode_frame,
    decode_meta,
    open_shard,
    read_member,
    samples_in,
)
from shards.schema import Index, ShardEntry, ShardError, frame_members, printable, read_index, sha256_of
from shards.tar_index import TarError


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command, one per field."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Shard folders to check."""
    against: tuple[Path, ...] = ()
    """Shard folders of test sets: report which of their frames are also in the folders, and check nothing else."""
    workers: int = 1
    """Number of processes."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """Findings in one shard."""

    problems: tuple[str, ...]
    keys: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # the different (height, width)


def verify(folder: Path, workers: int = 1) -> list[str]:
    """Return all problems of a shard folder; an empty list means none. Raises ShardError when it isn't a shard folder."""
    index = read_index(folder)
    listed = collections.Counter(entry.name for entry in index.shards)
    present = {name for name in os.listdir(folder) if name in listed or name.endswith(".tar")}
    problems = [f"{printable(name)}: is listed {count} times in the index" for name, count in listed.items() if count > 1]
    problems += [f"{printable(name)}: is in the index but not in the folder" for name in sorted(listed.keys() - present)]
    problems += [f"{printable(name)}: is in the folder but not in the index" for name in sorted(present - listed.keys())]
    entries = [entry for entry in index.shards if entry.name in present]
    check = functools.partial(check_shard, folder, dataclasses.replace(index, shards=(), clips=()))
    checked = run(check, entries, workers, name=lambda entry: entry.name, title=f"verify {folder.name}")
    for entry, result in zip(entries, checked, strict=True):
        problems += [f"{printable(entry.name)}: {problem}" for problem in result.problems]
    uses = collections.Counter(itertools.chain.from_iterable(result.keys for result in checked))
    problems += [f"key {printable(key)} is there {count} times" for key, count in uses.items() if count > 1]
    return problems + ([] if problems else _check_sizes(index, checked))


def check_shard(folder: Path, index: Index, entry: ShardEntry) -> Checked:
    """Compare one tar with its entry in the index, and check every sample."""
    problems: list[str] = []
    passed_over: list[str] = []
    keys, sizes = [], set[tuple[int, int]]()
    try:
        with open_shard(folder / entry.name) as file:
            size = file.seek(0, 2)
            if size != entry.bytes:
                problems.append(f"has {size:,} bytes, the index says {entry.bytes:,}")
            elif sha256_of(file) != entry.sha256:
                problems.append("its sha256 differs from the index: the content has changed")
            for sample in samples_in(file, index, entry, passed_over):
                keys.append(sample.key)
                problems += [
                    f"sample {printable(sample.key)}: {problem}" for problem in _check_sample(file, sample, index, sizes)
                ]
            problems += passed_over
            problems += filter(None, [count_problem(len(keys), entry, [])])
    except (TarError, OSError) as error:
        problems.append(f"cannot be read to its end: {error}")
    return Checked(tuple(problems), tuple(keys), tuple(sorted(sizes)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: check each folder, print problems and a summary. Returns the exit code."""
    return run_job(Options, _job, "shards.verify", __doc__, argv)


def _job(options: Options) -> int:
    if not options.folders:
        raise ShardError("give one shard folder or more")
    if options.against:
        return _compare(options)
    bad = 0
    for folder in options.folders:
        problems = verify(folder, options.workers)
        index = read_index(folder)
        for problem in problems:
            print(f"{folder}: {problem}")
        state = f"{len(problems)} problems" if problems else "good"
        state += f", colours by {index.color_conversion}" if index.color_conversion else ""
        print(f"{folder}: {state}; {index.samples:,} samples in {len(index.shards)} shards, {index.bytes / 1e6:,.1f} MB")
        bad += bool(problems)
    return 1 if bad else 0


def _compare(options: Options) -> int:
    for folder in (*options.folders, *options.against):
        if read_index(folder).codec == "jpeg":
            print(
                f"shards.verify: warning: {folder} holds JPEG frames, whose pixels differ from those they were made of: "
                "a frame that is in both sets is found only where both hold the same JPEG",
                file=sys.stderr,
            )
    found, frames = overlap.find_leaks(options.folders, options.against, options.workers)
    for leak in found:
        others = f" and {leak.copies - 1:,} more" if leak.copies > 1 else ""
        print(
            f"{leak.train.folder}: sample {leak.train.key} {leak.train.member} is also in {leak.test.folder}: "
            f"sample {leak.test.key} {leak.test.member}{others}"
        )
    samples = len({(leak.train.folder, leak.train.key) for leak in found})
    names = ", ".join(map(str, options.folders)), ", ".join(map(str, options.against))
    print(f"{names[0]}: {len(found):,} of {frames:,} frames, in {samples:,} samples, are also in {names[1]}")
    print("Compared are all pixels: the same picture at another size, cropped or compressed again is not found.")
    return 1 if found else 0


def _check_sample(file: BinaryIO, sample: SampleMembers, index: Index, sizes: set[tuple[int, int]]) -> list[str]:
    """Return the problems of one sample, and add the (height, width) that its json states to `sizes`."""
    frames = frame_members(index.frames, index.codec)
    expected = ["json", *frames, *(FLOW_MEMBERS if index.has_flow else ())]
    if list(sample.members) != expected:
        return [f"has the members {', '.join(sample.members)} instead of {', '.join(expected)}"]
    problems = []
    height = width = 0
    for name, member in sample.members.items():
        try:
            data = read_member(file, member, name, index)
            if name == "json":
                meta = decode_meta(data)
                height, width = meta.height, meta.width
                sizes.add((height, width))
                if len(meta.frames) != index.frames:
                    problems.append(f"its json names {len(meta.frames)} frames instead of {index.frames}")
            elif name in FLOW_MEMBERS:
                decode_flow_member(data, name, height, width)
            elif (found := decode_frame(data, name, index).shape[:2]) != (height, width):
                problems.append(f"{name} is {found[0]}x{found[1]} pixels, its json says {height}x{width}")
        except MemberError as error:
            problems.append(str(error))
            if name == "json":  # the others are compared with it
                break
    return problems


def _check_sizes(index: Index, checked: list[Checked]) -> list[str]:
    sizes = {size for result in checked for size in result.sizes}
    if not sizes:
        return ["the folder holds no samples"]
    heights, widths = zip(*sizes, strict=True)
    found = (min(heights), min(widths)), (max(heights), max(widths))
    if found != (index.min_size, index.max_size):
        return [f"frames have sizes from {found[0]} to {found[1]}, the index says {index.min_size} to {index.max_size}"]
    return []


if __name__ == "__main__":
    sys.exit(main())
