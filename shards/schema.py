"""Format of a shard folder: the contract between the commands that write shards and the loader that reads them.

A shard folder holds one split of one data set:

    index.json            content of the folder: counts, bytes and sha256 of every shard, source, filters, versions
    shard-000000.tar      standard WebDataset tar: members of a sample are adjacent and share the name before the first dot
    shard-000001.tar …

One sample is one sequence of consecutive frames:

    <key>.json            SampleMeta: clip, frame names, height, width
    <key>.im1.png         the frames in order, im1 … imN (png, qoi or jpg, the same for a whole folder)
    <key>.flow_t0.npy     optional, float32 [H, W, 2]: flow from the middle frame to the first, (dx, dy) in pixels, or
                          [H, W, 3], followed by its weight in 0..1: how far it is to be trusted
    <key>.flow_t1.npy     optional, likewise to the last frame

A key is unique in its folder and contains no dot and no slash. Standard `webdataset` and `tar` read the format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = "vfi-shards"
VERSION = 1
INDEX_NAME = "index.json"
SPLITS = ("train", "val", "test")
EXTENSION = {"png": "png", "qoi": "qoi", "jpeg": "jpg"}  # codec -> file extension of a frame
VIDEO_EXTENSIONS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv", ".y4m"})
IMAGE_EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".qoi", ".tif", ".tiff", ".webp"})

_PUBLISHED = (  # published sets: title, command with its flags, and files by which a folder of this layout is recognized
    ("Vimeo90K triplet", "vimeo90k --kind triplet --split train", ("tri_trainlist.txt", "tri_testlist.txt")),
    ("Vimeo90K septuplet", "vimeo90k --kind septuplet --split train", ("sep_trainlist.txt", "sep_testlist.txt")),
    *(
        ("SNU-FILM", f"snu_film --split {split}", (f"test-{split}.txt", f"eval_modes/test-{split}.txt"))
        for split in ("easy", "medium", "hard", "extreme")
    ),
    ("Middlebury-Other", "middlebury", ("other-gt-interp",)),
    ("UCF101", "ucf101", ("*/frame_01_gt.png",)),
    ("Xiph", "xiph", ("Tango-001.png", "Tango/*001.png", "BoxingPractice-001.png", "BoxingPractice/*001.png")),
    ("X4K1000FPS", "x4k1000fps --split train", ("train/*/*/0064.png", "encoded_train/*/*.mp4")),
    ("X4K1000FPS", "x4k1000fps --split test", ("test/*/*/0032.png", "test/*/*/*/0032.png")),
)


class ShardError(ValueError):
    """Error for a shard folder, source or argument of a shard command that is not usable; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class SampleMeta:
    """Content of `<key>.json`. `frames` are the names or numbers of the frames in their source; sizes are in pixels."""

    clip: str
    frames: tuple[str | int, ...]
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """Entry of one tar in the index."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Index:
    """Content of index.json. `min_size` and `max_size` are (height, width) over all samples, each side separately."""

    split: str
    codec: str
    frames: int
    min_size: tuple[int, int]
    max_size: tuple[int, int]
    has_flow: bool
    source: dict[str, Any]  # command, arguments, versions and conversions that made the folder, enough to reproduce it
    filtered: dict[str, int]  # reason -> number of candidates that were left out
    skipped: dict[str, str]  # source file -> why it could not be read
    clips: tuple[str, ...]
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def color_conversion(self) -> str | None:
        """Name of the colour conversion of frames from videos; None for other sources, and if it was not recorded."""
        return self.source.get("color_conversion")


def shard_name(number: int) -> str:
    """Return the file name of a shard; `number` counts from 0."""
    return f"shard-{number:06d}.tar"


def frame_members(frames: int, codec: str) -> list[str]:
    """Return the member extensions of a sample's frames in order, e.g. ['im1.png', 'im2.png', 'im3.png']."""
    return [f"im{i + 1}.{EXTENSION[codec]}" for i in range(frames)]


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(folder: Path, index: Index) -> Path:
    """Write index.json under a temporary name, then rename it, so that a folder with an index is always complete."""
    content = {"schema": SCHEMA, "version": VERSION, "samples": index.samples, "bytes": index.bytes}
    content |= dataclasses.asdict(index)
    path = folder / INDEX_NAME
    temporary = folder / f".{INDEX_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def read_index(folder: str | Path) -> Index:
    """Read and check index.json of a shard folder.

    Raises ShardError when the folder is missing, is a raw data set (the message contains the command that converts it), is not
    a shard folder, or was written under another schema version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ShardError(f"shard folder {folder} does not exist")
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ShardError(f"{folder} is not a shard folder: it has no {INDEX_NAME}. {_how_to_make_shards(folder)}")
    return parse_index(path.read_bytes(), str(path), lambda: _how_to_make_shards(folder))


def parse_index(data: bytes, path: str, advice: Callable[[], str] = lambda: "Give the folder that a job wrote.") -> Index:
    """Check the content of an index.json; errors call it `path`, and add `advice` when it is not an index at all."""
    try:
        content = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} is damaged ({error}): make the shards again") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ShardError(f"{path} is not an index of {SCHEMA}. {advice()}")
    if content.get("version") != VERSION:
        raise ShardError(
            f"{path} has schema version {content.get('version')!r}, this program reads version {VERSION}: "
            f"make the shards again with this version of the project (source: {content.get('source')})"
        )
    return _index_from(content, path)


def _index_from(content: dict[str, Any], path: str) -> Index:
    names = [field.name for field in dataclasses.fields(Index)]
    missing = [name for name in names if name not in content]
    if missing:
        raise ShardError(f"{path} lacks {', '.join(missing)}: make the shards again")
    values = {name: content[name] for name in names}
    try:
        values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
    except TypeError as error:
        raise ShardError(f"{path}: a shard entry is malformed ({error}): make the shards again") from error
    for entry in values["shards"]:  # an index from elsewhere must not lead out of its folder
        if not isinstance(entry.name, str) or not entry.name or set(entry.name) & set("/\\\0") or entry.name in (".", ".."):
            raise ShardError(f"{path} names a shard {entry.name!r}: it must be a plain file name")
    for name in ("min_size", "max_size", "clips"):
        values[name] = tuple(values[name])
    if values["codec"] not in EXTENSION:
        raise ShardError(f"{path} names codec {values['codec']!r}; known: {', '.join(EXTENSION)}")
    return Index(**values)


def _how_to_make_shards(folder: Path) -> str:
    """Return the command that converts a raw folder to shards, or other advice when none fits."""
    inside = [child for child in folder.iterdir() if not child.name.startswith(".")]
    for split in SPLITS:
        if (folder / split / INDEX_NAME).is_file():
            return f"Its subfolder {folder / split} is one: give that."
    for title, command, patterns in _PUBLISHED:
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            job, *flags = command.split()
            arguments = " ".join(["--src", str(folder), "--out", "SHARDS", *flags])
            return f"It looks like the {title} set. Make shards first: python -m shards.{job} {arguments}"
    suffixes = {child.suffix.lower() for child in inside if child.is_file()}
    below = {f.suffix.lower() for child in inside if child.is_dir() for f in _some_files(child)}
    if (suffixes | below) & (VIDEO_EXTENSIONS | IMAGE_EXTENSIONS):
        return f"It looks like raw videos or frames. Make shards first: python -m shards.video --src {folder} --out SHARDS"
    if any(child.suffix == ".tar" for child in inside):
        return "It has tars but no index: an unfinished job? Run the job that makes it again; finished shards are kept."
    return "Give the folder that a `python -m shards.…` job wrote."


def _some_files(folder: Path, limit: int = 50) -> list[Path]:
    files = (child for child in folder.iterdir() if child.is_file())
    return [file for _, file in zip(range(limit), files, strict=False)]


def split_lot(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone: a split chosen by it does not change when others are added."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
