"""Convert the published Vimeo90K set to shards: triplets or septuplets, with the PNG files copied bit for bit.

    python -m shards.vimeo90k --src vimeo_triplet --out data/vimeo90k/train --kind triplet --split train --workers 8
    python -m shards.vimeo90k --src vimeo_septuplet --out data/septuplet/test --kind septuplet --split test

Layout of the set (http://toflow.csail.mit.edu): sequences/<a>/<b>/im1.png … and tri_trainlist.txt, tri_testlist.txt or
sep_trainlist.txt, sep_testlist.txt, with one `<a>/<b>` per line. All files must exist before anything is written. A septuplet
sample holds all seven frames. Copied PNG frames are slower to read than qoi or jpeg, to which --codec recompresses them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from shards import published_sets
from shards.schema import Index, ShardError

FRAMES = {"triplet": 3, "septuplet": 7}
EXPECTED = {  # sequences in the published lists
    ("triplet", "train"): 51_312,
    ("triplet", "test"): 3_782,
    ("septuplet", "train"): 64_612,
    ("septuplet", "test"): 7_824,
}
SIZE = (256, 448)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(published_sets.Options):
    """Options of `make`; each field is a flag of the command."""

    kind: str
    """Length of the sequences: triplet or septuplet."""
    split: str
    """Split of the set: train or test."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index; raises the errors of `published_sets.make`."""
    return published_sets.make("shards.vimeo90k", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """Return the sequences listed for this kind and split. Raises ShardError for an unknown one and for an unusable list."""
    if options.kind not in FRAMES:
        raise ShardError(f"unknown kind {options.kind!r}: choose one of {', '.join(FRAMES)}")
    published_sets.check_split(options.split, ("train", "test"))
    numbers = range(1, FRAMES[options.kind] + 1)
    groups = [
        published_sets.Group(name, name, tuple(f"sequences/{name}/im{number}.png" for number in numbers))
        for name in read_list(options.src / list_name(options.kind, options.split))
    ]
    return published_sets.ImageSet(
        title=f"the {options.kind} {options.split} list",
        split=options.split,
        frames=len(numbers),
        groups=groups,
        published_samples=EXPECTED[options.kind, options.split],
        published_size=SIZE,
    )


def list_name(kind: str, split: str) -> str:
    """Return the file name of a published list, e.g. tri_trainlist.txt."""
    return f"{kind[:3]}_{split}list.txt"


def read_list(path: Path) -> list[str]:
    """Return the `<a>/<b>` names of a list in order. Raises ShardError naming a bad line."""
    part = "[A-Za-z0-9_-]{1,30}"
    return [match[0] for match in published_sets.read_list(path, f"{part}/{part}", "00001/0001")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return published_sets.main(Options, make, "shards.vimeo90k", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
