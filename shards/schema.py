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
import itertools
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

SCHEMA = "vfi-shards"
VERSION = 1
INDEX_NAME = "index.json"
SPLITS = ("train", "val", "test")
LARGEST_INDEX = 1 << 25
"""Bytes of an index.json: about 100,000 shards, and the names of half a million clips."""
LARGEST_META = 1 << 20
"""Bytes of the json of a sample."""
LARGEST_FRAME = 40_000_000
"""Pixels of a frame; 8192x4320 are 35 million."""
MOST_FRAMES, MOST_SHARDS, MOST_SAMPLES = 1000, 100_000, 25_600_000
"""Frames of a sample, and shards and samples of a folder: what is beyond is taken for damage, not for data."""
_MOST_OBJECTS = 1_000_000  # in an index; each takes 24 times as much memory as text
_LONGEST_TEXT = 300  # characters
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


def printable(text: str) -> str:
    """Return a text on one line, without control characters, and shortened."""
    text = text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode()
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"


def check_limits(frames: int, size: tuple[int, int], shards: int, samples: int) -> None:
    """Raise ShardError where a folder exceeds the limits of the format.

    `frames`: of a sample; `size`: (height, width) of its largest frame; `shards`, `samples`: of the folder.
    """
    if not 0 < frames <= MOST_FRAMES:
        raise ShardError(f"{frames:,} frames a sample are out of range: 1 to {MOST_FRAMES:,} are allowed")
    if min(size) < 1 or size[0] * size[1] > LARGEST_FRAME:
        raise ShardError(f"frames of {size[0]}x{size[1]} pixels are out of range: 1 to {LARGEST_FRAME:,} pixels are allowed")
    if shards > MOST_SHARDS or samples > MOST_SAMPLES:
        raise ShardError(
            f"{shards:,} shards with {samples:,} samples are too many for one folder: at most {MOST_SHARDS:,} and "
            f"{MOST_SAMPLES:,} are allowed; use several folders"
        )


def shard_name(number: int) -> str:
    """Return the file name of a shard; `number` counts from 0."""
    return f"shard-{number:06d}.tar"


def frame_members(frames: int, codec: str) -> list[str]:
    """Return the member extensions of a sample's frames in order, e.g. ['im1.png', 'im2.png', 'im3.png']."""
    return [f"im{i + 1}.{EXTENSION[codec]}" for i in range(frames)]


def sha256_of(file: Path | BinaryIO) -> str:
    """Return the hex digest of a file, which is read in pieces and, if it is open already, from its start."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return sha256_of(opened)
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


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
    if path.stat().st_size > LARGEST_INDEX:
        raise ShardError(
            f"{path} has {path.stat().st_size:,} bytes, at most {LARGEST_INDEX:,} are allowed: use several folders"
        )
    return parse_index(path.read_bytes(), str(path), lambda: _how_to_make_shards(folder))


def parse_index(data: bytes, path: str, advice: Callable[[], str] = lambda: "Give the folder that a job wrote.") -> Index:
    """Check the content of an index.json; errors call it `path`, and add `advice` when it is not an index at all."""
    try:
        if data.count(b"{") + data.count(b"[") > _MOST_OBJECTS:
            raise ValueError("it holds too many objects")
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
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
        for name in ("min_size", "max_size", "clips"):
            values[name] = tuple(values[name])
        index = Index(**values)
        _check_fields(index)
    except (TypeError, ShardError) as error:
        raise ShardError(f"{path} cannot be used ({printable(str(error))}): make the shards again") from error
    return index


def _check_fields(index: Index) -> None:
    """Raise ShardError for an index whose fields have other types or values than a job writes."""
    for entry in index.shards:  # an index from elsewhere must not lead out of its folder
        name = entry.name
        if not isinstance(name, str) or not name or set(name) & set("/\\\0") or name in (".", ".."):
            raise ShardError(f"it names a shard {name!r}, which must be a plain file name")
        if not all(type(number) is int and number >= 0 for number in (entry.samples, entry.bytes)) or not isinstance(
            entry.sha256, str
        ):
            raise ShardError(f"of shard {name}, samples and bytes must be whole numbers of at least 0, and sha256 a text")
    sizes = (*index.min_size, *index.max_size)
    numbers = (index.frames, *sizes)
    if (
        len(sizes) != 4
        or not all(type(number) is int and number > 0 for number in numbers)
        or not all(map(int.__le__, index.min_size, index.max_size))
    ):
        raise ShardError("frames, min_size and max_size must be whole numbers above 0 in their order")
    if index.codec not in EXTENSION:
        raise ShardError(f"it names codec {index.codec!r}; known: {', '.join(EXTENSION)}")
    objects = (index.source, index.filtered, index.skipped)
    if not all(isinstance(value, dict) for value in objects) or not all(isinstance(clip, str) for clip in index.clips):
        raise ShardError("source, filtered and skipped must be objects, and clips names")
    check_limits(index.frames, index.max_size, len(index.shards), index.samples)


def _how_to_make_shards(folder: Path) -> str:
    """Return the command that converts a raw folder to shards, or other advice when none fits."""
    inside = [child for child in folder.iterdir() if not child.name.startswith(".")]
    for split in SPLITS:
        if (folder / split / INDEX_NAME).is_file():
            return f"Its subfolder {folder / split} is one: give that."
    folders = [child for child in inside if child.is_dir()]
    places = [folder, *(folders if len(folders) == 1 else ())]  # SET/SET, as some archives unpack
    for place, (title, command, patterns) in itertools.product(places, _PUBLISHED):
        if any(next(place.glob(pattern), None) for pattern in patterns):
            job, *flags = command.split()
            arguments = " ".join(["--src", shlex.quote(str(place)), "--out", "SHARDS", *flags])
            return f"It looks like the {title} set. Make shards first: python -m shards.{job} {arguments}"
    suffixes = {child.suffix.lower() for child in inside if child.is_file()}
    below = {f.suffix.lower() for child in inside if child.is_dir() for f in _some_files(child)}
    if (suffixes | below) & (VIDEO_EXTENSIONS | IMAGE_EXTENSIONS):
        source = shlex.quote(str(folder))
        return f"It looks like raw videos or frames. Make shards first: python -m shards.video --src {source} --out SHARDS"
    if any(child.suffix == ".tar" for child in inside):
        return "It has tars but no index: an unfinished job? Run the job that makes it again; finished shards are kept."
    return "Give the folder that a `python -m shards.…` job wrote."


def _some_files(folder: Path, limit: int = 50) -> list[Path]:
    files = (child for child in folder.iterdir() if child.is_file())
    return [file for _, file in zip(range(limit), files, strict=False)]


def split_lot(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone: a split chosen by it does not change when others are added."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
