"""Convert the UCF101 test triplets for frame interpolation to shards, with the PNG files copied bit for bit.

    python -m shards.ucf101 --src ucf101_interp_ours --out data/ucf101

Layout (Liu et al., Deep Voxel Flow, arXiv 1702.02463): 379 folders <id>/{frame_00,frame_01_gt,frame_02}.png, 256x256: first
frame, ground truth, last frame. That paper's own results in the published archive, frame_01_ours.png, are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shards import published_sets
from shards.published_sets import Options
from shards.schema import Index

EXPECTED = 379
SIZE = (256, 256)
FRAMES = ("frame_00.png", "frame_01_gt.png", "frame_02.png")  # in order of time


def make(options: Options) -> Index:
    """Write the shard folder and return its index; raises the errors of `published_sets.make`."""
    return published_sets.make("shards.ucf101", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """Return the triplets in natural order of their ids. Raises ShardError for a folder with another layout."""
    pattern = r"(?P<id>[^/]+)/frame_(?:00|01_gt|01_ours|02)\.png"
    matches = published_sets.scan(options.src, "", pattern, "<id>/frame_00.png, frame_01_gt.png, frame_02.png")
    ids = dict.fromkeys(match["id"] for match in matches)
    return published_sets.ImageSet(
        title="the UCF101 set",
        split="test",
        frames=len(FRAMES),
        groups=[published_sets.Group(name, name, tuple(f"{name}/{frame}" for frame in FRAMES)) for name in ids],
        published_samples=EXPECTED,
        published_size=SIZE,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return published_sets.main(Options, make, "shards.ucf101", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
