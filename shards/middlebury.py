"""Convert Middlebury-Other to shards, with the PNG files copied bit for bit.

    python -m shards.middlebury --src middlebury --out data/middlebury

Layout (https://vision.middlebury.edu/flow/data): other-data/<sequence>/frame10.png and frame11.png, the ground truth of the
in-between frame in other-gt-interp/<sequence>/frame10i11.png; 12 sequences of several sizes. The archive with all frames of the
sequences (frame07.png …) works, too: the others are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shards import published_sets
from shards.published_sets import Options
from shards.schema import Index

EXPECTED = 12
INPUTS, TRUTHS = "other-data", "other-gt-interp"
LAYOUT = f"{INPUTS}/<sequence>/frame10.png, frame11.png and {TRUTHS}/<sequence>/frame10i11.png"


def make(options: Options) -> Index:
    """Write the shard folder and return its index; raises the errors of `published_sets.make`."""
    return published_sets.make("shards.middlebury", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """Return the sequences that have inputs or ground truth; files that one of them lacks are reported as missing later."""
    inputs = published_sets.scan(options.src, INPUTS, rf"{INPUTS}/(?P<name>[^/]+)/frame\d\d\.png", LAYOUT)
    truths = published_sets.scan(options.src, TRUTHS, rf"{TRUTHS}/(?P<name>[^/]+)/frame10i11\.png", LAYOUT)
    names = sorted({match["name"] for match in inputs + truths})
    return published_sets.ImageSet(
        title="the Middlebury-Other set",
        split="test",
        frames=3,
        groups=[published_sets.Group(name, name, _files(name)) for name in names],
        published_samples=EXPECTED,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return published_sets.main(Options, make, "shards.middlebury", __doc__, argv)


def _files(name: str) -> tuple[str, ...]:
    return f"{INPUTS}/{name}/frame10.png", f"{TRUTHS}/{name}/frame10i11.png", f"{INPUTS}/{name}/frame11.png"


if __name__ == "__main__":
    sys.exit(main())
