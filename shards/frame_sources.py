"""What clips are in a folder, and what are their frames? A clip is a video file or a folder that directly holds images.

    for clip in find_clips(Path("videos")):
        for frame in read_clip(clip):
            rgb = frame.rgb()            # uint8 [H, W, 3], upright
            luma = frame.thumbnail()     # float32 [THUMBNAIL], 0 to 255, cheap

Frames come one by one, so memory does not grow with the length of a clip.
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
from av.container import InputContainer
from av.video import VideoStream
from av.video.reformatter import Interpolation
from PIL import Image

from shards import codecs
from shards.color_conversion import assume_left_chroma, describe_colours, is_rgb, to_rgb
from shards.schema import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardError

THUMBNAIL = (72, 128)  # height, width
FAR = 200  # frames: from here on it pays to jump instead of decoding from the start


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip of a source folder. `name` is its relative path; `images` are the frame files, empty for a video file."""

    name: str
    path: Path
    images: tuple[Path, ...] = ()

    def files(self) -> tuple[Path, ...]:
        """The files that the clip is made of."""
        return self.images or (self.path,)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A way into a long video: start at the key frame `number` with time stamp `pts`; `checksum` is the wanted frame's."""

    number: int
    pts: int
    checksum: int


class VideoFrame:
    """A decoded frame of a video file; converted only when asked. Raises ShardError for colours that can't be converted."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self._frame = frame
        self._colours = describe_colours(frame)
        # the turn that players apply to videos of a phone that was held upright, in quarters, counterclockwise
        self._quarters = round(frame.rotation / 90) % 4

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels as shown."""
        height, width = self._frame.height, self._frame.width
        return (width, height) if self._quarters % 2 else (height, width)

    def rgb(self, max_height: int | None = None) -> np.ndarray:
        """Return RGB uint8 [H, W, 3], made smaller as `shrink` does where it is higher than `max_height`."""
        if max_height is None or is_rgb(self._frame.format):
            return shrink(self._upright(to_rgb(self._frame, self._colours)), max_height)
        height, width = shrunk_size(*self.size(), max_height)  # in one step with the conversion, which is ten times as fast
        size = (width, height) if self._quarters % 2 else (height, width)
        return self._upright(to_rgb(self._frame, self._colours, size=size))

    def _upright(self, image: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(image, self._quarters))

    def entry(self) -> int | None:
        """The time stamp of a key frame, where decoding can start; None for other frames."""
        return self._frame.pts if self._frame.key_frame else None

    def checksum(self) -> int:
        """Tells whether a frame is the one seen before."""
        return zlib.crc32(self.thumbnail().tobytes())

    def thumbnail(self) -> np.ndarray:
        """Small luma float32 [THUMBNAIL], 0 to 255, by one thread (not turned: it is only compared with its neighbours)."""
        small = self._frame.reformat(THUMBNAIL[1], THUMBNAIL[0], format="gray", interpolation=Interpolation.AREA, threads=1)
        return small.to_ndarray().astype(np.float32)


class ImageFrame:
    """A frame file of a folder; read only when asked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rgb: np.ndarray | None = None

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.rgb().shape[:2]
        return height, width

    def rgb(self, max_height: int | None = None) -> np.ndarray:
        """Return RGB uint8 [H, W, 3], made smaller where it is higher than `max_height`."""
        if self._rgb is None:
            self._rgb = codecs.read_image(self._path)
        return shrink(self._rgb, max_height)

    def thumbnail(self) -> np.ndarray:
        """Small luma float32 [THUMBNAIL], 0 to 255."""
        grey = Image.fromarray(self.rgb()).convert("L")
        return np.asarray(grey.resize(THUMBNAIL[::-1], Image.Resampling.BOX, reducing_gap=2.0), dtype=np.float32)


def shrunk_size(height: int, width: int, max_height: int | None) -> tuple[int, int]:
    """Return the (height, width) that a frame is given where it is higher than `max_height`: the same shape, even sides."""
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
    """All clips below `src` in natural order of their names; hidden files and folders are passed over.

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
    """The frames of a clip in order from frame number `first` on.

    A video is decoded from its start to get there, or from `entry` where that proves to give the very same frame.
    Raises ShardError at the first frame that is missing or broken: what came before it is good.
    """
    if clip.images:
        yield from map(ImageFrame, clip.images[first:])
        return
    try:
        if entry is not None:
            with av.open(str(clip.path)) as container:
                frames = _jump(container, first, entry)
                if frames is not None:
                    yield from frames
                    return
        with av.open(str(clip.path)) as container:
            yield from itertools.islice(_decode(container), first, None)
    except ShardError as error:
        raise ShardError(f"{clip.name}: {error}") from error
    except (av.FFmpegError, OSError) as error:
        raise ShardError(f"{clip.name}: {error.strerror or error}") from error


def promised_frames(path: Path) -> int:
    """How many frames the head of a video file promises, 0 where it does not say. Raises ShardError for an unusable file."""
    try:
        with av.open(str(path)) as container:
            return _video_stream(container).frames
    except (av.FFmpegError, OSError) as error:
        raise ShardError(f"{path.name}: {error.strerror or error}") from error


def nearest_entry(entries: Sequence[tuple[int, int]], checksums: Sequence[int], first: int) -> Entry | None:
    """The last of the `entries` (number and time stamp of key frames) before frame `first`, None where it saves little."""
    before = [entry for entry in entries if entry[0] <= first]
    if first < FAR or not before:
        return None
    return Entry(*before[-1], checksums[first])


def _jump(container: InputContainer, first: int, entry: Entry) -> Iterator[VideoFrame] | None:
    """Frames from number `first` on by way of `entry`, None when that leads anywhere else than to the frame seen before."""
    stream = _video_stream(container)
    try:
        container.seek(entry.pts, stream=stream)
        decoded = itertools.chain.from_iterable(packet.decode() for packet in container.demux(stream))
        # frames before the key frame may lean on what was jumped over
        shown = itertools.dropwhile(lambda frame: frame.pts is None or frame.pts < entry.pts, decoded)
        frames = itertools.islice(map(VideoFrame, map(_undamaged, shown)), first - entry.number, None)
        found = next(frames, None)
    except (av.FFmpegError, OSError, ShardError):
        return None
    if found is None or found.checksum() != entry.checksum:
        return None
    return itertools.chain([found], frames)


def _decode(container: InputContainer) -> Iterator[VideoFrame]:
    stream = _video_stream(container)
    count = hidden = 0
    end = 0.0
    for packet in container.demux(stream):
        hidden += packet.is_discard  # the container says not to show it
        for frame in packet.decode():
            yield VideoFrame(_undamaged(frame))
            count += 1
            end = frame.time or end
    # a file that was cut off often just ends: compare with what its head promises, where it promises anything
    if count < 0.95 * (stream.frames - hidden):
        raise ShardError(f"ends after {count} of {stream.frames - hidden} frames")
    promised = _seconds(stream.metadata.get("DURATION", ""))
    if end < 0.9 * promised and promised - end > 2 / float(stream.average_rate or 1):
        raise ShardError(f"ends after {end:.2f} of {promised:.2f} seconds")


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise ShardError("no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # clips are read in parallel; and with threads a fault shows up late
    assume_left_chroma(stream)
    return stream


def _undamaged(frame: av.VideoFrame) -> av.VideoFrame:
    if frame.is_corrupt:
        raise ShardError(f"the frame at {frame.time or 0:.2f} seconds is damaged")
    return frame


def _seconds(text: str) -> float:
    """'00:01:02.500000000', as Matroska notes a track's length, in seconds; 0 for anything else."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key by which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def _relative(path: Path, src: Path) -> str:
    return path.relative_to(src).as_posix() if path != src else src.resolve().name


def _is_new(folder: Path, seen: set[Path]) -> bool:
    """False for a link to a folder that is read already: such a link could lead round in circles."""
    real = folder.resolve()
    is_new = real not in seen
    seen.add(real)
    return is_new
