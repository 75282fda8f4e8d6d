"""Insert in-between frames into a stream of frames, pair by pair, so that memory does not grow with its length.

    counts = add_frames(source, sink, FrameMultiplier(2), between, FrameFilter())

`source` and `sink` are videos (vfi/video/container.py) or folders of frames; `between(img0, img1, timesteps)` starts the
interpolation of a pair and returns a function that waits for its frames. Reading, conversion, the model and writing run at the
same time. Frames of the input are written as they were read; a scene cut is not blended, and nothing is computed between
identical frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np

from shards.color_conversion import from_rgb, to_planes
from shards.frame_sources import VideoFrame
from shards.sequence_filter import CUT, is_cut, is_duplicate
from vfi.errors import JobError
from vfi.runtime.prefetch import prefetch
from vfi.video.background_writer import BackgroundWriter
from vfi.video.interfaces import Sink, Source
from vfi.video.timeline import OutputFrame, Timeline

InterpolationEngine = Callable[[np.ndarray, np.ndarray, Sequence[Fraction]], Callable[[], list[np.ndarray]]]
"""Two frames `[H, W, 3]` uint8 or uint16, timesteps -> a function that waits for the frames there, which have the same type."""
_PREFETCH = 4  # frames that are decoded ahead
_CONVERTING = 8  # threads: one of them takes longer for a 4K frame than a fast model
_RECENT = 31  # frames whose distances say what is usual
_GAP_FACTOR, _LEAST_GAP = 5, 0.5  # times the usual distance; seconds
_BLOCK, _NOISE = 8, 4.0  # pixels; levels of 255 that a block of a repeated frame may be off by its coding
_MOST_REPEATS = 4  # dropped in a row: a longer run is no pulldown but a static picture


@dataclasses.dataclass(frozen=True)
class FrameFilter:
    """Treatment of scene cuts and repeated frames."""

    scene_cut: float = CUT
    """Difference times change of histogram (shards/sequence_filter.py) above which a new scene starts; 0: never."""
    drop_duplicates: bool = False
    """Drop frames that repeat the one before (pulldown, animation on twos), so that motion is spread evenly."""
    max_gap: float | None = None
    """Seconds between two frames above which nothing is interpolated; None: five times the usual time, at least 0.5."""


@dataclasses.dataclass
class ConversionStats:
    """Statistics of a conversion."""

    read: int = 0
    written: int = 0
    made: int = 0
    """Frames that the model interpolated."""
    cuts: int = 0
    dropped: int = 0
    gaps: int = 0
    """Pairs too far apart in time to be interpolated."""
    reading: float = 0.0
    """Seconds spent reading frames."""
    writing: float = 0.0
    """Seconds spent writing frames."""


def add_frames(
    source: Source,
    sink: Sink,
    line: Timeline,
    between: InterpolationEngine,
    care: FrameFilter,
    tick: Callable[[], object] = lambda: None,
) -> ConversionStats:
    """Write all frames and the in-between frames; `tick` is called for each frame read. JobError for a source without frames.

    Where the sink is already `done` with some frames, the in-between frames among them are not interpolated again.
    """
    counts = ConversionStats()
    # in this order: the reading thread must end before its source is closed, and no frame is converted after that
    with (
        ThreadPoolExecutor(max(2, min(_CONVERTING, os.cpu_count() or 1))) as pool,
        BackgroundWriter(sink) as behind,
        contextlib.closing(prefetch(_shown(source, counts, pool), _PREFETCH)) as items,
    ):
        work = _Work(source, behind, line, between, care, counts, pool)
        for item in items:
            if isinstance(item, _Shown):
                work.take(item)
                tick()
            else:
                behind.put(functools.partial(sink.copy, item))
        work.finish()
    return counts


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A frame of the source and its conversions. The frame's own times are changed when it is written."""

    frame: av.VideoFrame
    pts: int
    duration: int
    converted: Future[tuple[np.ndarray, np.ndarray]]

    @property
    def image(self) -> np.ndarray:
        """Return the frame as RGB `[H, W, 3]`, after waiting for its conversion."""
        return self.converted.result()[0]

    @property
    def thumbnail(self) -> np.ndarray:
        """Return the luma at a small size, after waiting for its conversion."""
        return self.converted.result()[1]


def _shown(source: Source, counts: ConversionStats, pool: ThreadPoolExecutor) -> Iterator[_Shown | av.Packet]:
    """Yield the frames and packets of a source; frames are converted in the background."""

    def convert(frame: av.VideoFrame) -> tuple[np.ndarray, np.ndarray]:
        return to_planes(frame, source.colours, source.colours.depth).transpose(1, 2, 0), VideoFrame(frame).thumbnail()

    items = source.read()
    usual = round(1 / source.rate / source.base)
    while True:
        began = time.perf_counter()
        item = next(items, None)
        counts.reading += time.perf_counter() - began
        if item is None:
            return
        if isinstance(item, av.VideoFrame):
            yield _Shown(item, item.pts or 0, item.duration or usual, pool.submit(convert, item))
        else:
            yield item


class _Work:
    """One conversion in progress."""

    def __init__(
        self,
        source: Source,
        behind: BackgroundWriter,
        line: Timeline,
        between: InterpolationEngine,
        care: FrameFilter,
        counts: ConversionStats,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.source, self.behind, self.line, self.between, self.care = source, behind, line, between, care
        self.counts, self.pool = counts, pool
        self.before: _Shown | None = None
        self.repeats, self.start = 0, 0
        self.end = 0  # of the latest frame, also where it repeats the one before
        self.gaps = deque[int]((round(1 / source.rate / source.base),), maxlen=_RECENT)  # between the latest frames

    def take(self, after: _Shown) -> None:
        """Take the next frame of the source and start the interpolation of the pair that it completes."""
        self.counts.read += 1
        if self.before is None:
            if self.line.slowdown > 1:  # or a late start would come later still
                self.start = after.pts
            self.line.start(after.pts - self.start, self.source.base)
        elif self._is_repeated(self.before, after):
            self.repeats += 1
            self.counts.dropped += 1
            self.end = after.pts + after.duration
            return
        else:
            self._pair(self.before, after)
        self.before, self.repeats, self.end = after, 0, after.pts + after.duration

    def finish(self) -> None:
        """Write the last frame for as long as it is shown."""
        if self.before is None:
            raise JobError("there are no frames in it")
        frame, pts = self.before.frame, self.before.pts
        self._put(list(self.line.last(pts - self.start, self.end - pts)), lambda moment: frame, last=True)

    def _is_repeated(self, before: _Shown, after: _Shown) -> bool:
        wanted = self.care.drop_duplicates and self.repeats < _MOST_REPEATS
        return wanted and is_duplicate(before.thumbnail, after.thumbnail) and not _differs(before.image, after.image)

    def _is_gap(self, time: int) -> bool:
        """Return whether two frames, `time` apart, are too far apart to be interpolated."""
        usual = statistics.median(self.gaps) * self.source.base
        self.gaps.append(time)
        longest = self.care.max_gap if self.care.max_gap is not None else max(_GAP_FACTOR * usual, _LEAST_GAP)
        return time * self.source.base > longest

    def _pair(self, before: _Shown, after: _Shown) -> None:
        moments = list(self.line.between(before.pts - self.start, after.pts - self.start))
        gap = self._is_gap(after.pts - before.pts)
        cut = not gap and bool(self.care.scene_cut) and is_cut(before.thumbnail, after.thumbnail, self.care.scene_cut)
        self.counts.cuts += cut
        self.counts.gaps += gap
        asked = [moment.timestep for moment in moments if moment.timestep]
        done = self.counts.written + len(moments) <= self.behind.sink.done
        if not asked or gap or cut or done or _same(before, after):
            half = Fraction(1, 2)
            self._put(moments, lambda moment: before.frame if moment.timestep < half or not cut else after.frame)
            return
        wait = self.between(before.image, after.image, asked)
        self.counts.made += len(asked)

        def convert() -> dict[Fraction, av.VideoFrame]:
            images = zip(asked, wait(), strict=True)
            return {timestep: from_rgb(image, self.source.colours, self.behind.sink.pix_fmt) for timestep, image in images}

        made = self.pool.submit(convert)
        self._put(moments, lambda moment: made.result()[moment.timestep] if moment.timestep else before.frame)

    def _put(self, moments: Sequence[OutputFrame], frame: Callable[[OutputFrame], av.VideoFrame], last: bool = False) -> None:
        """Queue frames for writing; `frame` waits for each. `last`: there are none after these."""
        sink = self.behind.sink

        def write() -> None:
            for moment in moments:
                there = frame(moment)
                began = time.perf_counter()
                sink.write(there, moment.pts, moment.duration, last and moment is moments[-1])
                self.counts.writing += time.perf_counter() - began

        self.behind.put(write)
        self.counts.written += len(moments)


def _differs(before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether two frames `[H, W, 3]` differ by more than coding noise in any block of 8x8 pixels."""
    height, width = (side // _BLOCK * _BLOCK for side in before.shape[:2])
    limit = _NOISE * np.iinfo(before.dtype).max / 255
    difference = np.abs(after.astype(np.int32) - before).max(axis=2)
    blocks = difference[:height, :width].reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK).mean((1, 3))
    rest = difference[height:].max(initial=0), difference[:, width:].max(initial=0)
    return bool(blocks.max(initial=0) > limit or max(rest) > 4 * limit)


def _same(before: _Shown, after: _Shown) -> bool:
    """Return whether two frames are bitwise equal; most differ in their thumbnails already."""
    return np.array_equal(before.thumbnail, after.thumbnail) and np.array_equal(before.image, after.image)
