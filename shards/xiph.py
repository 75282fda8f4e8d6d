"""Convert the eight 4K clips of Xiph to shards: every second frame as the target between its neighbours, at full size.

    python -m shards.xiph --src xiph --out data/xiph --workers 8

Layout (Niklaus and Liu, arXiv 2003.05534, whose script extracts 100 frames of each clip from media.xiph.org's files with
ffmpeg): <Clip>-001.png … <Clip>-100.png, 4096x2160, all in one folder, or one folder <Clip> per clip. A sample is the even
frame t with t - 1 and t + 1, t = 2 … 98: 49 per clip, 392 in all. The benchmark derives the "2K" (downscaled) and "4K" (centre
crop) figures from these frames. Shards hold few samples, since a frame takes about 15 MB.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from shards import published_sets
from shards.schema import Index, ShardError

CLIPS = (
    "BoxingPractice",
    "Crosswalk",
    "DrivingPOV",
    "FoodMarket",
    "FoodMarket2",
    "RitualDance",
    "SquareAndTimelapse",
    "Tango",
)
MIDDLES = range(2, 99, 2)
EXPECTED = len(CLIPS) * len(MIDDLES)
SIZE = (2160, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(published_sets.Options):
    """Options of `make`; each field is a flag of the command."""

    samples_per_shard: int = 8
    """Maximum number of samples per tar."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index; raises the errors of `published_sets.make`."""
    return published_sets.make("shards.xiph", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """Return the samples of the clips that exist. Raises ShardError for other images and for a clip in two places."""
    clip = f"(?P<clip>{'|'.join(CLIPS)})"
    pattern = rf"(?P<stem>{clip}(?:-|/(?:(?P=clip)-)?))(?!000)(?:0\d\d|100)\.png"
    matches = published_sets.scan(options.src, "", pattern, f"<Clip>-001.png … <Clip>-100.png of {', '.join(CLIPS)}")
    stems: dict[str, str] = {}  # by clip: the part of the path before the frame number
    for match in matches:
        if stems.setdefault(match["clip"], match["stem"]) != match["stem"]:
            raise ShardError(
                f"clip {match['clip']} is in {options.src} twice, as {stems[match['clip']]}… and as {match['stem']}…: "
                "remove one; nothing was written"
            )
    groups = [
        published_sets.Group(f"{clip}-{middle:03d}", clip, tuple(f"{stems[clip]}{middle + i:03d}.png" for i in (-1, 0, 1)))
        for clip in CLIPS
        if clip in stems
        for middle in MIDDLES
    ]
    return published_sets.ImageSet(
        title="the Xiph set",
        split="test",
        frames=3,
        groups=groups,
        published_samples=EXPECTED,
        published_size=SIZE,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return published_sets.main(Options, make, "shards.xiph", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
