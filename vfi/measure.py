"""How good is each frame that a model makes? The samples of a bench, one by one -> scores, kept as they come.

measure(bench, asks, ledger, …)          # this process's share
rows = summarise(ledger.finish(…))
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from vfi.bench import Bench, Sample
from vfi.errors import JobError
from vfi.ledger import Ledger
from vfi.metrics import psnr_of_changes
from vfi.motion import Motion, estimate
from vfi.result_pictures import frame_average
from vfi.results import BASELINES, FRAME_AVERAGE, ImageScore
from vfi.scoring import Ask, Lpips, predict_between, score


class Way(NamedTuple):
    """How a benchmark measures, beside the rules of its protocol."""

    tta: bool
    motion: bool
    """Estimate how far things move?"""
    lpips: Lpips | None
    workers: int
    """Threads that estimate motion beforehand."""


class Scores(NamedTuple):
    """All that was measured of one row."""

    images: tuple[ImageScore, ...]
    changes: float | None
    """Mean over the samples of the PSNR of the changes; None for sets with one truth a sample."""


def baseline(name: str, sample: Sample) -> list[Tensor]:
    """What needs no model, for each target."""
    if name == FRAME_AVERAGE:
        return [frame_average(sample)] * len(sample.targets)
    return [sample.img0 if target.timestep <= 0.5 else sample.img1 for target in sample.targets]


def predict(sample: Sample, ask: Ask, bench: Bench, tta: bool) -> list[Tensor]:
    """A model's frame for each target."""
    return predict_between(ask, sample.img0, sample.img1, [target.timestep for target in sample.targets], bench.rules, tta)


def measure(bench: Bench, asks: Mapping[str, Ask], ledger: Ledger, way: Way, show: bool) -> None:
    """Score what is missing in the ledger by both baselines and all models; JobError for values that are no numbers."""
    numbers = ledger.missing(bench.samples)
    makers: dict[str, Callable[[Sample], list[Tensor]]] = {name: partial(baseline, name) for name in BASELINES}
    makers |= {name: partial(predict, ask=ask, bench=bench, tta=way.tta) for name, ask in asks.items()}
    samples = _with_motion(bench.read(numbers), way)
    bar = tqdm(samples, total=len(numbers), unit="sample", desc="benchmark", disable=None if show else True)
    for number, (sample, motion) in zip(numbers, bar, strict=True):
        rows = {name: _score(name, sample, make(sample), motion, bench, way) for name, make in makers.items()}
        ledger.add(number, {"length": motion.length if motion else None, "rows": rows})


def summarise(found: Sequence[Any]) -> tuple[dict[str, Scores], tuple[float, ...]]:
    """What the ledger holds of all samples -> scores by row, and the motion of each image."""
    rows = {}
    for name in found[0]["rows"]:
        of_row = [sample["rows"][name] for sample in found]
        changes = [one["changes"] for one in of_row if one["changes"] is not None]
        images = tuple(ImageScore(*image) for one in of_row for image in one["images"])
        rows[name] = Scores(images, statistics.mean(changes) if changes else None)
    lengths = [sample["length"] for sample in found for _ in sample["rows"][FRAME_AVERAGE]["images"]]
    return rows, () if None in lengths else tuple(lengths)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _score(
    name: str, sample: Sample, frames: Sequence[Tensor], motion: Motion | None, bench: Bench, way: Way
) -> dict[str, Any]:
    """Scores of one row on one sample, as the ledger keeps them."""
    images = []
    for target, frame in zip(sample.targets, frames, strict=True):
        values = score(frame, target.truth, bench.rules, motion.moving if motion else None, way.lpips)
        if not np.isfinite([value for value in values if value is not None]).all():
            raise JobError(f"{name} predicts values that are not finite for {target.key!r}: it cannot be scored")
        images.append([target.key, *values])
    changes = None
    if len(frames) > 1:
        changes = psnr_of_changes(frames, [target.truth for target in sample.targets], sample.img0, sample.img1).item()
    return {"images": images, "changes": changes}


def _with_motion(samples: Iterable[Sample], way: Way) -> Iterator[tuple[Sample, Motion | None]]:
    """Samples with an estimate of their motion, some of which are made beforehand in threads."""
    if not way.motion or not way.workers:
        for sample in samples:
            yield sample, estimate(sample.img0, sample.img1) if way.motion else None
        return
    with ThreadPoolExecutor(way.workers) as pool:
        waiting: deque[tuple[Sample, Future[Motion]]] = deque()
        for sample in samples:
            waiting.append((sample, pool.submit(estimate, sample.img0, sample.img1)))
            if len(waiting) > way.workers:
                first, motion = waiting.popleft()
                yield first, motion.result()
        for first, motion in waiting:
            yield first, motion.result()
