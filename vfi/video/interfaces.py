"""Interfaces between a conversion and its input and output."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Protocol

import av

from shards.color_conversion import Colours


class Source(Protocol):
    """The input: a source of frames."""

    colours: Colours
    base: Fraction
    """Duration of one unit of a frame's `pts`, in seconds."""
    rate: Fraction
    """Average frames per second."""

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Yield frames in order of time, and packets of the other streams."""


class Sink(Protocol):
    """The output: a sink of frames."""

    pix_fmt: str
    done: int
    """Number of frames that it already holds from a stopped conversion; it takes the first `done` frames for these."""

    def write(self, frame: av.VideoFrame, pts: int, duration: int = 0, last: bool = False) -> None:
        """Write a frame that is shown at `pts` for `duration`; 0: until the next one. `last`: it is the last one."""

    def copy(self, packet: av.Packet) -> None:
        """Write a packet."""
