"""Combs in frames that are not marked as interlaced: telecine, and interlaced video whose marks were lost.

A frame is woven of two fields: its even rows and its odd rows. The rows of each field are compared with those of the other one,
in the frame itself and in the two frames that could be woven of it and the next one. In whole frames that move, the frame
itself is the smoothest of the three. In interlaced video, whose fields are equally far apart in time, it is no smoother than
one of the others; in film at 30 frames a second, one or two of five frames are rougher than one of the others. Only what moves
is compared, so that fine patterns are no combs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal

import av
import numpy as np
from av.video.reformatter import Interpolation

Pattern = Literal["", "interlaced", "telecine"]
_COLUMNS = 256  # are enough
_ROWS = 6  # are needed
_MOST, _ENOUGH = 90, 12  # frames that are looked at; that move and are whole, after which no more are
_LEVELS, _LEAST_PART = 12, 0.002  # by which a pixel moves; part of the pixels that must
_MOVED = 0.1  # least change of roughness, as a part of it, that says anything
_CLEAR = 0.3  # of the larger change: the smaller one of whole frames is larger, that of interlaced ones smaller
_COMBED = 0.8  # least roughness of rows, as a part of that of every other row, of frames that are combed
_CYCLE, _CYCLES = 5, 3  # frames of telecine with the same pattern; cycles that must show it
_INTERLACED = 8  # frames that must be


def find_combs(frames: Iterable[av.VideoFrame]) -> Pattern:
    """Return the pattern of the combs in the first frames of a video; no more are taken than is needed."""
    kinds, moving = list[str](), list[str]()
    lumas = map(_luma, itertools.islice(frames, _MOST))
    for before, after in itertools.pairwise(lumas):
        kinds.append(_kind(before, after) if before.shape == after.shape and len(before) >= _ROWS else "?")
        moving += [kinds[-1]] if kinds[-1] != "?" else []
        if len(moving) >= _ENOUGH and moving.count("whole") > 0.9 * len(moving):
            return ""
    if _has_cadence(kinds):
        return "telecine"
    most = max(moving.count("late"), moving.count("early"))
    return "interlaced" if most >= _INTERLACED and most > 0.8 * len(moving) else ""


def _luma(frame: av.VideoFrame) -> np.ndarray:
    small = frame.reformat(min(_COLUMNS, frame.width), frame.height, "gray", interpolation=Interpolation.POINT, threads=1)
    return small.to_ndarray()[: frame.height // 2 * 2].astype(np.int16)


def _kind(frame: np.ndarray, after: np.ndarray) -> str:
    """Return what a frame [H, W] is: whole, rough (smoother with a field of the next one), equally smooth with its even rows of
    the next frame (late) or its odd ones (early), or ? where that can't be told.
    """
    moved = np.abs(after - frame) > _LEVELS
    around = moved[2:-2] | moved[1:-3] | moved[3:-1]
    if around.mean() < _LEAST_PART:
        return "?"
    late, early = frame.copy(), frame.copy()
    late[0::2], early[1::2] = after[0::2], after[1::2]
    own, late_one, early_one = (_roughness(one, 1)[around].mean() for one in (frame, late, early))
    changes = late_one - own, early_one - own
    largest = max(map(abs, changes))
    if largest < _MOVED * own:
        return "?"
    least = min(changes) / largest
    rows_agree = own <= _COMBED * _roughness(frame, 2)[around].mean()  # with their neighbours more than with the next but one
    if least > _CLEAR or rows_agree:
        return "whole"
    if least < -_CLEAR:
        return "rough"
    return "late" if changes[0] < changes[1] else "early"


def _roughness(frame: np.ndarray, apart: int) -> np.ndarray:
    """Return the difference of rows, without two at either end, from the mean of those `apart` above and below, times two."""
    rows = len(frame)
    return np.abs(2 * frame[2:-2] - frame[2 - apart : rows - 2 - apart] - frame[2 + apart : rows - 2 + apart])


def _has_cadence(kinds: list[str]) -> bool:
    """Return whether frames are combed in one or two neighbouring places of five, and next to none is rough elsewhere."""
    inside, outside = [], 0
    for place in range(_CYCLE):
        there = [kind for kind in kinds[place::_CYCLE] if kind != "?"]
        rough, combed = there.count("rough"), len(there) - there.count("whole")
        inside.append(combed >= max(_CYCLES, 0.7 * len(there)))
        outside += 0 if inside[-1] else rough
    neighbours = any(inside[place] and inside[place - 1] for place in range(_CYCLE))
    return (sum(inside) == 1 or (sum(inside) == 2 and neighbours)) and outside < 0.1 * kinds.count("rough")
