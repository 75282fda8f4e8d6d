"""The contents of a model summary."""

from __future__ import annotations

import dataclasses
from typing import Any

from vfi.config.configs import ModelConfig
from vfi.profiling.timing import Measured

OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of the pyramid at one size; lengths in pixels of the frames."""

    level: int
    stride: int
    channels: int
    tokens: int
    """Places of one frame."""
    conv_field: int
    """What a value sees through the convolutions that lead here, along one axis."""
    blocks: int = 0
    window: int | None = None
    """Side of an attention window; every other block shifts it by half."""
    scan_tokens: int | None = None
    """Length of a scan, which sees all of it: global."""
    scan_macs: int | None = None
    """Of all blocks, for the whole batch; None where the formula above does not hold."""


@dataclasses.dataclass(frozen=True)
class SizeSummary:
    """All that is known about one size; what was not counted or measured is empty or None."""

    size: str
    levels: list[Level]
    macs: dict[str, int] = dataclasses.field(default_factory=dict)
    macs_by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    estimated_bytes: int | None = None
    estimated_ms: float | None = None
    out_of_memory: bool = False
    measured: Measured | None = None
    graph_ms: float | None = None
    """As the jobs run it: by a CUDA graph where that pays (vfi/runtime/cuda_graphs.py)."""
    parts_ms: dict[str, float] | None = None
    floors_ms: dict[str, float] | None = None
    plain_parts_ms: dict[str, float] | None = None
    """Of the same network by PyTorch's operators."""
    plain_out_of_memory: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingSummary:
    """A training step; `measured` is None if there was not enough memory."""

    batch: int
    crop: int
    measured: Measured | None
    samples_per_s: float | None
    parts: dict[str, Measured] | None = None
    """Forward and backward pass of parts by themselves; the rest is loss, optimizer, and what lies between."""
    floors_ms: dict[str, float] | None = None
    plain_parts: dict[str, Measured] | None = None
    """Of the same network by PyTorch's operators."""
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
