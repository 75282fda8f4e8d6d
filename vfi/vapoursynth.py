"""Interpolate a VapourSynth clip: more frames in the same time, for mpv, vspipe and scripts of one's own.

    import vapoursynth as vs
    from vfi.vapoursynth import interpolate
    clip = clip.resize.Bicubic(format=vs.RGBS, matrix_in_s="709")
    clip = interpolate(clip)                                            # twice as many frames
    clip = interpolate(clip, factor_num=5, factor_den=2)                # or fps_num=60000, fps_den=1001

Frame n of the output lies at n / factor frames of the input, an exact fraction. VapourSynth asks for frames from several
threads and in any order; each pair is computed once, for all frames between it.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from shards.factories import is_factory
from shards.frame_sources import THUMBNAIL
from shards.sequence_filter import is_cut
from vfi.errors import JobError
from vfi.evaluation.external_models import load_adapter
from vfi.inference.array_io import read_pair
from vfi.inference.engine import Images, InterpolationEngine, Settings, keep_static_regions
from vfi.inference.loading import check_scale
from vfi.model.interpolator import MIN_SIZE
from vfi.pretrained import check_choice
from vfi.runtime.device import DeviceName, PrecisionName, pick_device

try:
    import vapoursynth as vs
except ImportError as error:
    raise ImportError(
        f"vfi.vapoursynth needs the package vapoursynth, which has wheels for Python 3.12 and newer (pip install vapoursynth); "
        f"this is Python {platform.python_version()}: {error}"
    ) from None

MAX_FACTOR = 64
_MOST_FRAMES = 2**31 - 1  # of a clip
_HALF = Fraction(1, 2)

Start = Callable[[np.ndarray, np.ndarray, Sequence[Fraction]], Callable[[], Images]]
"""Two frames `[H, W, 3]` float32 in [0, 1], timesteps -> a function that waits for the frames there."""


def interpolate(
    clip: vs.VideoNode,
    model: str | Path | None = None,
    factor_num: int | None = None,
    factor_den: int | None = None,
    fps_num: int | None = None,
    fps_den: int | None = None,
    scale: float | str | None = None,
    sc: bool = True,
    *,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    tta: bool = False,
    static_regions: bool = True,
    tile: int | None = None,
    max_memory: float | None = None,
) -> vs.VideoNode:
    """Return the clip with `factor_num / factor_den` (default: 2) times its frames, or with `fps_num / fps_den` a second.

    `clip` is RGBS or RGBH, of one format and size. N frames become N times the factor, rounded up; those behind the last frame
    repeat it. With a factor, frames are shown for their part of the input's durations, also where these vary; with `fps_num`,
    which needs a constant rate, all equally long. Frames of the input keep their pixels; the model sees them clamped to [0, 1].

    `model`: a run, checkpoint, folder of `vfi export`, ORG/NAME on the hub, MODULE:FACTORY of your own, or None for the one
    that comes with the package. `sc`: do not blend scene cuts, which are where `_SceneChangeNext` says so, or are detected
    where a frame lacks it; up to half-way the frame before is shown, then the one after. The other settings are those of
    vfi.inference.engine.Settings.

    Raises JobError for an unusable clip or argument, and CheckpointError for an unusable model.
    """
    _check_clip(clip)
    target = _ratio("fps", fps_num, fps_den)
    step = _step(clip, _ratio("factor", factor_num, factor_den), target)
    clip = clip[: math.floor(_MOST_FRAMES * step)]  # a player that doesn't know the length gives the clip billions of frames
    frames = math.ceil(clip.num_frames / step)
    check_choice("device", device, get_args(DeviceName))
    check_choice("precision", precision, get_args(PrecisionName))
    settings = Settings(None, device, precision, scale, tta, tile, static_regions, max_memory)
    if is_factory(str(model)):
        start = _external(str(model), settings)
    else:
        start = InterpolationEngine(dataclasses.replace(settings, model=None if model is None else Path(model))).start
    pairs = _Pairs(start, step, vs.core.num_threads)

    def at(clip: vs.VideoNode, shift: int) -> vs.VideoNode:
        """Return the clip whose frame n is that at floor(n step) + shift; the last frame repeats."""
        end = clip[-1] * min(shift, clip.num_frames) if shift else None
        shifted = clip if end is None else clip[shift:] + end if shift < clip.num_frames else end
        cycle, several = 2 * step.numerator, 2 * step.denominator  # a cycle of one frame is refused
        if several > frames:
            cycle, several = max(2, clip.num_frames), frames
        offsets = [math.floor(number * step) for number in range(several)]
        return shifted.std.SelectEvery(cycle, offsets, modify_duration=False)

    around = [at(clip, shift) for shift in range(max(2, math.ceil(step) + 1))]
    small = clip.std.SetFieldBased(0).resize.Bicubic(*THUMBNAIL[::-1], format=vs.GRAY8, matrix_s="709", range_s="full")
    thumbnails = [at(small, shift) for shift in (0, 1)] if sc else []

    def make(n: int, f: list[vs.VideoFrame]) -> vs.VideoFrame:
        whole, timestep = divmod(n * step, 1)
        before, after = f[:2]
        is_last = whole == clip.num_frames - 1
        has_cut = sc and not is_last and _has_cut(before, *f[-2:])
        frame = (after if has_cut and timestep >= _HALF else before).copy()
        is_between = timestep and not has_cut and not is_last
        image = pairs.image(int(whole), timestep, before, after) if is_between else None
        if image is not None:
            for plane in range(3):
                np.copyto(np.asarray(frame[plane]), image[..., plane], casting="same_kind")
        durations = [_duration(one, clip.fps) for one in f[: len(around)]]
        _set_times(frame, before, timestep, step, durations, 1 / target if target else None)
        if sc:
            _set_scene_change(frame, has_cut, timestep, step)
        return frame

    template = at(clip, 0)
    if clip.fps:
        rate = clip.fps / step
        template = template.std.AssumeFPS(fpsnum=rate.numerator, fpsden=rate.denominator)
    inputs = around + thumbnails
    # a filter of its own for each frame: the calls of a single one follow one another, and a GPU would wait for copies
    return template.std.FrameEval(lambda n: template.std.ModifyFrame(inputs, make), clip_src=inputs)


class _Pair(NamedTuple):
    """A pair of frames whose in-between frames are computed or being computed."""

    wait: Callable[[], Images] | None
    """None: both are the same, and so is what lies between."""
    timesteps: list[Fraction]
    pending: set[Fraction]
    """Timesteps that nobody has asked for yet."""


class _Pairs:
    """The pairs that are being asked for: each is started once, for all of its timesteps."""

    def __init__(self, start: Start, step: Fraction, threads: int) -> None:
        self.start, self.step, self.lock = start, step, threading.Lock()
        self.most = threads + 2  # one that each thread waits for, and the newest; only after seeking there are more
        self.pairs: dict[int, _Pair] = {}
        self.latest: tuple[int, np.ndarray] | None = None

    def image(self, number: int, timestep: Fraction, before: vs.VideoFrame, after: vs.VideoFrame) -> np.ndarray | None:
        """Return the frame `[H, W, 3]` at a timestep between frame `number` and the next; None where they are the same."""
        with self.lock:
            pair = self.pairs.pop(number, None) or self._pair(number, before, after)
            pair.pending.discard(timestep)
            if pair.pending:
                self.pairs[number] = pair  # the newest one now
            if len(self.pairs) > self.most:
                del self.pairs[next(iter(self.pairs))]
        return pair.wait()[pair.timesteps.index(timestep)] if pair.wait else None

    def _pair(self, number: int, before: vs.VideoFrame, after: vs.VideoFrame) -> _Pair:
        held = self.latest is not None and self.latest[0] == number
        img0 = self.latest[1] if self.latest and held else _read(before, number)
        img1 = _read(after, number + 1)
        self.latest = (number + 1, img1)  # the engine knows it again by its identity
        outputs = range(math.ceil(number / self.step), math.ceil((number + 1) / self.step))
        timesteps = [timestep for output in outputs if (timestep := output * self.step - number)]
        wait = None if np.array_equal(img0, img1) else self.start(img0, img1, timesteps)
        return _Pair(wait, timesteps, set(timesteps))


def _external(model: str, settings: Settings) -> Start:
    """Return the model of the user's MODULE:FACTORY; it takes whole frames. JobError for settings that it doesn't have."""
    known = Settings(None, settings.device, scale=settings.scale, static_regions=settings.static_regions)
    if settings != known or isinstance(settings.scale, str):
        raise JobError(f"{model} takes device, static_regions and a number as scale; precision and the like are up to itself")
    check_scale(settings.scale, [])
    scale, device = settings.scale, pick_device(settings.device)
    adapter = load_adapter(model, device)

    def start(img0: np.ndarray, img1: np.ndarray, timesteps: Sequence[Fraction]) -> Callable[[], Images]:
        first, last, kind = read_pair(img0, img1, device)
        times = torch.tensor([float(timestep) for timestep in timesteps], device=device)
        made = torch.cat([adapter.ask(first, last, time, scale) for time in times.tolist()])
        made = keep_static_regions(made, first, last, times) if settings.static_regions else made
        return lambda: [kind.to_output(one) for one in made.split(1)]

    return start


def _check_clip(clip: Any) -> None:
    if not isinstance(clip, vs.VideoNode):
        raise JobError(f"clip is a {type(clip).__name__}; give a VapourSynth clip with video")
    if not clip.width or clip.format.color_family == vs.UNDEFINED:
        raise JobError(
            "the clip changes its size or format; give one of a constant size and format: "
            "clip.resize.Bicubic(width=W, height=H, format=vs.RGBS)"
        )
    if clip.format.id not in (vs.RGBS, vs.RGBH):
        matrix = "" if clip.format.color_family == vs.RGB else ', matrix_in_s="709"'
        raise JobError(f"the clip is {clip.format.name}; give RGBS or RGBH: clip = clip.resize.Bicubic(format=vs.RGBS{matrix})")
    if min(clip.width, clip.height) < MIN_SIZE:
        raise JobError(f"the clip is {clip.width}x{clip.height} (width x height): each side must be at least {MIN_SIZE}")


def _ratio(name: str, numerator: int | None, denominator: int | None) -> Fraction | None:
    """Return a fraction of two arguments, of which the second is 1 if it is left out; None where both are."""
    if numerator is None:
        if denominator is not None:
            raise JobError(f"{name}_den is {denominator} and {name}_num is missing: give both")
        return None
    for part, value in (("num", numerator), ("den", denominator)):
        if value is not None and (type(value) is not int or value < 1):
            raise JobError(f"{name}_{part} is {value!r}; it must be a whole number of at least 1")
    return Fraction(numerator, 1 if denominator is None else denominator)


def _step(clip: vs.VideoNode, factor: Fraction | None, target: Fraction | None) -> Fraction:
    """Return the time between two frames of the output, in frames of the input."""
    if factor and target:
        raise JobError(f"factor {factor} and {target} frames per second exclude each other: give one of them")
    if target and not clip.fps:
        raise JobError(
            "the clip has a variable frame rate, which fps_num can't make even: give factor_num, or state its rate before: "
            "clip.std.AssumeFPS(fpsnum=24000, fpsden=1001)"
        )
    factor = target / clip.fps if target else factor or Fraction(2)
    if not Fraction(1, MAX_FACTOR) <= factor <= MAX_FACTOR:
        raise JobError(f"{factor} times the frames were asked for; the factor must lie between 1/{MAX_FACTOR} and {MAX_FACTOR}")
    return 1 / factor


def _read(frame: vs.VideoFrame, number: int) -> np.ndarray:
    """Return the frame as `[H, W, 3]` float32, clamped to [0, 1]. Raises JobError where values are NaN, or there are fields."""
    if frame.props.get("_FieldBased"):
        raise JobError(
            f"frame {number} is interlaced (_FieldBased is {frame.props['_FieldBased']}): deinterlace the clip before it is "
            f"converted to RGB, or, if its frames are whole, clip.std.SetFieldBased(0)"
        )
    planes = np.empty((3, frame.height, frame.width), np.float32)
    for plane in range(3):
        np.copyto(planes[plane], np.asarray(frame[plane]))
    np.clip(planes, 0, 1, out=planes)
    if np.isnan(planes.max()):
        raise JobError(f"frame {number} has values that are NaN: find the filter that makes them")
    return planes.transpose(1, 2, 0)


def _has_cut(before: vs.VideoFrame, small: vs.VideoFrame, small_after: vs.VideoFrame) -> bool:
    """Return whether a new scene starts behind a frame: as it says itself, or by the thumbnails of it and the next one."""
    stated = before.props.get("_SceneChangeNext")
    if stated is not None:
        return bool(stated)
    return is_cut(np.asarray(small[0]).astype(np.float32), np.asarray(small_after[0]).astype(np.float32))


def _set_scene_change(frame: vs.VideoFrame, has_cut: bool, timestep: Fraction, step: Fraction) -> None:
    """Mark the two frames of the output between which the picture changes, where there is a cut behind an input's frame."""
    frame.props["_SceneChangeNext"] = int(has_cut and timestep < _HALF <= timestep + step)
    if timestep or step <= _HALF:  # else the frame is the first of its scene if it was in the input
        frame.props["_SceneChangePrev"] = int(has_cut and timestep - step < _HALF <= timestep)


def _duration(frame: vs.VideoFrame, rate: Fraction) -> Fraction | None:
    """Return the seconds for which a frame of the input is shown; None where neither it nor the clip says."""
    numerator, denominator = frame.props.get("_DurationNum"), frame.props.get("_DurationDen")
    if numerator is not None and denominator:
        return Fraction(numerator, denominator)
    return 1 / rate if rate else None


def _set_times(
    frame: vs.VideoFrame, before: vs.VideoFrame, timestep: Fraction, step: Fraction, durations: Sequence[Fraction | None],
    constant: Fraction | None,
) -> None:  # fmt: skip
    """Set duration and absolute time of a frame at `timestep` after the input's frame `before`.

    It is shown for the parts of the input's frames, of these durations from `before` on, that lie within `step`.
    """
    if "_AbsoluteTime" in before.props and durations[0] is not None:
        frame.props["_AbsoluteTime"] = before.props["_AbsoluteTime"] + float(timestep * durations[0])
    known = [one for one in durations if one is not None]
    duration = constant
    if constant is None and len(known) == len(durations):
        parts = [min(timestep + step, Fraction(n + 1)) - max(timestep, Fraction(n)) for n in range(len(known))]
        duration = sum((part * one for part, one in zip(parts, known, strict=True) if part > 0), Fraction(0))
    if duration is not None:
        frame.props["_DurationNum"], frame.props["_DurationDen"] = duration.numerator, duration.denominator
