"""How does a stream of frames become one with more of them? Pair by pair, so that memory does not grow with its length.

    counts = add_frames(source, sink, Multiply(2), between, Care())

`source` and `sink` are videos (vfi/video/container.py) or folders of frames; `between(img0, img1, timesteps)` begins with the
frames between two, and gives what waits for them. Reading, converting, the model, and writing go on at the same time. Frames of
the input go out as they came; a scene cut is not blended, and where two frames are the same nothing is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np

from shards.color_conversion import from_rgb, to_planes
from shards.frame_sources import VideoFrame
from shards.sequence_filter import CUT, is_cut, is_duplicate
from vfi.errors import JobError
from vfi.video.interfaces import Sink, Source
from vfi.video.prefetch import _ahead, _Behind
from vfi.video.timeline import Moment, Timeline

Between = Callable[[np.ndarray, np.ndarray, Sequence[Fraction]], Callable[[], list[np.ndarray]]]
"""Two frames `[H, W, 3]` uint8 or uint16, timesteps -> what waits for the frames there, of the same kind."""
_CONVERTING = 8  # threads for it: a frame of 4K takes one of them longer than a fast model
_MOST_REPEATS = 4  # in a row that are dropped: a longer one is no pulldown but a picture that stands still


@dataclasses.dataclass(frozen=True)
class Care:
    """What is looked out for."""

    scene_cut: float = CUT
    """Difference times change of histogram (shards/sequence_filter.py) above which a new scene starts; 0: never."""
    drop_duplicates: bool = False
    """Leave out frames that repeat the one before (pulldown, animation on twos), so that motion is spread evenly."""


@dataclasses.dataclass
class Counts:
    """What was done."""

    read: int = 0
    written: int = 0
    made: int = 0
    """By the model."""
    cuts: int = 0
    dropped: int = 0
    reading: float = 0.0
    """Seconds for which frames were read."""
    writing: float = 0.0
    """… and written."""


def add_frames(
    source: Source, sink: Sink, line: Timeline, between: Between, care: Care, tick: Callable[[], object] = lambda: None
) -> Counts:
    """Write all frames and those between; `tick` is called for each frame read. JobError for a source without frames.

    Where the sink is `done` with some frames already, those between are not made again.
    """
    counts = Counts()
    # in this order: the thread that reads has to end before its source is closed, and nothing is converted for nobody
    with (
        ThreadPoolExecutor(max(2, min(_CONVERTING, os.cpu_count() or 1))) as pool,
        _Behind(sink) as behind,
        contextlib.closing(_ahead(_shown(source, counts, pool))) as items,
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
    """A frame of the source, in the forms that are needed. Its own times are changed when it is written."""

    frame: av.VideoFrame
    pts: int
    duration: int
    converted: Future[tuple[np.ndarray, np.ndarray]]

    @property
    def image(self) -> np.ndarray:
        """RGB `[H, W, 3]`; waits for it."""
        return self.converted.result()[0]

    @property
    def thumbnail(self) -> np.ndarray:
        """Small luma; waits for it."""
        return self.converted.result()[1]


def _shown(source: Source, counts: Counts, pool: ThreadPoolExecutor) -> Iterator[_Shown | av.Packet]:
    """What a source has; frames are converted meanwhile."""

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
    """One conversion under way."""

    def __init__(
        self, source: Source, behind: _Behind, line: Timeline, between: Between, care: Care, counts: Counts,
        pool: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        self.source, self.behind, self.line, self.between, self.care = source, behind, line, between, care
        self.counts, self.pool = counts, pool
        self.before: _Shown | None = None
        self.repeats = 0

    def take(self, after: _Shown) -> None:
        """The next frame of the source: what lies before it can be made."""
        self.counts.read += 1
        if self.before is None:
            self.line.start(after.pts, self.source.base)
        elif self._is_repeated(self.before, after):
            self.repeats += 1
            self.counts.dropped += 1
            return
        else:
            self._pair(self.before, after)
        self.before, self.repeats = after, 0

    def finish(self) -> None:
        """The last frame, as long as it is shown."""
        if self.before is None:
            raise JobError("there are no frames in it")
        frame = self.before.frame
        self._put(list(self.line.last(self.before.pts, self.before.duration)), lambda moment: frame)

    def _is_repeated(self, before: _Shown, after: _Shown) -> bool:
        wanted = self.care.drop_duplicates and self.repeats < _MOST_REPEATS
        return wanted and is_duplicate(before.thumbnail, after.thumbnail)

    def _pair(self, before: _Shown, after: _Shown) -> None:
        moments = list(self.line.between(before.pts, after.pts))
        cut = bool(self.care.scene_cut) and is_cut(before.thumbnail, after.thumbnail, self.care.scene_cut)
        self.counts.cuts += cut
        asked = [moment.timestep for moment in moments if moment.timestep]
        done = self.counts.written + len(moments) <= self.behind.sink.done
        if not asked or cut or done or _same(before, after):
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

    def _put(self, moments: Sequence[Moment], frame: Callable[[Moment], av.VideoFrame]) -> None:
        """Have frames written; `frame` waits for each."""
        sink = self.behind.sink

        def write() -> None:
            for moment in moments:
                there = frame(moment)
                began = time.perf_counter()
                sink.write(there, moment.pts)
                self.counts.writing += time.perf_counter() - began

        self.behind.put(write)
        self.counts.written += len(moments)


def _same(before: _Shown, after: _Shown) -> bool:
    """To the last bit? Most are told apart by their thumbnails."""
    return np.array_equal(before.thumbnail, after.thumbnail) and np.array_equal(before.image, after.image)
