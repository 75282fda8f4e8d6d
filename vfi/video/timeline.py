"""Timestamps and timesteps of the output's frames, computed from the timestamps of the input's frames.

    line = FrameMultiplier(4)  # or Rate(Fraction(60)), or Multiply(4, slower=True): four times as slow
    base = line.start(first_pts, stream_time_base)
    for moment in line.between(pts0, pts1):  # from a frame up to the next one, which comes with the next call
        moment.timestep, moment.pts          # timestep 0 is the frame itself; pts is in units of `base`
    for moment in line.last(pts, duration): …

All times are integer multiples of a time base, so nothing drifts, however long a video is. `FrameMultiplier` keeps the
variation of a variable frame rate; `Rate` makes it constant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


class OutputFrame(NamedTuple):
    """A frame of the output."""

    timestep: Fraction
    """Time between two frames of the input: from 0, the first of them, to below 1."""
    pts: int
    """Presentation time, in the time base of the output."""
    duration: int
    """Time until the next frame, likewise."""


@dataclasses.dataclass
class FrameMultiplier:
    """Multiply the number of frames by `factor`: in the same time or, if `slower`, in `factor` times the time.

    N frames become (N - 1) factor + 1.
    """

    factor: int
    slower: bool = False
    fill: bool = False
    """Frames further apart than one unit of the input's time base get those in between, too: for numbered images with gaps."""

    def start(self, pts: int, base: Fraction) -> Fraction:
        """Return the time base of the output, for an input whose first frame is at `pts` of `base`."""
        return base if self.slower else base / self.factor

    def between(self, pts: int, after: int) -> Iterator[OutputFrame]:
        """Yield the output's frames from the frame at `pts` up to the next one, at `after`."""
        steps = self.factor * (after - pts) if self.fill else self.factor
        length = self.factor * (after - pts) // steps
        for step in range(steps):
            yield OutputFrame(Fraction(step, steps), self.factor * pts + step * length, length)

    def last(self, pts: int, duration: int) -> Iterator[OutputFrame]:
        """Yield the last frame, for as long as it is shown: the output is as long as the input, or `factor` times."""
        yield OutputFrame(Fraction(0), self.factor * pts, self.factor * duration)

    def rate(self, rate: Fraction) -> Fraction:
        """Return the frames per second of the output, for an input at `rate`."""
        return rate if self.slower else rate * self.factor

    @property
    def slowdown(self) -> int:
        """Return how many times as long the output is."""
        return self.factor if self.slower else 1


class Rate:
    """Resample to `fps` frames per second, evenly spaced from the first frame on, for as long as the last one is shown."""

    slowdown = 1

    def __init__(self, fps: Fraction) -> None:
        self.fps = fps

    def start(self, pts: int, base: Fraction) -> Fraction:
        """Return the time base of the output, in which the input's times and the output's frames are integers."""
        period = 1 / self.fps
        denominator = base.denominator * period.denominator
        common = math.gcd(base.numerator * period.denominator, period.numerator * base.denominator)
        out = Fraction(common, denominator)
        self.units, self.step = int(base / out), int(period / out)  # of the input's time base, and between two output frames
        self.next = pts * self.units
        return out

    def between(self, pts: int, after: int) -> Iterator[OutputFrame]:
        """Yield the output's frames from the frame at `pts` up to the next one, at `after`."""
        begin, end = pts * self.units, after * self.units
        while self.next < end:
            yield OutputFrame(Fraction(self.next - begin, end - begin), self.next, self.step)
            self.next += self.step

    def last(self, pts: int, duration: int) -> Iterator[OutputFrame]:
        """Yield the last frame, repeated for its `duration`."""
        while self.next < (pts + duration) * self.units:
            yield OutputFrame(Fraction(0), self.next, self.step)
            self.next += self.step

    def rate(self, rate: Fraction) -> Fraction:
        """Return the frames per second of the output."""
        return self.fps


Timeline = FrameMultiplier | Rate
