"""Which frames does the output have, and when is each shown? Times of the input's frames -> times of the output's.

    line = Multiply(4)                       # or Rate(Fraction(60)), or Multiply(4, slower=True): four times as slow
    base = line.start(first_pts, stream_time_base)
    for moment in line.between(pts0, pts1):  # from a frame up to the next one, which comes with the next call
        moment.timestep, moment.pts          # 0 is the frame itself; pts counts `base`
    for moment in line.last(pts, duration): …

Times are whole numbers of a time base all the way, so nothing drifts, however long a video is. A frame rate that varies stays
as varied under `Multiply`; `Rate` makes it even.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


class Moment(NamedTuple):
    """A frame of the output."""

    timestep: Fraction
    """Where it lies between two frames of the input: from 0, the first of them, to below 1."""
    pts: int
    """When it is shown, in the time base of the output."""


@dataclasses.dataclass
class Multiply:
    """So many times as many frames: in the same time or, slower, in so many times the time.

    N frames become (N - 1) factor + 1.
    """

    factor: int
    slower: bool = False

    def start(self, pts: int, base: Fraction) -> Fraction:
        """The time base of the output, for an input whose first frame is at `pts` of `base`."""
        return base if self.slower else base / self.factor

    def between(self, pts: int, after: int) -> Iterator[Moment]:
        """From the frame at `pts` up to the next one, at `after`."""
        for step in range(self.factor):
            yield Moment(Fraction(step, self.factor), self.factor * pts + step * (after - pts))

    def last(self, pts: int, duration: int) -> Iterator[Moment]:
        """The last frame."""
        yield Moment(Fraction(0), self.factor * pts)

    def rate(self, rate: Fraction) -> Fraction:
        """Frames per second of the output, where the input has `rate`."""
        return rate if self.slower else rate * self.factor

    @property
    def slowdown(self) -> int:
        """How many times as long the output is."""
        return self.factor if self.slower else 1


class Rate:
    """So many frames per second, evenly spaced from the first frame on, as long as the last one is shown."""

    slowdown = 1

    def __init__(self, fps: Fraction) -> None:
        self.fps = fps

    def start(self, pts: int, base: Fraction) -> Fraction:
        """The time base of the output, which counts both the input's times and the output's frames in whole numbers."""
        period = 1 / self.fps
        denominator = base.denominator * period.denominator
        common = math.gcd(base.numerator * period.denominator, period.numerator * base.denominator)
        out = Fraction(common, denominator)
        self.units, self.step = int(base / out), int(period / out)  # of the input's time base, and between two frames
        self.next = pts * self.units
        return out

    def between(self, pts: int, after: int) -> Iterator[Moment]:
        """From the frame at `pts` up to the next one, at `after`."""
        begin, end = pts * self.units, after * self.units
        while self.next < end:
            yield Moment(Fraction(self.next - begin, end - begin), self.next)
            self.next += self.step

    def last(self, pts: int, duration: int) -> Iterator[Moment]:
        """The last frame, as often as its `duration` holds."""
        while self.next < (pts + duration) * self.units:
            yield Moment(Fraction(0), self.next)
            self.next += self.step

    def rate(self, rate: Fraction) -> Fraction:
        """Frames per second of the output."""
        return self.fps


Timeline = Multiply | Rate
