"""Choose the three frames of a sample, and their scale: the `--sequence` of a folder.

- `middle`: the first, the middle and the last frame, as they are.
- `random_time`: first and last, and a random one in between, with its timestep (septuplets).
- `random_gap`: a, a + g, a + 2g with a random gap g and start a, then scaled by 1, 1/2 or 1/4 (chances 1/2, 1/4 and 1/4), so
  that motion comes in all sizes (65-frame clips of X4K1000FPS; source: SGM-VFI). Where a frame would not hold the crop at the
  scale that was drawn, the next larger one is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from vfi.config.configs import SequenceKind

_CHANCES = {1: 0.5, 2: 0.25, 4: 0.25}  # divisor of the frames' size -> how often it is drawn


class Triplet(NamedTuple):
    """Positions of the three frames in a sample, counted from 0, and the divisor of their size."""

    first: int
    middle: int
    last: int
    divisor: int = 1

    @property
    def timestep(self) -> float:
        """The time of the middle frame between the first (0) and the last (1)."""
        return (self.middle - self.first) / (self.last - self.first)


def middle_triplet(frames: int) -> Triplet:
    """Return the first, middle and last of an odd number of frames."""
    return Triplet(0, frames // 2, frames - 1)


def draw_triplet(rng: np.random.Generator, frames: int, sequence: SequenceKind) -> Triplet:
    """Draw three of `frames` frames, of which there must be at least 3, and for `middle` an odd number."""
    if sequence == "middle":
        return middle_triplet(frames)
    if sequence == "random_time":
        return Triplet(0, int(rng.integers(1, frames - 1)), frames - 1)
    gap = int(rng.integers(1, (frames - 1) // 2 + 1))
    start = int(rng.integers(frames - 2 * gap))
    return Triplet(start, start + gap, start + 2 * gap, int(rng.choice(list(_CHANCES), p=list(_CHANCES.values()))))


def shrink(frame: np.ndarray, divisor: int, crop: int) -> np.ndarray:
    """Return the rounded mean over squares of `divisor` pixels of a frame `[H, W, 3]` uint8.

    The divisor is halved until the result holds the crop. Sides are first cut at the bottom and on the right to a multiple of
    the divisor, by up to 3 pixels.
    """
    while min(frame.shape[:2]) // divisor < crop and divisor > 1:
        divisor //= 2
    if divisor == 1:
        return frame
    height, width = (side // divisor * divisor for side in frame.shape[:2])
    return np.asarray(Image.fromarray(frame).reduce(divisor, box=(0, 0, width, height)))
