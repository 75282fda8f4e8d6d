"""Scores of predicted frames, sample by sample, stored as soon as they are computed.

measure(task, predictors, cache, …)          # this rank's share of the samples
rows = summarise(cache.finish(…))
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vfi.errors import JobError
from vfi.evaluation.partial_scores import ScoreCache
from vfi.evaluation.protocols import Rules
from vfi.evaluation.results import BASELINES, FRAME_AVERAGE, ImageScore
from vfi.evaluation.task import EvaluationTask, Sample
from vfi.metrics.image_quality import interpolation_error, psnr, psnr_in, psnr_of_changes, ssim_matlab, ssim_skimage
from vfi.metrics.motion import FlowMethod, MotionStats, estimate, flow_processes
from vfi.runtime.prefetch import map_ahead

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""img0, img1 `[1, 3, H, W]` in [0, 1], timestep `[1]` -> imgt."""
Step = Callable[[Tensor, Tensor, float], Tensor]
Lpips = Callable[[Tensor, Tensor], Tensor]
"""prediction, truth `[1, 3, H, W]` in [0, 1] -> `[1]`; see vfi/metrics/lpips.py."""
_WORTH_PROCESSES = 4  # samples per worker from which processes that estimate motion are worth their start


class EvalOptions(NamedTuple):
    """Settings of a measurement that are independent of the protocol's rules."""

    tta: bool
    motion: bool
    """Whether motion between the inputs is estimated."""
    lpips: Lpips | None
    workers: int
    """Threads that estimate motion ahead of time."""


class Scores(NamedTuple):
    """All scores of a row of the results."""

    images: tuple[ImageScore, ...]
    changes: float | None
    """Mean over the samples of the PSNR of the changes; None for sets with one truth per sample."""


def baseline(name: str, sample: Sample) -> list[Tensor]:
    """Predict a frame for each target without a model."""
    if name == FRAME_AVERAGE:
        return [frame_average(sample)] * len(sample.targets)
    return [sample.img0 if target.timestep <= 0.5 else sample.img1 for target in sample.targets]


def predict(sample: Sample, predictor: Predictor, task: EvaluationTask, tta: bool) -> list[Tensor]:
    """Predict a frame for each target with a model."""
    return predict_between(predictor, sample.img0, sample.img1, [target.timestep for target in sample.targets], task.rules, tta)


def measure(
    task: EvaluationTask, predictors: Mapping[str, Predictor], cache: ScoreCache, options: EvalOptions, show: bool
) -> None:
    """Score both baselines and all models on the samples missing in the cache. Raises JobError for non-finite predictions."""
    numbers = cache.missing(task.samples)
    makers: dict[str, Callable[[Sample], list[Tensor]]] = {name: partial(baseline, name) for name in BASELINES}
    makers |= {
        name: partial(predict, predictor=predictor, task=task, tta=options.tta) for name, predictor in predictors.items()
    }
    processes = options.workers if options.motion and len(numbers) >= _WORTH_PROCESSES * options.workers else 0
    with flow_processes(processes) as flow_method:
        samples = _with_motion(task.read(numbers), options, flow_method)
        bar = tqdm(samples, total=len(numbers), unit="sample", desc="benchmark", disable=None if show else True)
        for number, (sample, motion) in zip(numbers, bar, strict=True):
            rows = {name: _score(name, sample, make(sample), motion, task, options) for name, make in makers.items()}
            cache.add(number, {"length": motion.length if motion else None, "rows": rows})


def summarise(found: Sequence[Any]) -> tuple[dict[str, Scores], tuple[float, ...]]:
    """Combine the cache's entries of all samples -> scores by row, and the motion of each image."""
    rows = {}
    for name in found[0]["rows"]:
        of_row = [sample["rows"][name] for sample in found]
        changes = [one["changes"] for one in of_row if one["changes"] is not None]
        images = tuple(ImageScore(*image) for one in of_row for image in one["images"])
        rows[name] = Scores(images, statistics.mean(changes) if changes else None)
    lengths = [sample["length"] for sample in found for _ in sample["rows"][FRAME_AVERAGE]["images"]]
    return rows, () if None in lengths else tuple(lengths)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _score(
    name: str, sample: Sample, frames: Sequence[Tensor], motion: MotionStats | None, task: EvaluationTask, options: EvalOptions
) -> dict[str, Any]:
    """Score the frames of one row on one sample, in the form that the cache stores."""
    images = []
    for target, frame in zip(sample.targets, frames, strict=True):
        values = score(frame, target.truth, task.rules, motion.moving if motion else None, options.lpips)
        if not np.isfinite([value for value in values if value is not None]).all():
            raise JobError(f"{name} predicts values that are not finite for {target.key!r}: it cannot be scored")
        images.append([target.key, *values])
    changes = None
    if len(frames) > 1:
        changes = psnr_of_changes(frames, [target.truth for target in sample.targets], sample.img0, sample.img1).item()
    return {"images": images, "changes": changes}


def _with_motion(
    samples: Iterable[Sample], options: EvalOptions, flow_method: FlowMethod
) -> Iterator[tuple[Sample, MotionStats | None]]:
    """Yield samples with an estimate of their motion, which threads prefetch."""

    def with_motion(sample: Sample) -> tuple[Sample, MotionStats | None]:
        return sample, estimate(sample.img0, sample.img1, flow_method) if options.motion else None

    return map_ahead(with_motion, samples, options.workers if options.motion else 0)


def frame_average(sample: Sample) -> Tensor:
    """Return the mean of both frames."""
    return (sample.img0 + sample.img1) / 2


class Score(NamedTuple):
    """Scores of one predicted frame."""

    psnr: float
    """PSNR in dB."""
    ssim: float
    """SSIM of the kind that the rules name."""
    ie: float
    """Interpolation error on the scale 0 … 255."""
    psnr_moving: float | None = None
    """PSNR in dB of the pixels that move."""
    lpips: float | None = None


def predict_between(
    predictor: Predictor, img0: Tensor, img1: Tensor, timesteps: Sequence[float], rules: Rules, tta: bool
) -> list[Tensor]:
    """Predict the frames at these timesteps, in the size of the inputs.

    `tta`: each is the mean of the prediction and of the prediction for the inputs rotated by 180 degrees, rotated back.
    """
    left, right, top, bottom = rules.padding.amounts(*img0.shape[-2:]) if rules.padding else (0, 0, 0, 0)
    mode = "constant" if rules.padding and rules.padding.mode == "zeros" else "replicate"
    first, last = (F.pad(image, (left, right, top, bottom), mode=mode) for image in (img0, img1))

    def step(first: Tensor, last: Tensor, timestep: float) -> Tensor:
        time = torch.full((1,), timestep, device=first.device)
        found = predictor(first, last, time)
        return (found + predictor(first.flip(2, 3), last.flip(2, 3), time).flip(2, 3)) / 2 if tta else found

    if rules.recursive:
        found = _bisect(step, first, last, timesteps)
    else:
        found = [step(first, last, timestep) for timestep in timesteps]
    height, width = first.shape[-2:]
    return [frame[..., top : height - bottom, left : width - right] for frame in found]


def _bisect(step: Step, first: Tensor, last: Tensor, timesteps: Sequence[float]) -> list[Tensor]:
    """Predict frames at 1/2^n, 2/2^n … recursively: each in the middle of two that are already there."""
    count = len(timesteps) + 1
    if count & (count - 1) or list(timesteps) != [number / count for number in range(1, count)]:
        raise ValueError(f"bisecting finds 1, 3, 7 … evenly spaced frames, not those at {list(timesteps)}")
    if count == 1:
        return []
    half = [number / (count // 2) for number in range(1, count // 2)]
    middle = step(first, last, 0.5)
    return [*_bisect(step, first, middle, half), middle, *_bisect(step, middle, last, half)]


def score(prediction: Tensor, truth: Tensor, rules: Rules, moving: Tensor | None = None, lpips: Lpips | None = None) -> Score:
    """Score a frame against its truth, `[1, 3, H, W]` in [0, 1] each; `moving` `[1, 1, H, W]` bool: the pixels that move."""
    seen = (prediction.float().clamp(0, 1) * 255).round() / 255 if rules.rounded else prediction
    similarity = ssim_matlab if rules.ssim == "ssim_matlab" else ssim_skimage
    return Score(
        psnr(seen, truth).item(),
        similarity(seen, truth).item(),
        interpolation_error(prediction, truth).item(),
        psnr_in(seen, truth, moving).item() if moving is not None and moving.any() else None,
        lpips(seen, truth).item() if lpips else None,
    )
