"""Presentation times of the frames of a video file: continuous, increasing and starting at zero, whatever its container says.

    clock, times = Clock(container), FrameTimes(container, usual_duration)
    for packet in container.demux(…):
        clock.adjust(packet)                     # packets of all streams
        times.register(packet)                   # those of the video
        for frame in packet.decode():
            times.assign(frame)

Joined transport streams start their clock again, streams start at any time, AVI has no presentation times at all, and decoders
give frames the same time twice. Frames come out of a decoder in the order in which they are shown, so no frame is ever dropped
for its time.
"""

from __future__ import annotations

import itertools
from collections import deque
from fractions import Fraction

import av
from av.container import InputContainer

_DISCONTINUOUS = 0x0200  # AVFMT_TS_DISCONT: the container's clock may jump
_FORWARD, _BACKWARD = Fraction(10), Fraction(1, 10)  # seconds beyond which a jump is none of the picture: FFmpeg's own limits
_WITHOUT_PTS = ("avi",)
_SAMPLED = 60  # packets from which a frame rate is measured


class Clock:
    """A continuous clock for all streams of a container, which starts at zero."""

    def __init__(self, container: InputContainer) -> None:
        self.jumps: list[float] = []
        """Seconds from the start at which the container's clock jumped."""
        self._can_jump = bool(int(container.format.flags) & _DISCONTINUOUS)
        self.start = (container.start_time or 0) / av.time_base
        """Seconds of the container's clock at which this one is at zero."""
        self._offset = -Fraction(container.start_time or 0, av.time_base)
        self._last: dict[int, Fraction] = {}  # stream -> time of its last packet
        self._expected: dict[int, Fraction] = {}  # and when the next one is due

    def stored(self, pts: int, base: Fraction) -> int:
        """Return the container's time of a frame before the first jump, in units of `base`."""
        return pts - round(self._offset / base)

    def adjust(self, packet: av.Packet) -> None:
        """Move the times of a packet; to be called for each packet, in the order of the file."""
        base = packet.time_base
        if base is None:
            return
        if packet.dts is None:
            packet.pts = None if packet.pts is None else packet.pts + round(self._offset / base)
            return
        time = packet.dts * base + self._offset
        due = self._expected.get(packet.stream.index)
        if self._can_jump and due is not None and (abs(time - due) > _FORWARD or time < due - _BACKWARD):
            self.jumps.append(float(due))
            self._offset += due - time
            time = due
            self._last.pop(packet.stream.index, None)
        moved = round(self._offset / base)
        packet.dts += moved
        if packet.pts is not None:
            packet.pts += moved
        before = self._last.get(packet.stream.index)
        # durations of transport streams are guesses, of half a frame for some
        step = time - before if before is not None and time > before else (packet.duration or 0) * base
        self._last[packet.stream.index], self._expected[packet.stream.index] = time, time + step


class FrameTimes:
    """Increasing times for the frames of one stream, in its time base."""

    def __init__(self, container: InputContainer, usual: int) -> None:
        self.usual = usual
        """Duration of a frame that does not state its own."""
        self.changed = 0
        """Number of frames that were given another time than they had."""
        self._by_count = container.format.name in _WITHOUT_PTS
        self._dts: deque[int] = deque()
        self._before: int | None = None
        self._duration = usual

    def register(self, packet: av.Packet) -> None:
        """Note a packet before it is decoded: without presentation times, its frame is shown in the order of decoding times."""
        if packet.size and packet.dts is not None and (self._by_count or packet.pts is None):
            self._by_count = True
            self._dts.append(packet.dts)

    def assign(self, frame: av.VideoFrame) -> None:
        """Give a frame its time, after that of the frame before."""
        if self._by_count:
            frame.pts = self._dts.popleft() if self._dts else None
        if frame.pts is None:
            frame.pts = 0 if self._before is None else self._before + self._duration
        elif self._before is not None and frame.pts <= self._before:
            frame.pts = self._before + max(1, self._duration // 2)
            self.changed += 1
        self._before, self._duration = frame.pts, frame.duration or self.usual


def measured_rate(path: str, stream_index: int) -> Fraction | None:
    """Return the usual frame rate of a stream from the times of its first packets, or None where they have none."""
    times: list[Fraction] = []
    with av.open(path, metadata_errors="replace") as container:
        stream = container.streams[stream_index]
        for packet in container.demux(stream):
            if packet.pts is not None and packet.time_base is not None:
                times.append(packet.pts * packet.time_base)
            if len(times) >= _SAMPLED:
                break
    times = sorted(set(times))
    gaps = sorted(after - before for before, after in itertools.pairwise(times))
    return 1 / gaps[len(gaps) // 2] if gaps else None
