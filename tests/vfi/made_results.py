"""Synthetic results and speed files for the tests of the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vfi.evaluation.latency_results import Speed, SpeedRow
from vfi.evaluation.results import BASELINES, FRAME_AVERAGE, NEAREST_FRAME, ImageScore, Picture, Results, Row

AVERAGE = [(30.0, 0.9), (32.0, 0.92), (28.0, 0.85)]
NEAREST = [(29.0, 0.8), (30.0, 0.9), (28.5, 0.86)]
BETTER = [(33.5, 0.95), (34.5, 0.96), (27.5, 0.84)]


def row(model: str, values: Sequence[tuple[float, float]], run: str | None = None, **changes) -> Row:
    images = tuple(ImageScore(f"sample-{i}", psnr, ssim, 100 - psnr) for i, (psnr, ssim) in enumerate(values))
    mean = [float(np.mean(column)) for column in zip(*values, strict=True)]
    about = (None,) * 6
    if model not in BASELINES:
        about = (f"runs/{model}", run or f"runs/{model}", 1200, 1_330_000, "tiny", 1)
    return dataclasses.replace(Row(model, *about, mean[0], mean[1], 100 - mean[0], images), **changes)


def results(model: str = "tiny", sha: str = "a" * 64, data: str = "shards/val", **changes) -> Results:
    rows = (row(FRAME_AVERAGE, AVERAGE), row(NEAREST_FRAME, NEAREST), row(model, BETTER))
    environment = {"precision": "fp32", "created": "2026-01-02T03:04:05+00:00", "device": "CPU"}
    return dataclasses.replace(
        Results(data, sha, 3, 3, {"protocol": "shards", "codec": "png"}, environment, rows, ()), **changes
    )


def speed(*rows: SpeedRow, **environment) -> Speed:
    told = {"device": "NVIDIA H100", "created": "2026-01-03T00:00:00+00:00", "packages": {"torch": "2.11"}, "cuda": None}
    return Speed(told | environment, {"TF32": False, "timed calls": 10}, rows)


def speed_row(model: str, ms: float | None, size: str = "736x1280", factor: int = 2, **changes) -> SpeedRow:
    made = SpeedRow(
        model, f"runs/{model}", 1_330_000, size, factor, "bf16", False, ms, ms and 1.1 * ms, ms and 1000 * (factor - 1) / ms,
        ms and 2**31, ms and 2**32, ms and ms / 10, ms is None,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def with_picture(folder: Path, size: tuple[int, int], model: str = "tiny", flow: bool = False) -> Results:
    """One picture of noise."""
    rng = np.random.default_rng(0)
    names = ("img0", "img1", "truth", "average", "average_error", "model0", "error0", *(["flow0"] if flow else []))
    (folder / "pictures").mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"pictures/{name}.png")
    file = {name: f"pictures/{name}.png" for name in names}
    frames = [file[name] for name in names[:5]]
    of_model = ({model: file[name]} for name in names[5:])
    return results(model, pictures=(Picture("sample-1", 2, 3, *frames, *of_model),))


def write_metrics(run: Path, rows: Sequence[dict], cut_short: bool = False) -> None:
    """metrics.jsonl of a run."""
    run.mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (run / "metrics.jsonl").write_text(text + ('{"step": 90, "ev' if cut_short else ""))
