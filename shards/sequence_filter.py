"""Select the sequences of a clip that are worth training on: those without scene cuts and repeated frames.

    found = find_sequences(clip, frames=3, stride=1, step=1)
    found.starts            # frame numbers at which a usable sequence starts

Frames are compared as small luma images (`frame_sources.THUMBNAIL`, 0 to 255) by two measures of a pair:

- difference: the mean absolute difference of the two images;
- histogram change: the fraction of pixels that changed to another of 32 brightness levels, 0 to 1.

A scene cut changes both. Fast motion moves pixels but keeps the histogram, so the measure of a cut is their product. On 85
mixed clips, pairs at cuts have products of at least 13, all other pairs of at most 8.5. Repeated frames that went through a
lossy codec still differ by up to about 0.3; sequences with real motion start at about 0.4.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from shards.frame_sources import Clip, VideoFrame, read_clip
from shards.schema import ShardError

CUT = 10.0  # difference times histogram change
DUPLICATE = 0.38  # difference
_LEVELS = 32


@dataclasses.dataclass(frozen=True)
class Found:
    """Usable sequences of one clip. `fault` says why reading ended early; it is None for a complete clip."""

    frames: int
    starts: tuple[int, ...]
    scene_cut: int  # sequences left out because of a scene cut, or of a change of the frame size
    duplicate: int  # sequences left out because of repeated frames
    fault: str | None
    entries: tuple[tuple[int, int], ...] = ()  # number and time stamp of a video's key frames
    checksums: Sequence[int] = ()  # of a video's frames, 32 bits each


def find_sequences(clip: Clip, frames: int, stride: int, step: int) -> Found:
    """Read a clip and classify its sequences of `frames` frames, `stride` apart, with one starting every `step` frames."""
    cuts = [False]  # by frame number: whether there is a cut between the previous frame and this one
    repeats = [False] * stride  # by frame number: whether it repeats the frame `stride` earlier
    recent: collections.deque[np.ndarray] = collections.deque(maxlen=stride)
    size = None
    count, fault = 0, None
    entries: list[tuple[int, int]] = []
    checksums = array.array("I")
    try:
        for frame in read_clip(clip):
            small = frame.thumbnail()
            if recent:
                cuts.append(size != frame.size() or is_cut(recent[-1], small))
            if len(recent) == stride:
                repeats.append(is_duplicate(recent[0], small))
            recent.append(small)
            size = frame.size()
            if isinstance(frame, VideoFrame):
                checksums.append(zlib.crc32(small.tobytes()))
                if (pts := frame.entry()) is not None:
                    entries.append((count, pts))
            count += 1
    except ShardError as error:
        fault = str(error)
    starts, scene_cut, duplicate = _sort(count, cuts, repeats, frames, stride, step)
    if any(after[1] <= before[1] for before, after in itertools.pairwise(entries)):
        entries = []  # time stamps that don't increase can't be used to seek
    return Found(count, starts, scene_cut, duplicate, fault, tuple(entries), checksums)


def is_cut(before: np.ndarray, after: np.ndarray, threshold: float = CUT) -> bool:
    """Return whether a new scene starts between two neighbouring frames, given as thumbnails, 0 to 255."""
    return float(np.abs(after - before).mean()) * _histogram_change(before, after) > threshold


def is_duplicate(before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether the second frame (almost) repeats the first one. Both are thumbnails, 0 to 255."""
    return float(np.abs(after - before).mean()) < DUPLICATE


def _histogram_change(before: np.ndarray, after: np.ndarray) -> float:
    first, second = (
        np.bincount((image / (256 / _LEVELS)).astype(np.int64).ravel(), minlength=_LEVELS) for image in (before, after)
    )
    return float(np.abs(first - second).sum()) / (2 * before.size)


def _sort(
    count: int, cuts: list[bool], repeats: list[bool], frames: int, stride: int, step: int
) -> tuple[tuple[int, ...], int, int]:
    """Return the starts of the usable sequences, and how many were left out for scene cuts and for repeated frames."""
    span = (frames - 1) * stride
    starts, scene_cut, duplicate = [], 0, 0
    cuts_before = np.cumsum(cuts)
    for start in range(0, count - span, step):
        if cuts_before[start + span] > cuts_before[start]:
            scene_cut += 1
        elif any(repeats[start + stride * n] for n in range(1, frames)):
            duplicate += 1
        else:
            starts.append(start)
    return tuple(starts), scene_cut, duplicate
