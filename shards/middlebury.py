"""How does Middlebury-Other become shards? The PNG files copied bit for bit.

    python -m shards.middlebury --src middlebury --out shards/middlebury

Layout (https://vision.middlebury.edu/flow/data): other-data/<sequence>/frame10.png, frame11.png, the truth between them in
other-gt-interp/<sequence>/frame10i11.png; 12 sequences of several sizes. The archive with all frames of the sequences
(frame07.png …) will do: the others are passed over.
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
    """Write the shard folder and return its index (`image_sets.make` says what can go wrong)."""
    return published_sets.make("shards.middlebury", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """The sequences that have inputs or a truth: what one of them lacks is a missing file."""
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
    """The job: parse flags, make the folder, say what it holds. Returns the exit code."""
    return published_sets.main(Options, make, "shards.middlebury", __doc__, argv)


def _files(name: str) -> tuple[str, ...]:
    return f"{INPUTS}/{name}/frame10.png", f"{TRUTHS}/{name}/frame10i11.png", f"{INPUTS}/{name}/frame11.png"


if __name__ == "__main__":
    sys.exit(main())
