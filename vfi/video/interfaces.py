"""Interfaces of a video's input and output."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Protocol

import av

from shards.color_conversion import Colours


class Source(Protocol):
    """Where frames come from."""

    colours: Colours
    base: Fraction
    """Seconds that a frame's `pts` counts."""
    rate: Fraction
    """Frames per second, on average."""

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Frames in order of time, and packets of what else there is."""


class Sink(Protocol):
    """Where frames go."""

    pix_fmt: str
    done: int
    """Frames that it holds already, from a conversion that was stopped: it takes the first so many for these."""

    def write(self, frame: av.VideoFrame, pts: int) -> None:
        """Take a frame."""

    def copy(self, packet: av.Packet) -> None:
        """Take a packet."""
