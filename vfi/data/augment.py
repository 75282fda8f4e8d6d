"""Augmentation: one random change for each sample, applied to its frames, timestep and flow alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vfi.config.configs import DataConfig, SmallFrames


class FrameTooSmallError(ValueError):
    """Raised when a frame is smaller than the crop; the message has both sizes and the fix."""


@dataclasses.dataclass(frozen=True)
class Change:
    """The changes of one draw, in this order: crop, channel reversal, flips, rotation, time reversal."""

    top: int
    left: int
    size: int
    reverse_channels: bool
    flip_vertical: bool
    flip_horizontal: bool
    quarter_turns: int
    reverse_time: bool


def crop_at(config: DataConfig, epoch: int) -> int:
    """Return the side of the training crop in pixels in an epoch, counted from 0.

    Under the curriculum each crop applies to an equal part of its T epochs, and the last one from then on.
    """
    if not config.curriculum:
        return config.crop
    crops = config.curriculum_crops
    return crops[min(len(crops) - 1, epoch * len(crops) // config.curriculum_T)]


def crop_advice(height: int, width: int, config: DataConfig) -> str:
    """Return advice for frames of `height` x `width` pixels that are smaller than the crop."""
    flag = "--curriculum_crops up to" if config.curriculum else "--crop"
    side = min(height, width) // 16 * 16
    smaller = f"{flag} {side}, " if side >= 64 else ""  # the smallest crop
    return f"use {smaller}--small_frames upscale or reflect, or make shards of larger frames"


def grow(frame: np.ndarray, crop: int, how: SmallFrames) -> np.ndarray:
    """Return a frame `[H, W, 3]` uint8 that holds the crop: a larger one as it is, a smaller one as `how` says.

    `upscale` enlarges it by bicubic interpolation until the shorter side is the crop; `reflect` continues it equally at
    opposite edges, without repeating the pixels at the edge; `refuse` leaves it small.
    """
    height, width = frame.shape[:2]
    if min(height, width) >= crop or how == "refuse":
        return frame
    if how == "upscale":
        factor = crop / min(height, width)
        size = round(width * factor), round(height * factor)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    margins = [(missing // 2, missing - missing // 2) for missing in (max(0, crop - height), max(0, crop - width))]
    return np.pad(frame, (*margins, (0, 0)), mode="reflect")


def draw_change(rng: np.random.Generator, height: int, width: int, size: int, config: DataConfig) -> Change:
    """Draw a change for frames of `height` x `width` pixels and a crop of `size`; FrameTooSmallError when it does not fit."""
    if min(height, width) < size:
        advice = crop_advice(height, width, config)
        raise FrameTooSmallError(f"frames are {height}x{width} (height x width) but the crop is {size}x{size}: {advice}")
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
    """Change frames `[H, W, 3]`, in order of time, and the timestep of the middle one; return views, and the timestep."""
    changed = [_move_pixels(change, frame, change.reverse_channels) for frame in frames]
    return (changed[::-1], 1 - timestep) if change.reverse_time else (changed, timestep)


def apply_change_to_flows(change: Change, flows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Change flows to the first and to the last frame as their frames are changed.

    `[H, W, 2]` holds (dx, dy) in pixels, `[H, W, 3]` weights, too.
    """
    if not flows:
        return []
    flip = np.diag([-1 if change.flip_horizontal else 1, -1 if change.flip_vertical else 1])
    quarter_turn = np.array([[0, 1], [-1, 0]])  # against the clock, as np.rot90 turns; y points down
    # a vector turns with its frame; the entries are 0, 1 and -1, so that no value is rounded
    matrix = np.eye(flows[0].shape[2], dtype=np.float32)
    matrix[:2, :2] = np.linalg.matrix_power(quarter_turn, change.quarter_turns) @ flip
    changed = [copy_pixels(_move_pixels(change, flow)) @ matrix.T for flow in flows]
    return changed[::-1] if change.reverse_time else changed


def copy_pixels(pixels: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """Copy an image `[H, W, C]`, which may be a view, into contiguous memory, by default its own."""
    into = np.empty(pixels.shape, pixels.dtype) if into is None else into
    if pixels.strides[2] == pixels.itemsize == pixels.strides[1] // pixels.shape[2]:
        into[:] = pixels  # whole rows
    else:
        for channel in range(pixels.shape[2]):  # three to seven times as fast as numpy's copy, pixel by pixel
            into[:, :, channel] = pixels[:, :, channel]
    return into


def _move_pixels(change: Change, image: np.ndarray, reverse_channels: bool = False) -> np.ndarray:
    """Return a view of an image `[H, W, C]` with crop, flips, rotation and order of channels applied."""
    pixels = image[change.top : change.top + change.size, change.left : change.left + change.size]
    pixels = pixels[::-1] if change.flip_vertical else pixels
    pixels = pixels[:, ::-1] if change.flip_horizontal else pixels
    pixels = np.rot90(pixels, change.quarter_turns)
    return pixels[:, :, ::-1] if reverse_channels else pixels
