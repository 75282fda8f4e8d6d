"""Convert SNU-FILM to shards: one folder per difficulty, with the PNG files copied bit for bit.

    python -m shards.snu_film --src SNU-FILM --out data/snu_film/hard --split hard --workers 8

Layout (Choi et al., Channel Attention Is All You Need for Video Frame Interpolation): test-easy.txt, test-medium.txt,
test-hard.txt and test-extreme.txt, in the set's folder or in its eval_modes/: 310 lines, each with the paths of the first,
middle and last frame. The published paths begin with folders of the authors (data/SNU-FILM/test/GOPRO_test/<clip>/000016.png),
and downloads hold test/GOPRO_test/… or GOPRO_test/…: the smallest number of leading folders, the same for all lines, is dropped
that makes the rest exist below --src.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from shards import published_sets, writer
from shards.schema import Index, ShardError

SPLITS = ("easy", "medium", "hard", "extreme")
EXPECTED = 310
# no part begins with a dot, but the first may be one: a list never leads out of the source folder
_FOLDER = r"(?P<folder>(?:\./|/|[A-Za-z]:/)?(?:\w[\w. -]*/)+)"
_LINE = rf"{_FOLDER}(?P<first>\d+)\.png\s+(?P=folder)(?P<middle>\d+)\.png\s+(?P=folder)(?P<last>\d+)\.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(published_sets.Options):
    """Options of `make`; each field is a flag of the command."""

    split: str
    """Difficulty: easy, medium, hard or extreme."""


def make(options: Options) -> Index:
    """Write the shard folder and return its index; raises the errors of `published_sets.make`."""
    return published_sets.make("shards.snu_film", options, find)


def find(options: Options) -> published_sets.ImageSet:
    """Return the triplets of the list. Raises ShardError for an unusable list and when its folders are not below the source."""
    published_sets.check_split(options.split, SPLITS)
    path = list_path(options.src, options.split)
    lines = published_sets.read_list(path, _LINE, "test/clip/000016.png test/clip/000017.png test/clip/000018.png")
    for line in lines:
        if not int(line["first"]) < int(line["middle"]) < int(line["last"]):
            raise ShardError(f"{path}: {line[0]!r} does not name the first, the middle and the last frame in this order")
    folders = [tuple(part for part in line["folder"].split("/") if part not in ("", ".") and ":" not in part) for line in lines]
    left_out = leading_folders(options.src, folders)
    groups = []
    for line, folder in zip(lines, folders, strict=True):
        clip = "/".join((options.split, *folder[-2:]))
        files = [f"{'/'.join(folder[left_out:])}/{line[frame]}.png" for frame in ("first", "middle", "last")]
        groups.append(published_sets.Group(f"{clip}/{line['middle']}", clip, tuple(files)))
    return published_sets.ImageSet(
        title=f"the {options.split} list", split="test", frames=3, groups=groups, published_samples=EXPECTED
    )


def list_path(src: Path, split: str) -> Path:
    """Return the path of a difficulty's list, either next to the frames or in eval_modes/."""
    beside, below = src / f"test-{split}.txt", src / "eval_modes" / f"test-{split}.txt"
    return below if below.is_file() and not beside.is_file() else beside


def leading_folders(src: Path, folders: Sequence[tuple[str, ...]]) -> int:
    """Return how many leading parts to drop from the list's folders: the fewest that make one of them exist below `src`.

    Raises ShardError naming the paths that were tried.
    """
    for left_out in range(max(map(len, folders))):
        if any((src / Path(*folder[left_out:])).is_dir() for folder in set(folders) if len(folder) > left_out):
            return left_out
    first = folders[0]
    tried = [str(Path(*first[left_out:])) for left_out in range(len(first))]
    raise ShardError(
        f"no folder of the list is in {src}; for the first line these were tried: {writer.some(tried, len(tried))}; "
        "give the folder that holds test/GOPRO_test or GOPRO_test"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return published_sets.main(Options, make, "shards.snu_film", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
