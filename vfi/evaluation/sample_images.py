"""Pictures of some samples of a benchmark, from the smallest gain over the frame average to the largest.

These samples are predicted again, since they are chosen only after all were measured, and saved as PNG files next to
results.json: frames, predictions, errors and flow.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vfi.errors import JobError
from vfi.evaluation.evaluator import frame_average
from vfi.evaluation.results import ERROR_WHITE, Picture, Row
from vfi.evaluation.task import EvaluationTask, Sample, Target
from vfi.metrics.flow_color import flow_picture

Predict = Callable[[Sample], list[Tensor]]
"""A sample -> a frame `[1, 3, H, W]` for each target."""
Flow = Callable[[Sample, Target], Tensor]
"""Flow `[1, 2, H, W]` from a target's timestep to the first frame."""
_ERROR_COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 224]], dtype=np.float64)


def pictures_folder(out: Path) -> Path:
    """Return the folder of the pictures of a results file."""
    return out.with_name(f"{out.stem}_pictures")


def check_folder(out: Path) -> None:
    """Raise JobError if something else is at that place."""
    folder = pictures_folder(out)
    if folder.exists() and (not folder.is_dir() or any(file.suffix != ".png" for file in folder.iterdir())):
        raise JobError(f"{folder} is where the pictures go, but holds something else: move it or take another --out")


def draw_pictures(
    out: Path,
    number: int,
    task: EvaluationTask,
    average: Row,
    model: Row,
    models: Mapping[str, Predict],
    flows: Mapping[str, Flow],
) -> list[Picture]:
    """Choose `number` images by the gain of `model`, predict them by all models and save the pictures."""
    gains = np.array([b.psnr - a.psnr for a, b in zip(average.images, model.images, strict=True)])
    order = np.argsort(gains, kind="stable")
    ranks = sorted({round(rank) for rank in np.linspace(0, len(order) - 1, min(number, len(order)))})
    rank_of = {int(order[rank]): rank + 1 for rank in ranks}
    folder = pictures_folder(out)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        pictures = []
        numbers = sorted({image // task.targets for image in rank_of})
        for at, sample in zip(numbers, task.read(numbers), strict=True):
            images = {name: predict(sample) for name, predict in models.items()}
            for which, target in enumerate(sample.targets):
                if rank := rank_of.get(at * task.targets + which):
                    chosen = {name: found[which] for name, found in images.items()}
                    moved = {name: flow(sample, target) for name, flow in flows.items()}
                    pictures.append(_Saver(temporary, folder.name, rank).save(len(order), sample, target, chosen, moved))
        shutil.rmtree(folder, ignore_errors=True)
        if pictures:
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(pictures, key=lambda picture: picture.rank)


class _Saver:
    """Writes the pictures of one image."""

    def __init__(self, folder: Path, shown_as: str, rank: int) -> None:
        self.folder, self.shown_as, self.rank = folder, shown_as, rank

    def save(
        self, of: int, sample: Sample, target: Target, predictions: dict[str, Tensor], flows: dict[str, Tensor]
    ) -> Picture:
        """Save all pictures and return their paths."""
        frames = {"img0": sample.img0, "img1": sample.img1, "truth": target.truth, "average": frame_average(sample)}
        return Picture(
            key=target.key,
            rank=self.rank,
            of=of,
            **{kind: self._file(kind, to_bytes(image)) for kind, image in frames.items()},
            average_error=self._file("average_error", error_map(frames["average"], target.truth)),
            predictions=self._files("model", {name: to_bytes(image) for name, image in predictions.items()}),
            errors=self._files("error", {name: error_map(image, target.truth) for name, image in predictions.items()}),
            flows=self._files("flow", {name: flow_picture(flow[0].float().cpu().numpy()) for name, flow in flows.items()}),
        )

    def _files(self, kind: str, images: dict[str, np.ndarray]) -> dict[str, str]:
        return {name: self._file(f"{kind}{number}", image) for number, (name, image) in enumerate(images.items())}

    def _file(self, kind: str, image: np.ndarray) -> str:
        name = f"{self.rank:06d}_{kind}.png"
        Image.fromarray(image).save(self.folder / name)
        return f"{self.shown_as}/{name}"


def to_bytes(image: Tensor) -> np.ndarray:
    """Convert `[1, 3, H, W]` in [0, 1] to RGB uint8 [H, W, 3], for display."""
    return (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def error_map(prediction: Tensor, truth: Tensor) -> np.ndarray:
    """Draw the mean absolute error over the colours as RGB uint8 [H, W, 3], black (0) over red to white (ERROR_WHITE)."""
    error = (prediction - truth).abs().mean(1)[0].cpu().numpy() / ERROR_WHITE
    stops = np.linspace(0, 1, len(_ERROR_COLOURS))
    return np.stack([np.interp(error, stops, channel) for channel in _ERROR_COLOURS.T], axis=-1).round().astype(np.uint8)
