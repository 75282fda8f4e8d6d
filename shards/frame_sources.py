"""Find the clips in a folder and read their frames. A clip is a video file or a folder that directly holds images.

    for clip in find_clips(Path("videos")):
        for frame in read_clip(clip):
            rgb = frame.rgb()            # uint8 [H, W, 3], upright
            luma = frame.thumbnail()     # float32 [THUMBNAIL], 0 to 255, cheap

Frames are read one by one, so memory does not grow with the length of a clip.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from shards import codecs
from shards.color_conversion import describe_colours, is_rgb, to_rgb
from shards.schema import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardError
from shards.video_reader import VideoReader

THUMBNAIL = (72, 128)  # height, width
FAR = 200  # frame number from which seeking is faster than decoding from the start


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip of a source folder. `name` is its relative path; `images` are the frame files, empty for a video file."""

    name: str
    path: Path
    images: tuple[Path, ...] = ()

    def files(self) -> tuple[Path, ...]:
        """Return the files of the clip."""
        return self.images or (self.path,)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A seek point in a long video: key frame `number` with time stamp `pts`; `checksum` is that of the wanted frame."""

    number: int
    pts: int
    checksum: int


class VideoFrame:
    """A decoded frame of a video file, converted on demand. Raises ShardError for colours that can't be converted."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self._frame = frame
        self._colours = describe_colours(frame)
        # rotation that players apply, as to videos of a phone held upright, in counterclockwise quarter turns
        self._quarters = round(frame.rotation / 90) % 4

    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels as displayed."""
        height, width = self._frame.height, self._frame.width
        return (width, height) if self._quarters % 2 else (height, width)

    def rgb(self, max_height: int | None = None) -> np.ndarray:
        """Return RGB uint8 [H, W, 3], downscaled as by `shrink` if it is higher than `max_height`."""
        if max_height is None or is_rgb(self._frame.format):
            return shrink(self._upright(to_rgb(self._frame, self._colours)), max_height)
        height, width = shrunk_size(*self.size(), max_height)  # together with the conversion this is ten times as fast
        size = (width, height) if self._quarters % 2 else (height, width)
        return self._upright(to_rgb(self._frame, self._colours, size=size))

    def _upright(self, image: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(image, self._quarters))

    @property
    def pts(self) -> int:
        """Return the time at which it is shown, in the time base of its stream."""
        return self._frame.pts or 0

    def entry(self) -> int | None:
        """Return the time stamp of a key frame, where decoding can start; None for other frames."""
        return self.pts if self._frame.key_frame else None

    def checksum(self) -> int:
        """Return a checksum by which the same frame is recognized on another reading."""
        return zlib.crc32(self.thumbnail().tobytes())

    def thumbnail(self) -> np.ndarray:
        """Return small luma float32 [THUMBNAIL], 0 to 255, by one thread; not rotated, as only neighbours are compared."""
        small = self._frame.reformat(THUMBNAIL[1], THUMBNAIL[0], format="gray", interpolation=Interpolation.AREA, threads=1)
        return small.to_ndarray().astype(np.float32)


class ImageFrame:
    """A frame file of a folder, read on demand."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rgb: np.ndarray | None = None

    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        height, width = self.rgb().shape[:2]
        return height, width

    def rgb(self, max_height: int | None = None) -> np.ndarray:
        """Return RGB uint8 [H, W, 3], downscaled if it is higher than `max_height`."""
        if self._rgb is None:
            self._rgb = codecs.read_image(self._path)
        return shrink(self._rgb, max_height)

    def thumbnail(self) -> np.ndarray:
        """Return small luma float32 [THUMBNAIL], 0 to 255."""
        grey = Image.fromarray(self.rgb()).convert("L")
        return np.asarray(grey.resize(THUMBNAIL[::-1], Image.Resampling.BOX, reducing_gap=2.0), dtype=np.float32)


def shrunk_size(height: int, width: int, max_height: int | None) -> tuple[int, int]:
    """Return the (height, width) to which a frame higher than `max_height` is downscaled: same aspect ratio, even sides."""
    if max_height is None or height <= max_height:
        return height, width
    new_height = max_height // 2 * 2
    return new_height, max(round(width * new_height / height / 2) * 2, 2)


def shrink(image: np.ndarray, max_height: int | None) -> np.ndarray:
    """Return RGB uint8 [H, W, 3] of the size that `shrunk_size` gives, antialiased."""
    height, width = shrunk_size(image.shape[0], image.shape[1], max_height)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def find_clips(src: Path) -> list[Clip]:
    """Return all clips below `src` in natural order of their names; hidden files and folders are skipped.

    Raises ShardError when the folder is missing or holds neither videos nor images.
    """
    if not src.exists():
        raise ShardError(f"source folder {src} does not exist")
    if not src.is_dir():
        raise ShardError(f"source {src} is not a folder: give the folder that holds the videos or the folders of frames")
    clips = []
    seen = {src.resolve()}
    for folder, folders, files in os.walk(src, followlinks=True):
        here = Path(folder)
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and _is_new(here / name, seen)]
        paths = [here / name for name in files if not name.startswith(".")]
        clips += [Clip(_relative(p, src), p) for p in paths if p.suffix.lower() in VIDEO_EXTENSIONS]
        frames = sorted((p for p in paths if p.suffix.lower() in IMAGE_EXTENSIONS), key=lambda p: natural(p.name))
        if frames:
            clips.append(Clip(_relative(here, src), here, tuple(frames)))
    if not clips:
        raise ShardError(
            f"source folder {src} holds no videos ({' '.join(sorted(VIDEO_EXTENSIONS))}) and no folders of images "
            f"({' '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    return sorted(clips, key=lambda clip: natural(clip.name))


def read_clip(clip: Clip, first: int = 0, entry: Entry | None = None) -> Iterator[VideoFrame | ImageFrame]:
    """Yield the frames of a clip in order, starting at frame number `first`.

    A video is decoded from its start to get there, or from `entry` if that demonstrably leads to the very same frame.
    Raises ShardError at the first frame that is missing or broken; all frames before it are valid.
    """
    if clip.images:
        yield from map(ImageFrame, clip.images[first:])
        return
    if entry is not None:
        with VideoReader(clip.path, clip.name, threads=1) as video:
            frames = _jump(video, first, entry)
            if frames is not None:
                yield from frames
                return
    with VideoReader(clip.path, clip.name, threads=1) as video:  # clips are read in parallel, and with threads an error is late
        yield from itertools.islice(_frames(video), first, None)


def promised_frames(path: Path) -> int:
    """Return the frame count in the header of a video file, 0 if not stated. Raises ShardError for an unusable file."""
    with VideoReader(path, path.name) as video:
        return video.stream.frames


def nearest_entry(entries: Sequence[tuple[int, int]], checksums: Sequence[int], first: int) -> Entry | None:
    """Return the last of the `entries` (number, time stamp of key frames) not after frame `first`; None if it saves little."""
    before = [entry for entry in entries if entry[0] <= first]
    if first < FAR or not before:
        return None
    return Entry(*before[-1], checksums[first])


def _jump(video: VideoReader, first: int, entry: Entry) -> Iterator[VideoFrame] | None:
    """Return the frames from number `first` on by seeking to `entry`; None when that leads to any other frame."""
    try:
        video.seek(entry.pts)
        # frames before the key frame may depend on data that was skipped
        shown = itertools.dropwhile(lambda frame: frame.pts < entry.pts, _frames(video))
        frames = itertools.islice(shown, first - entry.number, None)
        found = next(frames, None)
    except (av.FFmpegError, OSError, ShardError):
        return None
    if found is None or found.checksum() != entry.checksum:
        return None
    return itertools.chain([found], frames)


def _frames(video: VideoReader) -> Iterator[VideoFrame]:
    for frame in video.read():
        assert isinstance(frame, av.VideoFrame)  # there are no other streams
        try:
            yield VideoFrame(frame)
        except ShardError as error:
            raise ShardError(f"{video.name}: {error}") from error


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a sort key by which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def _relative(path: Path, src: Path) -> str:
    return path.relative_to(src).as_posix() if path != src else src.resolve().name


def _is_new(folder: Path, seen: set[Path]) -> bool:
    """Return False for a folder that has been visited, so that links can't lead in circles."""
    real = folder.resolve()
    is_new = real not in seen
    seen.add(real)
    return is_new
