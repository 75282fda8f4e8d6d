"""How does a stream of frames become one with more of them? Pair by pair, so that memory does not grow with its length.

    counts = add_frames(source, sink, Multiply(2), between, Care())

`source` and `sink` are videos (vfi/video.py) or folders of frames; `between(img0, img1, timesteps)` gives frames as arrays.
Reading, the model, and writing go on at the same time. Frames of the input go out as they came; a scene cut is not blended, and
where two frames are the same nothing is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import av
import numpy as np
from PIL import Image

from shards.clips import VideoFrame
from shards.images import read_image
from shards.sequences import CUT, is_cut, is_duplicate
from vfi.errors import JobError
from vfi.timeline import Moment, Timeline
from vfi.video import Colours, from_rgb, to_rgb

Between = Callable[[np.ndarray, np.ndarray, Sequence[Fraction]], list[np.ndarray]]
"""Two frames `[H, W, 3]` uint8 or uint16, timesteps -> the frames there, of the same kind."""
T = TypeVar("T")
_AHEAD = 8  # frames read beforehand, or waiting to be written
_MOST_REPEATS = 4  # in a row that are dropped: a longer one is no pulldown but a picture that stands still


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

    def write(self, frame: av.VideoFrame, pts: int) -> None:
        """Take a frame."""

    def copy(self, packet: av.Packet) -> None:
        """Take a packet."""


@dataclasses.dataclass(frozen=True)
class Care:
    """What is looked out for."""

    scene_cut: float = CUT
    """Difference times change of histogram (shards/sequences.py) above which a new scene starts; 0: never."""
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


def add_frames(
    source: Source, sink: Sink, line: Timeline, between: Between, care: Care, tick: Callable[[], object] = lambda: None
) -> Counts:
    """Write all frames and those between; `tick` is called for each frame read. JobError for a source without frames."""
    work = _Work(source, sink, line, between, care)
    # closed: the thread that reads has to end before its source is closed
    with _Behind(sink) as behind, contextlib.closing(_ahead(source.read())) as items:
        work.sink = behind
        for item in items:
            if isinstance(item, av.Packet):
                behind.copy(item)
            else:
                work.take(item)
                tick()
        work.finish()
    return work.counts


class _Work:
    """One conversion under way."""

    def __init__(self, source: Source, sink: Sink, line: Timeline, between: Between, care: Care) -> None:
        self.source, self.sink, self.line, self.between, self.care = source, sink, line, between, care
        self.counts = Counts()
        self.before: av.VideoFrame | None = None
        self.pts = self.duration = self.repeats = 0  # of `before`, whose own are changed when it is written
        self.thumbnail = np.empty(0)

    def take(self, frame: av.VideoFrame) -> None:
        """The next frame of the source: what lies before it can be made."""
        self.counts.read += 1
        thumbnail, pts, duration = VideoFrame(frame).thumbnail(), frame.pts or 0, frame.duration
        if self.before is None:
            self.line.start(pts, self.source.base)
        elif self.care.drop_duplicates and self.repeats < _MOST_REPEATS and is_duplicate(self.thumbnail, thumbnail):
            self.repeats += 1
            self.counts.dropped += 1
            return
        else:
            self._pair(self.before, frame, pts, self._is_cut(thumbnail))
        self.before, self.thumbnail, self.repeats = frame, thumbnail, 0
        self.pts, self.duration = pts, duration or round(1 / self.source.rate / self.source.base)

    def finish(self) -> None:
        """The last frame, as long as it is shown."""
        if self.before is None:
            raise JobError("there are no frames in it")
        self._put([(self.before, moment) for moment in self.line.last(self.pts, self.duration)])

    def _is_cut(self, thumbnail: np.ndarray) -> bool:
        return bool(self.care.scene_cut) and is_cut(self.thumbnail, thumbnail, self.care.scene_cut)

    def _pair(self, before: av.VideoFrame, after: av.VideoFrame, pts: int, cut: bool) -> None:
        self.counts.cuts += cut
        moments = list(self.line.between(self.pts, pts))
        asked = [moment for moment in moments if moment.timestep]
        images: dict[Fraction, av.VideoFrame] = {}
        if asked and not cut:
            img0, img1 = (to_rgb(frame, self.source.colours) for frame in (before, after))
            if not np.array_equal(img0, img1):
                found = self.between(img0, img1, [moment.timestep for moment in asked])
                self.counts.made += len(found)
                made = (from_rgb(image, self.source.colours, self.sink.pix_fmt) for image in found)
                images = dict(zip((moment.timestep for moment in asked), made, strict=True))
        half = Fraction(1, 2)
        self._put([(images.get(m.timestep, before if m.timestep < half or not cut else after), m) for m in moments])

    def _put(self, frames: Sequence[tuple[av.VideoFrame, Moment]]) -> None:
        for frame, moment in frames:
            self.sink.write(frame, moment.pts)
            self.counts.written += 1


def _ahead(items: Iterator[T]) -> Generator[T]:
    """The same, some of which are got beforehand by a thread."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 (raised again where the items are taken)
            put((False, error))
        else:
            put((False, None))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()
        thread.join()


class _Behind:
    """A sink that a thread writes to while one goes on. What goes wrong there is raised at the next call, or at the end."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.pix_fmt = sink, sink.pix_fmt
        self.waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(_AHEAD)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.waiting.put(None)
        self.thread.join()
        if kind is None and self.error is not None:
            raise self.error

    def write(self, frame: av.VideoFrame, pts: int) -> None:
        """Take a frame, to be written soon."""
        self._put(lambda: self.sink.write(frame, pts))

    def copy(self, packet: av.Packet) -> None:
        """Take a packet, to be written soon."""
        self._put(lambda: self.sink.copy(packet))

    def _put(self, work: Callable[[], None]) -> None:
        if self.error is not None:
            raise self.error
        self.waiting.put(work)

    def _work(self) -> None:
        while (work := self.waiting.get()) is not None:
            if self.error is None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 (raised again where frames are given)
                    self.error = error


class FolderInput:
    """Image files as frames, in the order given, all of one size."""

    colours = Colours()

    def __init__(self, paths: Sequence[Path], fps: Fraction) -> None:
        self.paths, self.rate, self.base = paths, fps, 1 / fps
        self.expected = len(paths)

    def read(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Each as it is needed."""
        for number, path in enumerate(self.paths):
            frame = av.VideoFrame.from_ndarray(read_image(path), format="rgb24")
            frame.pts, frame.time_base = number, self.base
            yield frame


class FolderOutput:
    """A folder of numbered PNG files: 00000000.png …"""

    pix_fmt = "rgb24"

    def __init__(self, folder: Path, colours: Colours) -> None:
        self.folder, self.colours, self.count = folder, colours, 0

    def write(self, frame: av.VideoFrame, pts: int) -> None:
        """The next file."""
        image = to_rgb(frame, dataclasses.replace(self.colours, bits=8))
        Image.fromarray(image).save(self.folder / f"{self.count:08d}.png", compress_level=1)
        self.count += 1

    def copy(self, packet: av.Packet) -> None:
        """Nothing but frames can be kept in a folder."""
