"""How does the published Vimeo90K set become shards? Triplets and septuplets, the PNG files copied bit for bit.

    python -m shards.vimeo90k --src vimeo_triplet --out shards/vimeo90k/train --kind triplet --split train --workers 8
    python -m shards.vimeo90k --src vimeo_septuplet --out shards/septuplet/test --kind septuplet --split test

Layout of the set (http://toflow.csail.mit.edu): sequences/<a>/<b>/im1.png … and tri_trainlist.txt, tri_testlist.txt or
sep_trainlist.txt, sep_testlist.txt, one `<a>/<b>` a line. All files are looked for before anything is written. A septuplet
sample holds all seven frames. Copied PNG frames are slower to read than qoi or jpeg: --codec makes those instead.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards import images, writer
from shards.cli import run_job
from shards.schema import Index, SampleMeta, ShardError

FRAMES = {"triplet": 3, "septuplet": 7}
EXPECTED = {  # sequences in the published lists
    ("triplet", "train"): 51_312,
    ("triplet", "test"): 3_782,
    ("septuplet", "train"): 64_612,
    ("septuplet", "test"): 7_824,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What `make` needs; each field is a flag of the job."""

    src: Path
    """Folder with sequences/ and the lists."""
    out: Path
    """Shard folder to write."""
    kind: str
    """triplet or septuplet."""
    split: str
    """train or test."""
    codec: str = "copy"
    """copy (the PNG files as they are), or png, qoi, jpeg to compress the frames anew."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    samples_per_shard: int = writer.SAMPLES_PER_SHARD
    """Most samples in one tar."""
    workers: int = 1
    """Processes; the bytes written do not depend on it."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index; a folder that is already complete is left as it is.

    Raises ShardError for unusable options, for a set with missing files (before anything is written), for a frame that is
    not a readable PNG, and for an output folder that holds something else.
    """
    _check(options)
    names = read_list(options.src / list_name(options.kind, options.split))
    expected = EXPECTED[options.kind, options.split]
    if len(names) != expected:
        print(
            f"shards.vimeo90k: warning: the {options.kind} {options.split} list has {len(names):,} sequences, the published "
            f"one has {expected:,}: results are not comparable with published ones",
            file=sys.stderr,
        )
    files = _find_files(options, names)
    arguments: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "workers")
    }
    source = writer.source_of("shards.vimeo90k", arguments | {"src": str(options.src.resolve())})
    mark = writer.fingerprint(source | {"list": names}, files)
    return writer.write(options.out, _plan(options, names, source), mark, options.workers)


def list_name(kind: str, split: str) -> str:
    """File name of a published list, e.g. tri_trainlist.txt."""
    return f"{kind[:3]}_{split}list.txt"


def read_list(path: Path) -> list[str]:
    """The `<a>/<b>` names of a list in its order; blank lines are passed over. Raises ShardError naming a bad line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(
            f"list {path} cannot be read ({error}): give the folder that holds sequences/ and the lists"
        ) from error
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,30}/[A-Za-z0-9_-]{1,30}", name):
            raise ShardError(f"{path} line {number}: {name!r} is not a sequence such as 00001/0001")
        if name in names:
            raise ShardError(f"{path} line {number}: {name} is there already, in line {names[name]}")
        names[name] = number
    if not names:
        raise ShardError(f"list {path} is empty")
    return list(names)


def main(argv: Sequence[str] | None = None) -> int:
    """The job: parse flags, make the folder, say what it holds. Returns the exit code."""
    return run_job(Options, _job, "shards.vimeo90k", __doc__, argv)


def _job(options: Options) -> int:
    print(writer.describe(options.out, make(options)))
    return 0


def _check(options: Options) -> None:
    if options.kind not in FRAMES:
        raise ShardError(f"unknown kind {options.kind!r}: choose one of {', '.join(FRAMES)}")
    if options.split not in ("train", "test"):
        raise ShardError(f"unknown split {options.split!r}: Vimeo90K has train and test")
    if options.codec != "copy":
        images.check_codec(options.codec)
    images.check_quality(options.quality)
    if not options.src.is_dir():
        raise ShardError(f"source folder {options.src} does not exist")
    if options.out.resolve() == options.src.resolve() or options.src.resolve() in options.out.resolve().parents:
        raise ShardError(f"output {options.out} lies inside the source {options.src}: give a folder outside of it")


def _frame_path(src: Path, name: str, number: int) -> Path:
    return src / "sequences" / name / f"im{number}.png"


def _find_files(options: Options, names: list[str]) -> list[tuple[str, os.stat_result]]:
    """Every frame file with its size and time. Raises ShardError naming the first files that are missing, and their count."""
    found, missing = [], []
    for name in names:
        for number in range(1, FRAMES[options.kind] + 1):
            path = _frame_path(options.src, name, number)
            try:
                found.append((f"{name}/{number}", path.stat()))
            except FileNotFoundError:
                missing.append(str(path.relative_to(options.src)))
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise ShardError(
            f"{len(missing):,} frame files of the {options.kind} {options.split} list are missing in {options.src}: "
            f"{', '.join(missing[:3])}{more}; nothing was written"
        )
    return found


def _plan(options: Options, names: list[str], source: dict[str, Any]) -> writer.Plan:
    tasks = []
    for part in writer.chunks(len(names), options.samples_per_shard):
        inside = names[part.start : part.stop]
        tasks.append(
            writer.ShardTask(f"{inside[0]} to {inside[-1]}", len(inside), functools.partial(_samples, options, inside))
        )
    return writer.Plan(
        split=options.split,
        codec="png" if options.codec == "copy" else options.codec,
        frames=FRAMES[options.kind],
        has_flow=False,
        source=source,
        clips=tuple(names),
        shards=tuple(tasks),
    )


def _samples(options: Options, names: Sequence[str]) -> Iterator[writer.Sample]:
    for name in names:
        paths = [_frame_path(options.src, name, number + 1) for number in range(FRAMES[options.kind])]
        files = [path.read_bytes() for path in paths]
        # decoded even where the bytes are copied: a broken file is found now and not in the middle of a training run
        frames = [images.decode(data, "png", str(path)) for data, path in zip(files, paths, strict=True)]
        if len({frame.shape for frame in frames}) > 1:
            raise ShardError(f"sequence {name} has frames of different sizes: {[frame.shape[:2] for frame in frames]}")
        if options.codec != "copy":
            files = [images.encode(frame, options.codec, options.quality) for frame in frames]
        meta = SampleMeta(name, tuple(path.name for path in paths), *frames[0].shape[:2])
        yield writer.Sample(name.replace("/", "_"), meta, tuple(files))


if __name__ == "__main__":
    sys.exit(main())
