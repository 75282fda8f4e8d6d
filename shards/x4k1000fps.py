"""Convert X4K1000FPS to shards: X-TRAIN as whole clips of 65 frames, X-TEST as the 9 frames that its protocol uses.

    python -m shards.x4k1000fps --src X4K1000FPS --out data/x4k/train --split train --workers 8
    python -m shards.x4k1000fps --src X4K1000FPS --out data/x4k/test --split test --workers 8

Layout (Sim et al., XVFI, arXiv 2103.16206): train/<scene>/<clip>/0000.png … 0064.png, 4,408 clips of 768x768, or, as
distributed, encoded_train/<scene>/<clip>.mp4; if both exist, the frames are used. test/<type>/<clip>/0000.png … 0032.png, 15
clips of 4096x2160 (a scene folder between type and clip is accepted). A test sample holds the frames 0, 4, 8 … 32: the first
and the last are the protocol's inputs, the seven in-between frames its ground truth; the middle one is frame 16.

PNG files are copied unchanged. Frames of videos have to be compressed: as JPEG (4:4:4, quality 95) unless --codec says qoi or
png. The videos are lossy already, JPEG reads as fast as QOI, and it takes about 100 GB for this set instead of 300. The ground
truth of a benchmark comes from frame files only, since every converter of video colours gives slightly different pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards import codecs, published_sets
from shards.color_conversion import CONVERSION
from shards.frame_sources import Clip, promised_frames, read_clip
from shards.parallel import run
from shards.published_sets import Frame, Group
from shards.schema import VIDEO_EXTENSIONS, Index, ShardError

TRAIN, TEST, VIDEOS = "train", "test", "encoded_train"
CLIP_FRAMES = 65  # of a training clip
TEST_FRAMES = range(0, 33, 4)
EXPECTED = {TRAIN: 4_408, TEST: 15}
SIZE = {TRAIN: (768, 768), TEST: (2160, 4096)}
LAYOUT = {
    TRAIN: f"{TRAIN}/<scene>/<clip>/0000.png … 0064.png or {VIDEOS}/<scene>/<clip>.mp4",
    TEST: f"{TEST}/<type>/<clip>/0000.png … 0032.png (of encoded_test the set's own mp4_decoding.py makes them)",
}
PATTERN = {
    TRAIN: rf"{TRAIN}/(?P<clip>[^/]+/[^/]+)/00(?:[0-5]\d|6[0-4])\.png",
    TEST: rf"{TEST}/(?P<clip>[^/]+/(?:[^/]+/)?[^/]+)/00(?:[0-2]\d|3[0-2])\.png",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(published_sets.Options):
    """Options of `make`; each field is a flag of the command."""

    split: str
    """Split of the set: train or test."""
    codec: str = "auto"
    """How frames are stored: copy (the PNG files unchanged), or recompressed as png, qoi or jpeg; auto: copy, but jpeg for
    videos."""
    samples_per_shard: int = 8
    """Maximum number of samples per tar."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index; raises the errors of `published_sets.make`."""
    if options.codec == "auto":
        options = dataclasses.replace(options, codec="jpeg" if _from_videos(options) else "copy")
    return published_sets.make("shards.x4k1000fps", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """Return the clips in natural order of names. Raises ShardError for another layout and for a clip of another length."""
    published_sets.check_split(options.split, (TRAIN, TEST))
    numbers = range(CLIP_FRAMES) if options.split == TRAIN else TEST_FRAMES
    videos = _from_videos(options)
    return published_sets.ImageSet(
        title=f"the X-{options.split.upper()} set",
        split=options.split,
        frames=len(numbers),
        groups=_video_groups(options) if videos else _frame_groups(options, numbers),
        published_samples=EXPECTED[options.split],
        published_size=SIZE[options.split],
        read=read_video if videos else published_sets.read_files,
        color_conversion=CONVERSION if videos else None,
    )


def read_video(options: Options, group: Group) -> Iterator[Frame]:
    """Yield the frames of a clip that is a video file, numbered from 0. Raises ShardError for a damaged one."""
    for number, frame in enumerate(read_clip(Clip(group.files[0], options.src / group.files[0]))):
        rgb = frame.rgb()
        yield Frame(number, codecs.encode(rgb, options.codec, options.quality), rgb.shape[:2])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return published_sets.main(Options, make, "shards.x4k1000fps", __doc__, argv)


def _from_videos(options: Options) -> bool:
    return options.split == TRAIN and not (options.src / TRAIN).is_dir() and (options.src / VIDEOS).is_dir()


def _frame_groups(options: Options, numbers: range) -> list[Group]:
    split = options.split
    pattern, layout = PATTERN[split], LAYOUT[split]
    clips = dict.fromkeys(match["clip"] for match in published_sets.scan(options.src, split, pattern, layout))
    return [Group(clip, clip, tuple(f"{split}/{clip}/{number:04d}.png" for number in numbers)) for clip in clips]


def _video_groups(options: Options) -> list[Group]:
    if options.codec == "copy":
        raise ShardError("codec copy needs frame files, the clips are videos: choose jpeg (small), qoi or png (lossless)")
    pattern = rf"{VIDEOS}/(?P<clip>[^/]+/[^/]+)\.mp4"
    matches = published_sets.scan(options.src, VIDEOS, pattern, f"{VIDEOS}/<scene>/<clip>.mp4", VIDEO_EXTENSIONS)
    check = functools.partial(_check_length, options.src)
    run(check, [match[0] for match in matches], options.workers, name=str, title="look at clips")
    return [Group(match["clip"], match["clip"], (match[0],)) for match in matches]


def _check_length(src: Path, file: str) -> None:
    """Raise ShardError for a truncated download before anything is written, as far as the file headers reveal it."""
    frames = promised_frames(src / file)
    if frames and frames != CLIP_FRAMES:
        raise ShardError(f"{file} has {frames} frames instead of {CLIP_FRAMES}; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
