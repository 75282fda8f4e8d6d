"""Which random changes keep the frames, and time, consistent? One draw a sample, applied to all of its frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vfi.config import DataConfig


class FrameTooSmallError(ValueError):
    """A frame does not hold the crop; the message has both sizes and the fix."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What one draw does, in this order: crop, channel reversal, flips, rotation, time reversal."""

    top: int
    left: int
    size: int
    reverse_channels: bool
    flip_vertical: bool
    flip_horizontal: bool
    quarter_turns: int
    reverse_time: bool


def crop_advice(height: int, width: int) -> str:
    """What to do about frames of `height` x `width` pixels that don't hold the crop."""
    return f"take --crop {max(64, min(height, width) // 16 * 16)} or make shards of larger frames"


def draw_change(rng: np.random.Generator, height: int, width: int, config: DataConfig) -> Change:
    """Draw a change for frames of `height` x `width` pixels; FrameTooSmallError when they don't hold the crop."""
    size = config.crop
    if min(height, width) < size:
        raise FrameTooSmallError(
            f"frames are {height}x{width} (height x width) but the crop is {size}x{size}: {crop_advice(height, width)}"
        )
    chances = rng.random(4) < config.augment_prob
    return Change(
        top=int(rng.integers(height - size + 1)),
        left=int(rng.integers(width - size + 1)),
        size=size,
        reverse_channels=bool(chances[0]),
        flip_vertical=bool(chances[1]),
        flip_horizontal=bool(chances[2]),
        quarter_turns=int(rng.integers(4)) if config.rotate else 0,
        reverse_time=bool(chances[3]),
    )


def apply_change(change: Change, frames: Sequence[np.ndarray], timestep: float) -> tuple[list[np.ndarray], float]:
    """Frames `[H, W, 3]` in order of time and the timestep of the middle one -> changed frames and timestep."""
    rows, columns = slice(change.top, change.top + change.size), slice(change.left, change.left + change.size)
    changed = []
    for frame in frames:
        frame = frame[rows, columns]
        frame = frame[:, :, ::-1] if change.reverse_channels else frame
        frame = frame[::-1] if change.flip_vertical else frame
        frame = frame[:, ::-1] if change.flip_horizontal else frame
        changed.append(np.ascontiguousarray(np.rot90(frame, change.quarter_turns)))
    return (changed[::-1], 1 - timestep) if change.reverse_time else (changed, timestep)
