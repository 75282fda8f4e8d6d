"""How do the eight 4K clips of Xiph become shards? Every second frame between its neighbours, at full size.

    python -m shards.xiph --src xiph --out shards/xiph --workers 8

Layout (Niklaus and Liu, arXiv 2003.05534, whose script cuts 100 frames of each clip out of media.xiph.org's files with
ffmpeg): <Clip>-001.png … <Clip>-100.png, 4096x2160, all in one folder, or a folder <Clip> for each clip. A sample is the even
frame t between t - 1 and t + 1, t = 2 … 98: 49 a clip, 392 in all. How the "2K" (made smaller) and "4K" (centre crop) figures
come from these frames is the benchmark's matter. About 15 MB a frame: small shards.
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
    """What `make` needs; each field is a flag of the job."""

    samples_per_shard: int = 8
    """Most samples in one tar."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index (`image_sets.make` says what can go wrong)."""
    return published_sets.make("shards.xiph", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """The samples of the clips that are there. Raises ShardError for other images and for a clip in two places."""
    clip = f"(?P<clip>{'|'.join(CLIPS)})"
    pattern = rf"(?P<stem>{clip}(?:-|/(?:(?P=clip)-)?))(?!000)(?:0\d\d|100)\.png"
    matches = published_sets.scan(options.src, "", pattern, f"<Clip>-001.png … <Clip>-100.png of {', '.join(CLIPS)}")
    stems: dict[str, str] = {}  # what stands before the number, by clip
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
    """The job: parse flags, make the folder, say what it holds. Returns the exit code."""
    return published_sets.main(Options, make, "shards.xiph", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
