"""Model the GPU memory of a training step: measured points, the formula fitted to them, and the file that stores both.

    peak = fixed + per_pixel * batch * crop^2

The fixed term holds weights, gradients, AdamW's two moments and workspace. The second term holds the activations, whose size is
the same for every sample and pixel. Compared with the shapes of all tensors (small, bf16, reference torch operators, batches 1
to 24; phase 1 up to crop 320, phase 2 up to 256) the formula holds to 1 % where a sixteenth of the crop is a multiple of the
attention's window. Other crops are padded to one: 224 takes 4 % more than its size suggests.
The fit minimizes the *relative* errors, and the largest of them is stored.
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
    """Memory of one measured training step, in bytes."""

    batch: int
    crop: int
    allocated: int
    """Peak of the memory in torch's tensors, which the formula describes."""
    reserved: int | None = None
    """Peak of the memory that torch reserved in one step, after it had released what the choice of algorithms took. It exceeds
    `allocated` by fragmentation."""
    reserved_first: int | None = None
    """Peak of the reserved memory since the process began, including the choice of algorithms."""
    outside: int | None = None
    """Memory of the card taken outside of torch, by CUDA, libraries, and other processes if there were any."""

    @property
    def pixels(self) -> int:
        """Number of pixels in the crops of one batch."""
        return self.batch * self.crop**2


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fitted formula: peak bytes = fixed + per_pixel * batch * crop^2."""

    fixed: float
    per_pixel: float
    residual: float
    """Largest relative error at a measured point, fitted or held out."""

    def bytes_at(self, batch: int, crop: int) -> float:
        """Return the predicted peak of a training step in bytes."""
        return self.fixed + self.per_pixel * batch * crop**2

    def largest_batch(self, crop: int, budget: float) -> int:
        """Return the largest batch that fits into `budget` bytes even if the formula errs by its residual; 0 if none does."""
        return max(0, int((budget / (1 + self.residual) - self.fixed) / (self.per_pixel * crop**2)))

    def errors(self, points: Iterable[Point]) -> list[float]:
        """Return the relative error, prediction / measurement - 1, at each point."""
        return [self.bytes_at(point.batch, point.crop) / point.allocated - 1 for point in points]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Measurements of one model on one kind of card."""

    preset: str
    """Name of the preset, for human readers; entries are compared by `model`."""
    card: str
    memory_gib: float
    model: ModelConfig
    precision: Precision
    checkpointing: bool
    compile: bool
    points: tuple[Point, ...]
    fit: Fit | None
    """Formula fitted to `points`; None when there are too few."""
    held_out: tuple[Point, ...]
    """Points measured to validate the fit, and not fitted."""
    environment: dict[str, Any]
    """Versions, settings of cuDNN and of the allocator, and anything else that affects the numbers."""
    cuda_graphs: bool = False

    @property
    def settings(self) -> tuple[Any, ...]:
        """All settings that the memory depends on, except for the card."""
        return settings(self.model, self.precision, self.checkpointing, self.compile, self.cuda_graphs)

    def is_of(self, kind: str, gib: float) -> bool:
        """Return whether the entry was measured on this kind of card, within 2 GiB of this size."""
        return self.card == kind and abs(self.memory_gib - gib) < 2


def settings(
    model: ModelConfig, precision: str, checkpointing: bool, compiled: bool, cuda_graphs: bool = False
) -> tuple[Any, ...]:
    """Return the settings of a training step in comparable form. Phase 3 counts as phase 2, whose network it trains."""
    plain = dataclasses.replace(model, phase=2) if model.phase == 3 else model
    return plain, precision, checkpointing, compiled, cuda_graphs


@dataclasses.dataclass(frozen=True)
class ManualProfile:
    """A batch size stated for a card, for no model in particular."""

    card: str
    gb: int
    batch: int
    crop: int
    source: str


@dataclasses.dataclass(frozen=True)
class Profiles:
    """Content of memory_profiles.json."""

    cards: dict[str, tuple[int, ...]]
    """Memory sizes in GB that each kind of card is sold with."""
    stated: tuple[ManualProfile, ...]
    measured: tuple[Entry, ...]


def fit_points(points: Sequence[Point], held_out: Sequence[Point] = ()) -> Fit | None:
    """Fit the formula by least squares of the relative errors.

    Returns None for fewer than three points of different size, which do not determine two parameters and an error.
    """
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
    """Read and check the file; raise ConfigError, which names the invalid part, when it is not usable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} can't be read as memory profiles: {error}") from error
    if not isinstance(content, dict) or (content.pop("schema", None), content.pop("version", None)) != (SCHEMA, VERSION):
        raise ConfigError(f"{path} is not a {SCHEMA} file of version {VERSION}")
    try:
        # model settings added after a measurement had their default values in it
        profiles: Profiles = from_object(Profiles, content, str(path), [])
    except RecordError as error:
        raise ConfigError(str(error)) from error
    return profiles


def add(entry: Entry, path: Path = PROFILES) -> None:
    """Add an entry to the file, replacing one of the same card and settings; several processes may do so concurrently."""
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
    """Write the file atomically."""
    content = {"schema": SCHEMA, "version": VERSION} | dataclasses.asdict(profiles)
    write_text(path, json.dumps(content, indent=1) + "\n")
