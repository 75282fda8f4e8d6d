"""Convert videos and folders of frames to shards: extract sequences, filter them, and split them by clip.

    python -m shards.video --src videos --out data/mine --codec jpeg --workers 8
    python -m shards.video --src videos --out data/mine --val_fraction 0.1     # data/mine/train and data/mine/val

`src` is searched to any depth for video files and for folders that directly hold images (sorted naturally: one clip each).
Sequences with scene cuts or repeated frames are left out and counted in the index (see `shards.sequence_filter`). A clip never
spans two splits. A video that cannot be read is reported and skipped; of one that breaks off, the frames before that are kept.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards import codecs, writer
from shards.cli import run_job
from shards.color_conversion import CONVERSION
from shards.frame_sources import Clip, Entry, find_clips, nearest_entry, read_clip
from shards.parallel import run
from shards.schema import SPLITS, VIDEO_EXTENSIONS, Index, SampleMeta, ShardError, split_lot
from shards.sequence_filter import Found, find_sequences


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `make`; each field is a flag of the command."""

    src: Path
    """Folder with videos and folders of frames, at any depth."""
    out: Path
    """Shard folder to write; with val_fraction, the parent of the shard folders train and val."""
    frames: int = 3
    """Number of frames per sequence."""
    stride: int = 1
    """Distance between neighbouring frames of a sequence: 1 takes consecutive frames, 2 every other one."""
    step: int = 1
    """Distance between the first frames of successive sequences: 1 takes every sequence, so that they overlap."""
    codec: str = "png"
    """How frames are stored: png or qoi (lossless; qoi reads faster) or jpeg (small, reads fast)."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    max_height: int | None = None
    """Maximum height in pixels; higher frames are downscaled (antialiased, same aspect ratio, even sides)."""
    split: str = ""
    """Split that the folder is for: train, val or test; default: the name of --out if it is one of them, otherwise train."""
    val_fraction: float = 0.0
    """Fraction of the clips that goes to a val folder; whole clips are assigned by a hash of their names."""
    samples_per_shard: int = writer.SAMPLES_PER_SHARD
    """Maximum number of samples per tar."""
    workers: int = 1
    """Number of processes; the bytes written do not depend on it."""


def make(options: Options) -> dict[str, Index]:
    """Write the shard folder, or two of them with `val_fraction`, and return the index of each split.

    Folders that are already complete are left as they are. Raises ShardError for unusable options and sources, and for an
    output folder that holds something else.
    """
    if not options.split:
        options = dataclasses.replace(options, split=_default_split(options))
    _check(options)
    clips = find_clips(options.src)
    arguments: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "workers")
    }
    conversion = None if all(clip.images for clip in clips) else CONVERSION
    source = writer.source_of("shards.video", arguments | {"src": str(options.src.resolve())}, conversion)
    files = [(f"{clip.name}/{path.name}", path.stat()) for clip in clips for path in clip.files()]
    folders = _folders(options)
    marks = {split: writer.fingerprint(source | {"split": split}, files) for split in folders}
    done = {split: writer.check_output(folder, marks[split]) for split, folder in folders.items()}
    complete = {split: index for split, index in done.items() if index is not None}
    if len(complete) == len(folders):
        print(f"{options.out} is complete already, nothing to do", file=sys.stderr)
        return complete
    found = _scan(clips, options)
    assigned = _deal(clips, found, options)
    return {
        split: writer.write(
            folders[split], _plan(split, assigned[split], found, source, options), marks[split], options.workers
        )
        for split in folders
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folders and print summaries. Returns the exit code."""
    return run_job(Options, _job, "shards.video", __doc__, argv)


def _job(options: Options) -> int:
    for split, index in make(options).items():
        print(writer.describe(options.out / split if options.val_fraction else options.out, index))
    return 0


def _default_split(options: Options) -> str:
    name = options.out.resolve().name
    return name if name in SPLITS and not options.val_fraction else "train"


def _check(options: Options) -> None:
    codecs.check_codec(options.codec)
    codecs.check_quality(options.quality)
    if options.split not in SPLITS:
        raise ShardError(f"unknown split {options.split!r}: choose one of {', '.join(SPLITS)}")
    least = {"frames": 2, "stride": 1, "step": 1, "samples_per_shard": 1}
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ShardError(f"{name} {getattr(options, name)} is too small: give {value} or more")
    if options.max_height is not None and options.max_height < 16:
        raise ShardError(f"max_height {options.max_height} is too small: give 16 or more")
    if not 0 <= options.val_fraction < 1:
        raise ShardError(f"val_fraction {options.val_fraction} is out of range: give a share of the clips, 0 to below 1")
    if options.val_fraction and options.split != "train":
        raise ShardError(f"val_fraction makes the splits train and val: leave out split {options.split}")
    src, out = options.src.resolve(), options.out.resolve()
    if out == src or src in out.parents:
        raise ShardError(f"output {options.out} lies inside the source {options.src}: give a folder outside of it")


def _folders(options: Options) -> dict[str, Path]:
    """Return the shard folder of each split. Raises ShardError when the folder above train and val holds something else."""
    if not options.val_fraction:
        return {options.split: options.out}
    folders = {split: options.out / split for split in ("train", "val")}
    others = sorted(p.name for p in options.out.iterdir() if p.name not in folders) if options.out.is_dir() else []
    if others:
        raise ShardError(
            f"output folder {options.out} holds other things ({', '.join(others[:3])}) beside train and val; "
            "nothing was touched: give a new or empty folder"
        )
    return folders


def _scan(clips: list[Clip], options: Options) -> dict[Clip, Found]:
    """Find every clip's usable sequences, in a first pass. Raises ShardError when there are none at all."""
    scan = functools.partial(find_sequences, frames=options.frames, stride=options.stride, step=options.step)
    found = dict(zip(clips, run(scan, clips, options.workers, name=lambda clip: clip.name, title="read clips"), strict=True))
    for result in found.values():
        if result.fault:
            print(f"shards.video: {result.fault}; {_kept(result)}", file=sys.stderr)
    if not any(result.starts for result in found.values()):
        results = found.values()
        short = sum(r.frames <= (options.frames - 1) * options.stride and not r.fault for r in results)
        faults = [r.fault for r in results if r.fault]
        raise ShardError(
            f"source folder {options.src} has no usable sequence of {options.frames} frames at stride {options.stride}: "
            f"{len(clips)} clips, {short} too short, {len(faults)} with faults, {sum(r.scene_cut for r in results)} sequences "
            f"left out for scene cuts, {sum(r.duplicate for r in results)} for duplicate frames"
        )
    return found


def _kept(found: Found) -> str:
    return f"the {found.frames} frames before that are kept" if found.frames else "skipped"


def _deal(clips: list[Clip], found: dict[Clip, Found], options: Options) -> dict[str, list[Clip]]:
    """Return the clips of each split. Each gets at least one usable clip; clips without usable sequences count as train."""
    if not options.val_fraction:
        return {options.split: clips}
    usable = sorted((clip for clip in clips if found[clip].starts), key=lambda clip: split_lot(clip.name))
    if len(usable) < 2:
        raise ShardError(
            f"val_fraction needs two clips with usable sequences or more, {options.src} has {len(usable)}: "
            "give more clips, or leave val_fraction out"
        )
    wanted = sum(split_lot(clip.name) < options.val_fraction for clip in usable)
    val = set(usable[: min(max(wanted, 1), len(usable) - 1)])
    return {"train": [clip for clip in clips if clip not in val], "val": [clip for clip in clips if clip in val]}


def _plan(split: str, clips: list[Clip], found: dict[Clip, Found], source: dict[str, Any], options: Options) -> writer.Plan:
    stems = _stems(clips)
    wanted = [(clip, start) for clip in clips for start in found[clip].starts]
    tasks = []
    for part in writer.chunks(len(wanted), options.samples_per_shard):
        groups = itertools.groupby(wanted[part.start : part.stop], key=lambda pair: pair[0])
        pieces = tuple(_piece(clip, stems[clip], [start for _, start in group], found[clip]) for clip, group in groups)
        origin = ", ".join(piece.clip.name for piece in pieces[:3]) + (", …" if len(pieces) > 3 else "")
        tasks.append(writer.ShardTask(origin, len(part), functools.partial(_samples, pieces, options)))
    return writer.Plan(
        split=split,
        codec=options.codec,
        frames=options.frames,
        has_flow=False,
        source=source,
        clips=tuple(clip.name for clip in clips if found[clip].starts),
        shards=tuple(tasks),
        filtered={
            "scene_cut": sum(found[clip].scene_cut for clip in clips),
            "duplicate": sum(found[clip].duplicate for clip in clips),
        },
        skipped={clip.name: f"{fault}; {_kept(found[clip])}" for clip in clips if (fault := found[clip].fault)},
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """The sequences of one clip that lie in one shard; `stem` is the first part of their keys."""

    clip: Clip
    stem: str
    starts: tuple[int, ...]
    entry: Entry | None  # seek point to start reading at, in a long video


def _piece(clip: Clip, stem: str, starts: list[int], found: Found) -> Piece:
    return Piece(clip, stem, tuple(starts), nearest_entry(found.entries, found.checksums, starts[0]))


def _stems(clips: list[Clip]) -> dict[Clip, str]:
    """Return the first part of each clip's keys, unique among the clips: its name with invalid characters replaced."""
    stems = {}
    for clip in clips:
        name = str(Path(clip.name).with_suffix("")) if clip.path.suffix.lower() in VIDEO_EXTENSIONS else clip.name
        stems[clip] = re.sub(r"[^A-Za-z0-9_-]", "_", name.replace("/", "__"))
    uses = collections.Counter(stem[:50] for stem in stems.values())
    for clip, stem in stems.items():
        if uses[stem[:50]] > 1 or len(stem) > 50:
            stems[clip] = f"{stem[:50]}-{hashlib.sha256(clip.name.encode()).hexdigest()[:12]}"
    return stems


def _samples(pieces: Sequence[Piece], options: Options) -> Iterator[writer.Sample]:
    for piece in pieces:
        yield from _samples_of(piece, options)


def _samples_of(piece: Piece, options: Options) -> Iterator[writer.Sample]:
    """Yield the samples of a piece in one sweep over its clip, the second pass; shared frames are compressed only once."""
    span = range(0, options.frames * options.stride, options.stride)
    needed = {start + offset for start in piece.starts for offset in span}
    waiting = collections.deque(piece.starts)
    ready: dict[int, tuple[bytes, tuple[int, int]]] = {}
    first = piece.starts[0]
    for number, frame in enumerate(read_clip(piece.clip, first, piece.entry), first):
        if number in needed:
            image = frame.rgb(options.max_height)
            ready[number] = codecs.encode(image, options.codec, options.quality), image.shape[:2]
        if number == waiting[0] + span[-1]:
            numbers = [waiting[0] + offset for offset in span]
            height, width = ready[number][1]
            meta = SampleMeta(piece.clip.name, _frame_names(piece.clip, numbers), height, width)
            yield writer.Sample(f"{piece.stem}-{waiting[0]:06d}", meta, tuple(ready[n][0] for n in numbers))
            waiting.popleft()
            if not waiting:
                return
            ready = {n: value for n, value in ready.items() if n >= waiting[0]}


def _frame_names(clip: Clip, numbers: list[int]) -> tuple[str | int, ...]:
    return tuple(clip.images[n].name for n in numbers) if clip.images else tuple(numbers)


if __name__ == "__main__":
    sys.exit(main())
