"""Photographs for synthetic scenes: find them, assign them to train or val, read and downscale them, keep them in memory.

    found = survey(Path("photographs"), workers=4)        # the usable ones, and why the others are not
    names = deal(found, "train")
    pictures = Deck([Path("photographs") / name for name in names], longest=1024).pictures(seed=0, number=7)

A picture with transparent parts is a cut-out: its opaque part becomes an object. All others fill backgrounds and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shards import codecs
from shards.parallel import run
from shards.schema import IMAGE_EXTENSIONS, ShardError, split_lot

VAL_SHARE = 0.1  # fraction of a folder's photographs; which ones depends only on their names
LEAST_SIDE = 64  # in pixels: a smaller picture counts as an icon
LEAST_HOLE = 0.01  # fraction of the pixels that must be transparent to make a picture a cut-out
MEMORY = 3 * 2**29  # bytes that the photographs of one process may take, downscaled copies included, if they are 3:2
BLOCK = 256  # number of consecutive samples that use the same photographs, when not all fit into memory


@dataclasses.dataclass(frozen=True)
class Survey:
    """Content of a folder by relative names: digests of usable pictures, which of them are cut-outs, faults of the others."""

    digests: dict[str, str]
    cutouts: frozenset[str]
    faults: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A photograph and its downscaled copies, each half the size of the previous one: uint8 [H, W, 3].

    A cut-out has 4 channels, with colours premultiplied by alpha, and is cropped to its opaque part.
    """

    levels: tuple[np.ndarray, ...]

    @property
    def is_cutout(self) -> bool:
        """Return whether the picture has transparent parts."""
        return self.levels[0].shape[2] == 4

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.levels[0].shape[0], self.levels[0].shape[1]


def survey(folder: Path, workers: int = 1) -> Survey:
    """Read every picture below `folder` once. Raises ShardError if it is not a folder or has no usable photograph."""
    if not folder.is_dir():
        raise ShardError(f"photographs {folder} is not a folder: give the folder that holds the pictures")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()
    )
    checked = run(functools.partial(_check, folder), names, workers, name=str, title="read photographs")
    results = dict(zip(names, checked, strict=True))
    digests = {name: result.digest for name, result in results.items() if result.digest}
    cutouts = frozenset(name for name, result in results.items() if result.is_cutout)
    if not digests.keys() - cutouts:
        raise ShardError(
            f"photographs {folder} has no picture to use: {len(names)} files, {len(cutouts)} of them with transparent parts, "
            f"{len(names) - len(digests)} with faults: add photographs without transparent parts"
        )
    return Survey(digests, cutouts, {name: result.fault for name, result in results.items() if result.fault})


def deal(found: Survey, split: str) -> tuple[str, ...]:
    """Return the names that belong to a split, train or val: a tenth, chosen by a hash of the names, is for val.

    Adding photographs to a folder does not move the others. Raises ShardError when a split gets none that can fill a
    background.
    """
    mine = tuple(sorted(name for name in found.digests if (split_lot(name) < VAL_SHARE) == (split == "val")))
    if not set(mine) - found.cutouts:
        raise ShardError(
            f"none of the {len(found.digests)} photographs without transparent parts falls to the split {split}: add more"
        )
    return mine


def digest_of(digests: dict[str, str], names: Sequence[str]) -> str:
    """Return one digest of the names and bytes of the photographs `names`."""
    return hashlib.sha256("".join(f"{name}\0{digests[name]}\n" for name in names).encode()).hexdigest()


def longest_side(height: int, width: int) -> int:
    """Return the longest side in pixels, 1024 to 4096, to which photographs are downscaled for frames of this size."""
    return min(max(1024, 2 * max(height, width)), 4096)


class Deck:
    """The photographs of one split, of which as many are in memory as fit into `MEMORY`."""

    def __init__(self, paths: Sequence[Path], longest: int) -> None:
        self._paths = tuple(paths)
        self._longest = longest
        self._kept: dict[int, Picture] = {}

    def pictures(self, seed: int, number: int) -> tuple[Picture, ...]:
        """Return the pictures that sample `number` may use, in a fixed order: all, or a random subset for its block."""
        pixels = self._longest**2 * 2 // 3
        room = max(8, MEMORY // (pixels * 4))  # 4 bytes per pixel: three colours, plus a third for the downscaled copies
        chosen = np.arange(len(self._paths))
        if len(chosen) > room:
            rng = np.random.default_rng([seed, number // BLOCK, len(chosen)])
            chosen = np.sort(rng.choice(chosen, room, replace=False))
        self._kept = {index: self._kept.get(index) or read(self._paths[index], self._longest) for index in chosen.tolist()}
        return tuple(self._kept.values())


def read(path: Path, longest: int) -> Picture:
    """Read a photograph, downscaled to `longest` pixels on its longer side if it is larger. Raises ShardError if broken."""
    image = Image.fromarray(_pixels(path))
    if image.mode == "RGBA":
        image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    levels = [image]
    while min(levels[-1].size) >= 2 * LEAST_SIDE:
        levels.append(levels[-1].reduce(2))
    return Picture(tuple(_premultiply(np.asarray(level)) for level in levels))


def _pixels(path: Path) -> np.ndarray:
    """Return uint8 [H, W, 3] with slight transparency composited over black, or [H, W, 4] if larger parts are transparent."""
    opaque = codecs.read_image(path)
    if path.suffix.lower() in (".png", ".webp", ".tif", ".tiff"):
        with Image.open(path) as image:
            if image.has_transparency_data:
                pixels = np.array(image.convert("RGBA"))
                if pixels[..., 3].any() and np.mean(pixels[..., 3] < 128) > LEAST_HOLE:
                    return pixels
    return opaque


def _premultiply(pixels: np.ndarray) -> np.ndarray:
    """Multiply the colours of RGBA by alpha, so that no hidden colour shows at a border; leave RGB unchanged."""
    if pixels.shape[2] == 3:
        return pixels
    colours = (pixels[..., :3].astype(np.uint16) * pixels[..., 3:] + 127) // 255
    return np.dstack([colours.astype(np.uint8), pixels[..., 3]])


@dataclasses.dataclass(frozen=True)
class _Check:
    """Result of reading a picture: a digest of its bytes, or a fault."""

    digest: str = ""
    is_cutout: bool = False
    fault: str = ""


def _check(folder: Path, name: str) -> _Check:
    try:
        pixels = _pixels(folder / name)
        data = (folder / name).read_bytes()
    except (ShardError, OSError) as error:
        # remove the folder's path and memory addresses, which some decoders add: the fault is stored in the index
        return _Check(fault=re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()).replace(f"{folder}/", "")))
    height, width, channels = pixels.shape
    if min(height, width) < LEAST_SIDE:
        return _Check(fault=f"{name} has {height}x{width} pixels: a side is below {LEAST_SIDE}")
    return _Check(hashlib.sha256(data).hexdigest(), channels == 4)
