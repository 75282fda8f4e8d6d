"""Work behind the web page, without Gradio: interpolate between two images, or convert a video to a smoother or slower one.

    work = Session(model, device, precision, folder)
    made = work.images(Path("a.png"), Path("b.png"), timestep=0.5, slower=8, report=print)
    left, right = compared(made.moment, "frame average")

Results are files in the folder; each job replaces those of the one before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from shards.codecs import read_image
from shards.color_conversion import from_rgb, to_rgb
from shards.frame_sources import VideoFrame
from shards.sequence_filter import is_cut
from vfi.errors import JobError, message_of
from vfi.runtime.device import DeviceName, PrecisionName, describe_precision
from vfi.video.container import Encoding, VideoOutput
from vfi.video.convert import ConversionSettings, build_engine, check_sizes, convert
from vfi.video.video_input import VideoInput

MAX_FRAMES = 900
"""Most frames that a video may have: half a minute at 30 frames per second."""
MAX_VIDEO, MAX_IMAGE = (1080, 1920), (2160, 3840)
"""(height, width) whose product is the largest number of pixels that a video frame or an image may have."""
CLIP_FPS = Fraction(16)
COMPARE = ("frame average", "first frame", "second frame")
Report = Callable[[float, str], object]
"""Called with the fraction of a job that is done, from 0 to 1, and with a description of the current step."""


class Moment(NamedTuple):
    """Two frames and the in-between frame of the model, each RGB uint8 `[H, W, 3]`."""

    img0: np.ndarray
    img1: np.ndarray
    imgt: np.ndarray
    timestep: float


class Made(NamedTuple):
    """The results of a job, as the page shows them."""

    moment: Moment | None
    """None for a video in which nothing moves."""
    result: Path
    """The image or video to download."""
    clip: Path | None
    """The video to play: for two images the slow motion, None if it was not requested."""
    said: str


class Session:
    """The model and the folder of its results; JobError, ShardError and CheckpointError say what can't be done."""

    def __init__(self, model: Path | None, device: DeviceName, precision: PrecisionName, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        self.settings = ConversionSettings(model, device=device, precision=precision)
        self.model = build_engine(self.settings)
        self.closed, self.busy = threading.Event(), threading.Lock()

    @property
    def about(self) -> str:
        """Return the model and the device in one line."""
        model, loaded = self.model, self.model.loaded
        return f"{loaded.name}, step {loaded.step:,} · {model.device.type}, {describe_precision(model.precision)}"

    def images(self, path0: Path | None, path1: Path | None, timestep: float, slower: int, report: Report) -> Made:
        """Interpolate between two images and, unless `slower` is 0, make a clip, back and forth, `slower` times as slow."""
        if path0 is None or path1 is None:
            raise JobError(f"the {'first' if path0 is None else 'second'} image is missing: two are needed")
        images = img0, img1 = read_image(path0), read_image(path1)
        names = (Path(f"the {which} image ({path.name})") for which, path in (("first", path0), ("second", path1)))
        check_sizes(dict(zip(names, (image.shape[:2] for image in images), strict=True)))
        _check_pixels(img0.shape[:2], MAX_IMAGE, "images", f"vfi interpolate {path0.name} {path1.name} -o between.png")
        with self._job():
            report(0, "The image between")
            (imgt,) = self.model(img0, img1, [timestep])
            result = self.results / "between.png"
            Image.fromarray(imgt).save(result, compress_level=1)
            clip = self._clip(img0, img1, slower, report) if slower else None
        height, width = imgt.shape[:2]
        said = f"{width}x{height}, timestep {timestep:g}" + (f"; {slower - 1} frames between for slow motion" if slower else "")
        return Made(Moment(img0, img1, imgt, timestep), result, clip, said)

    def video(self, path: Path | None, slow: bool, factor: int, report: Report) -> Made:
        """Convert a video to `factor` times as many frames or, with `slow`, to one `factor` times as slow."""
        if path is None:
            raise JobError("the video is missing: drop one above")
        flag = "--slowmo" if slow else "--multiplier"
        command = f"vfi interpolate {path.name} -o out.mp4 {flag} {factor}"
        out = self.results / f"{path.stem}_{'slow' if slow else 'x'}{factor}.mp4"
        wanted = dataclasses.replace(
            self.settings, codec="libx264", pix_fmt="yuv420p",  # supported by all browsers
            slowmo=factor if slow else None, multiplier=None if slow else factor,
        )  # fmt: skip
        with self._job():
            report(0, "Looking at the video")
            frames, pair = self._look(path, command)
            done = 0

            def tick() -> None:
                nonlocal done
                done += 1
                self._go_on()
                report(done / frames, f"Frame {done} of {frames}")

            line = convert(wanted, path, out, self.model, tick)
            moment = Moment(*pair, self.model(*pair, [0.5])[0], 0.5) if pair else None
        return Made(moment, out, out, line.removeprefix(f"{out}: "))

    def _look(self, path: Path, command: str) -> tuple[int, tuple[np.ndarray, np.ndarray] | None]:
        """Return the number of frames and the two neighbours, upright, that differ most without a scene cut; None without
        change.

        Raises JobError or ShardError for a file that is too long, too large or not a video.
        """
        count, most, before, pair = 0, 0.0, None, None
        with VideoInput(path) as video:
            _check_pixels((video.height, video.width), MAX_VIDEO, "frames", command)
            for frame in (item for item in video.read() if isinstance(item, av.VideoFrame)):
                self._go_on()
                count += 1
                if max(count, video.expected or 0) > MAX_FRAMES:
                    raise JobError(
                        f"the video has more than the {MAX_FRAMES} frames that the page takes: use the command line, {command}"
                    )
                thumbnail = VideoFrame(frame).thumbnail()
                if before is not None:
                    change = float(np.abs(thumbnail - before[1]).mean())
                    if change > most and not is_cut(before[1], thumbnail):
                        most, pair = change, (before[0], frame)
                before = frame, thumbnail
            if count < 2:
                raise JobError(
                    f"{path.name} has fewer than two frames, so there is nothing between: two images go into the other tab"
                )
            images = [np.rot90(to_rgb(one, video.colours), round(one.rotation / 90) % 4) for one in pair or ()]
            turned = [np.ascontiguousarray(image) for image in images]
        return count, (turned[0], turned[1]) if pair else None

    def line_of(self, error: Exception) -> str:
        """Return the error message without the names of temporary folders and of objects in memory."""
        return re.sub(rf"{re.escape(str(self.folder))}/(?:[^/\s]+/)*| <_io\.BytesIO[^>]*>", "", message_of(error))

    @contextlib.contextmanager
    def _job(self) -> Iterator[None]:
        """Run one job at a time; its results replace those of the one before, which the page has copied."""
        with self.busy:
            self._go_on()
            shutil.rmtree(self.results, ignore_errors=True)
            self.results.mkdir()
            yield

    def _go_on(self) -> None:
        if self.closed.is_set():
            raise JobError("the page was closed")

    def _clip(self, img0: np.ndarray, img1: np.ndarray, slower: int, report: Report) -> Path:
        times = [Fraction(step, slower) for step in range(1, slower)]
        between: list[np.ndarray] = []
        while len(between) < len(times):
            self._go_on()
            report(len(between) / len(times), "Slow motion")
            between += self.model(img0, img1, times[len(between) : len(between) + 4])
        path = self.results / "slow.mp4"
        sink = VideoOutput(
            path, None, (img0.shape[0], img0.shape[1]), 1 / CLIP_FPS, CLIP_FPS, Encoding("libx264", preset="medium")
        )
        try:
            for number, image in enumerate([img0, *between, img1, *reversed(between)]):
                sink.write(from_rgb(image, sink.colours, "rgb24"), number)
            sink.close()
        finally:
            sink.give_up()
        return path


def _check_pixels(size: Sequence[int], most: tuple[int, int], what: str, command: str) -> None:
    if size[0] * size[1] > most[0] * most[1]:
        raise JobError(
            f"{what} of {size[1]}x{size[0]} are too large for the page, which takes up to {most[1]}x{most[0]}: "
            f"take the command line, {command}"
        )


def compared(moment: Moment | None, choice: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the images left and right of the slider: the one that `choice` of COMPARE names, and the one of the model."""
    if moment is None:
        return None
    img0, img1, imgt, timestep = moment
    average = np.rint((1 - timestep) * img0.astype(np.float32) + timestep * img1.astype(np.float32)).astype(np.uint8)
    return dict(zip(COMPARE, (average, img0, img1), strict=True))[choice], imgt
