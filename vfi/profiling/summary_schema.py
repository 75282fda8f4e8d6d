"""Contents of a model summary."""

from __future__ import annotations

import dataclasses
from typing import Any

from vfi.config.configs import ModelConfig
from vfi.profiling.timing import Measured

OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True)
class Level:
    """One pyramid level at one frame size; lengths in pixels of the frames."""

    level: int
    stride: int
    channels: int
    tokens: int
    """Tokens of one frame."""
    conv_field: int
    """Receptive field through the convolutions up to this level, along one axis."""
    blocks: int = 0
    window: int | None = None
    """Side of an attention window; every other block shifts it by half."""
    scan_tokens: int | None = None
    """Length of a scan, every token of which sees the whole: global."""
    scan_macs: int | None = None
    """MACs of all blocks, for the whole batch; None if the formula does not apply."""


@dataclasses.dataclass(frozen=True)
class SizeSummary:
    """All results for one size; those that were not counted or measured are empty or None."""

    size: str
    levels: list[Level]
    macs: dict[str, int] = dataclasses.field(default_factory=dict)
    macs_by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    estimated_bytes: int | None = None
    estimated_ms: float | None = None
    out_of_memory: bool = False
    measured: Measured | None = None
    graph_ms: float | None = None
    """As the commands run it: with a CUDA graph where that is faster (vfi/runtime/cuda_graphs.py)."""
    parts_ms: dict[str, float] | None = None
    floors_ms: dict[str, float] | None = None
    plain_parts_ms: dict[str, float] | None = None
    """Times of the same network with PyTorch's operators."""
    plain_out_of_memory: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingSummary:
    """Costs of a training step; `measured` is None if there was not enough memory."""

    batch: int
    crop: int
    measured: Measured | None
    samples_per_s: float | None
    parts: dict[str, Measured] | None = None
    """Forward and backward pass of each part alone; the rest is loss, optimizer and the work between parts."""
    floors_ms: dict[str, float] | None = None
    plain_parts: dict[str, Measured] | None = None
    """The same network with PyTorch's operators."""
    plain_out_of_memory: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """Everything that --json writes."""

    name: str
    environment: dict[str, Any]
    config: ModelConfig
    batch: int
    parameters: dict[str, int]
    sizes: list[SizeSummary]
    training: TrainingSummary | None
