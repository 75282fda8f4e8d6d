"""Tasks of a benchmark: the samples and truths of a shard folder, or of a published set by its protocol, and their rules.

task = task_from_protocol(settings, device)
for sample in task.read(range(task.samples)): …
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.schema import Index
from vfi.data.evaluation_loader import evaluation_batches
from vfi.data.shared_memory import check_shared_memory, evaluation_bytes
from vfi.errors import JobError
from vfi.evaluation.datasets import open_frames
from vfi.evaluation.protocols import PROTOCOLS, Prepare, Protocol, Rules
from vfi.model.interpolator import MIN_SIZE
from vfi.runtime.prefetch import map_ahead

if TYPE_CHECKING:
    from vfi.evaluation.settings import BenchmarkSettings

_PSNR = "-10 log10 of the mean squared error over RGB in 0..1, per image, then the mean over images"
_SSIM = {
    "ssim_matlab": "ssim_matlab: 3-D Gaussian 11x11x11, sigma 1.5, over the colour x H x W volume, borders replicated",
    "ssim_skimage": "scikit-image's structural_similarity of 8-bit images, 7x7 means, the mean over colours",
}


class Target(NamedTuple):
    """A frame to predict."""

    key: str
    timestep: float
    truth: Tensor
    """[1, 3, H, W] in [0, 1]."""


class Sample(NamedTuple):
    """Two frames `[1, 3, H, W]` in [0, 1], and the targets between them."""

    img0: Tensor
    img1: Tensor
    targets: list[Target]


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
    """Samples, and how a model is measured on them."""

    samples: int
    """Number of samples to measure."""
    available: int
    targets: int
    """Number of targets per sample."""
    rules: Rules
    facts: dict[str, str]
    """What the numbers mean, for readers."""
    sha256: str
    """Hash of the index, or of the list of files."""
    read: Callable[[Sequence[int]], Iterator[Sample]]
    """Sample numbers, ascending -> the samples, on the device."""


def task_from_shards(settings: BenchmarkSettings, device: torch.device) -> EvaluationTask:
    """Measure on the middle frames of a shard folder. Raises JobError for frames that a model does not support."""
    index = settings.folder.read_index()
    if min(index.min_size) < MIN_SIZE:
        height, width = index.min_size
        raise JobError(f"--data {settings.data} has frames as small as {height}x{width}: each side must be at least {MIN_SIZE}")
    check_shared_memory(evaluation_bytes(index.max_size, settings.workers), 1, "use fewer --workers; 0 takes none")
    samples, rules = min(settings.limit or index.samples, index.samples), Rules(scale=settings.scale)

    def read(numbers: Sequence[int]) -> Iterator[Sample]:
        for batch in evaluation_batches(settings.folder, device, workers=settings.workers, numbers=numbers):
            yield Sample(batch.img0, batch.img1, [Target(batch.keys[0], batch.timestep.item(), batch.imgt)])

    facts = {
        "protocol": "shards",
        "frames": f"first and last of the {index.frames} frames of a sample in, its middle frame is the truth",
        "frame set": _frame_set(samples, index.samples),
        **_about(index),
        **_rules(rules, settings.tta),
    }
    sha256 = hashlib.sha256(settings.folder.index_bytes()).hexdigest()
    return EvaluationTask(samples, index.samples, 1, rules, facts, sha256, read)


def task_from_protocol(settings: BenchmarkSettings, device: torch.device) -> EvaluationTask:
    """Measure on a published set, as --profile does. JobError for an unknown protocol, and for frames of another set."""
    if settings.protocol not in PROTOCOLS:
        raise JobError(f"--protocol {settings.protocol} does not exist: choose from {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[settings.protocol]
    rules = protocol.rules(settings.profile)
    frames = open_frames(settings.data, settings.folder, protocol, settings.allow_partial)
    available = len(frames.keys)
    samples = min(settings.limit or available, available)

    def sample(number: int) -> Sample:
        images = [prepare(frame, protocol.prepare, device) for frame in frames.read(number)]
        key = frames.keys[number]
        names = [key if len(protocol.truths) == 1 else f"{key}@{truth}" for truth in protocol.truths]
        truths = zip(names, protocol.truths, strict=True)
        return Sample(images[0], images[-1], [Target(name, protocol.timestep(t), images[t]) for name, t in truths])

    facts = {
        "protocol": settings.protocol,
        "profile": settings.profile,
        "frames": _frames(protocol),
        "frame set": _frame_set(samples, available) + (f"; NOT COMPARABLE: {frames.differs}" if frames.differs else ""),
        **_rules(rules, settings.tta),
    }
    sha256 = hashlib.sha256("\n".join(frames.keys).encode()).hexdigest()
    read = partial(map_ahead, sample, workers=settings.workers)
    return EvaluationTask(samples, available, len(protocol.truths), rules, facts, sha256, read)


def _frames(protocol: Protocol) -> str:
    wanted = ", ".join(map(str, protocol.truths))
    prepared = "" if protocol.prepare == "as they are" else f", {protocol.prepare}"
    return f"{protocol.title}: 0 and {protocol.frames - 1} of a sample in, {wanted} out{prepared}"


def _frame_set(samples: int, published: int) -> str:
    return "all samples" if samples == published else f"the first {samples} of {published} samples"


def _about(index: Index) -> dict[str, str]:
    """Describe a shard folder, for readers."""
    return {
        "split": index.split,
        "codec": index.codec,
        "sizes": f"{index.min_size[0]}x{index.min_size[1]} to {index.max_size[0]}x{index.max_size[1]}",
        "source": _command(index.source),
    }


def _command(source: dict[str, Any]) -> str:
    """Return the source of a shard folder as the command that made it."""
    arguments = source.get("arguments")
    if not isinstance(arguments, dict):
        return json.dumps(source, ensure_ascii=False)
    flags = [f"--{name} {value}" for name, value in arguments.items() if value not in (None, "", False)]
    return " ".join([f"python -m {source.get('job')}", *flags])


def _rules(rules: Rules, tta: bool) -> dict[str, str]:
    """Describe the rules, for readers."""
    return {
        "PSNR": _PSNR,
        "SSIM": _SSIM[rules.ssim],
        "IE": "mean absolute difference of 8-bit images, 0..255",
        "rounding": "to 8 bits, before PSNR and SSIM" if rules.rounded else "none",
        "padding": str(rules.padding) if rules.padding else "replicate, centred, to the model's multiple",
        "TTA": "the mean with the frames turned by 180 degrees" if tta else "none",
        "flow scale": "each model's own setting" if rules.scale is None else str(rules.scale),
        "times": "by bisecting, from the model's own frames" if rules.recursive else "each directly",
    }


def prepare(frame: np.ndarray, how: Prepare, device: torch.device) -> Tensor:
    """Convert a frame `[H, W, 3]` uint8 as the protocol requires it: `[1, 3, H, W]` float in [0, 1].

    `half size` is the mean over squares of 2x2 pixels, in floats or rounded half up to 8 bits (OpenCV's INTER_AREA for either
    type); `centre crop` keeps half of each side.
    """
    height, width = frame.shape[:2]
    if how != "as they are" and (height % 4 or width % 4):
        raise JobError(f"{how} needs sides that are multiples of 4, and a frame has {height}x{width}")
    if how == "centre crop":
        frame = frame[height // 4 : -height // 4, width // 4 : -width // 4]
    image = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1).unsqueeze(0).float()
    if how.startswith("half size"):
        image = F.avg_pool2d(image, 2)
        if how == "half size, rounded":
            image = (image + 0.5).floor()
    return image / 255
