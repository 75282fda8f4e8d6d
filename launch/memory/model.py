"""What does a training step take of a GPU's memory? Measured points, the formula fitted to them, and the file that keeps both.

    peak = fixed + per_pixel * batch * crop^2

fixed: weights, gradients, AdamW's two moments, workspace. The second term: activations, as many for every sample and pixel.
Counted from the shapes of all tensors (small, bf16, plain torch, batches 1 to 24; phase 1 up to crop 320, phase 2 up to 256) it
holds to 1 % where a sixteenth of the crop is a multiple of the attention's window. Other crops are padded to one: 224 takes 4 %
more than its size says.
The fit makes the *relative* errors small, and the largest of them is kept.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from vfi.config.configs import ConfigError, ModelConfig
from vfi.io.dataclass_json import RecordError, from_object, write_text

PROFILES = Path(__file__).with_name("memory_profiles.json")
SCHEMA, VERSION = "vfi-memory-profiles", 1
GIB = 2**30
Precision = Literal["fp32", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured training step; bytes."""

    batch: int
    crop: int
    allocated: int
    """Peak of torch's tensors: what the formula speaks of."""
    reserved: int | None = None
    """Peak of what torch held of the card in one step, after it had given back what the choice of algorithms took: more than
    `allocated` by fragmentation."""
    reserved_first: int | None = None
    """The same since the process began, with the choice of algorithms."""
    outside: int | None = None
    """Taken of the card outside of torch, by CUDA, libraries, and other processes if there were any."""

    @property
    def pixels(self) -> int:
        """Of the crops of a batch together."""
        return self.batch * self.crop**2


@dataclasses.dataclass(frozen=True)
class Fit:
    """Peak bytes = fixed + per_pixel * batch * crop^2."""

    fixed: float
    per_pixel: float
    residual: float
    """Largest relative error at a measured point, fitted or held out."""

    def bytes_at(self, batch: int, crop: int) -> float:
        """Peak of a training step."""
        return self.fixed + self.per_pixel * batch * crop**2

    def largest_batch(self, crop: int, budget: float) -> int:
        """Batch that fits into so many bytes even if the formula errs by its residual; 0 when not one sample does."""
        return max(0, int((budget / (1 + self.residual) - self.fixed) / (self.per_pixel * crop**2)))

    def errors(self, points: Iterable[Point]) -> list[float]:
        """Prediction / measurement - 1 at each point."""
        return [self.bytes_at(point.batch, point.crop) / point.allocated - 1 for point in points]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured of one model on one kind of card."""

    preset: str
    """For the reader; what counts is `model`."""
    card: str
    memory_gib: float
    model: ModelConfig
    precision: Precision
    checkpointing: bool
    compile: bool
    points: tuple[Point, ...]
    fit: Fit | None
    """None: too few points."""
    held_out: tuple[Point, ...]
    """Measured to check the fit, and not fitted."""
    environment: dict[str, Any]
    """Versions, settings of cuDNN and of the allocator, and whatever else bears on the numbers."""
    cuda_graphs: bool = False

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that the memory depends on, but for the card."""
        return settings(self.model, self.precision, self.checkpointing, self.compile, self.cuda_graphs)

    def is_of(self, kind: str, gib: float) -> bool:
        """Was it measured on this kind of card, of this size?"""
        return self.card == kind and abs(self.memory_gib - gib) < 2


def settings(
    model: ModelConfig, precision: str, checkpointing: bool, compiled: bool, cuda_graphs: bool = False
) -> tuple[Any, ...]:
    """Comparable settings of a training step. Phase 3 is the network of phase 2."""
    plain = dataclasses.replace(model, phase=2) if model.phase == 3 else model
    return plain, precision, checkpointing, compiled, cuda_graphs


@dataclasses.dataclass(frozen=True)
class Stated:
    """A batch that was named for a card, for no model in particular."""

    card: str
    gb: int
    batch: int
    crop: int
    source: str


@dataclasses.dataclass(frozen=True)
class Profiles:
    """All of memory_profiles.json."""

    cards: dict[str, tuple[int, ...]]
    """Sizes in GB that a kind of card is sold with."""
    stated: tuple[Stated, ...]
    measured: tuple[Entry, ...]


def fit_points(points: Sequence[Point], held_out: Sequence[Point] = ()) -> Fit | None:
    """Least squares of the relative errors; None when there are too few different points to tell two numbers and an error."""
    if len({point.pixels for point in points}) < 3:
        return None
    # for x = pixels and y = bytes, the normal equations of the sum of (fixed / y + per_pixel x / y - 1)^2
    rows = [(1 / point.allocated, point.pixels / point.allocated) for point in points]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    fit = Fit((a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant, 0.0)
    return dataclasses.replace(fit, residual=max(map(abs, fit.errors([*points, *held_out]))))


def read_profiles(path: Path = PROFILES) -> Profiles:
    """The file, checked; ConfigError names the place that does not fit."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} can't be read as memory profiles: {error}") from error
    if not isinstance(content, dict) or (content.pop("schema", None), content.pop("version", None)) != (SCHEMA, VERSION):
        raise ConfigError(f"{path} is no {SCHEMA} file of version {VERSION}")
    try:
        # settings of the model that came after a measurement had their defaults in it
        profiles: Profiles = from_object(Profiles, content, str(path), [])
    except RecordError as error:
        raise ConfigError(str(error)) from error
    return profiles


def add(entry: Entry, path: Path = PROFILES) -> None:
    """Put an entry into the file, in place of one of the same card and settings; several jobs may do so at once."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        profiles = read_profiles(path)
        same = [other for other in profiles.measured if other.settings == entry.settings]
        kept = [other for other in profiles.measured if other not in same or not other.is_of(entry.card, entry.memory_gib)]
        write_profiles(dataclasses.replace(profiles, measured=(*kept, entry)), path)
    finally:
        os.close(folder)


def write_profiles(profiles: Profiles, path: Path = PROFILES) -> None:
    """The whole file, or not at all."""
    content = {"schema": SCHEMA, "version": VERSION} | dataclasses.asdict(profiles)
    write_text(path, json.dumps(content, indent=1) + "\n")
