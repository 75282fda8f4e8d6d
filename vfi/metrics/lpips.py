"""Perceptual distance of two images: LPIPS v0.1 with AlexNet, 0 for equal images, larger for less similar ones.

    lpips = load_lpips(Path("weights"), device)
    lpips(prediction, truth)                             # [B, 3, H, W] in [0, 1] twice -> [B]

The folder contains two published files, under their published names: `alexnet-owt-7be5be79.pth` (torchvision's AlexNet,
233 MiB) and `alex.pth` (the weights of its features, 6 KiB; richzhang/PerceptualSimilarity). Nothing is downloaded.

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv 1801.03924; version 0.1 of
their repository, which scales the input. AlexNet as in Krizhevsky, arXiv 1404.5997.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.errors import JobError
from vfi.ops.precision import fp32_island

MIN_SIDE = 31
"""Minimum height and width in pixels: below it nothing is left for the second pooling."""

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10

# all exceptions that torch.load was observed to raise for truncated or modified files
_DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, struct.error),
)


class _Stage(NamedTuple):
    """One convolution of AlexNet; `place` is its number in the published file."""

    place: int
    channels: int
    kernel: int
    stride: int
    padding: int
    pooled: bool
    """Whether its input is pooled first."""


_STAGES = (
    _Stage(0, 64, 11, 4, 2, pooled=False),
    _Stage(3, 192, 5, 1, 2, pooled=True),
    _Stage(6, 384, 3, 1, 1, pooled=True),
    _Stage(8, 256, 3, 1, 1, pooled=False),
    _Stage(10, 256, 3, 1, 1, pooled=False),
)


class _Published(NamedTuple):
    """File of weights: its name, its source, and the names of its tensors in `Lpips`."""

    name: str
    origin: str
    keys: dict[str, str]


_FILES = (
    _Published(
        "alexnet-owt-7be5be79.pth",
        "the torchvision model zoo, https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        {
            f"features.{stage.place}.{kind}": f"convolutions.{i}.{kind}"
            for i, stage in enumerate(_STAGES)
            for kind in ("weight", "bias")
        },
    ),
    _Published(
        "alex.pth",
        "the repository richzhang/PerceptualSimilarity on GitHub, lpips/weights/v0.1/alex.pth",
        {f"lin{i}.model.1.weight": f"importance.{i}" for i in range(len(_STAGES))},
    ),
)


class Lpips(nn.Module):
    """Distance of two images in the features of AlexNet's five stages; `load_lpips` returns one with trained weights.

    At every position the features of a stage (after the ReLU) are normalised to length 1 over the channels. The squares of
    their
    differences are weighted by channel, summed, averaged over the positions, and summed over the stages.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *(stage.channels for stage in _STAGES))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, stage.channels, stage.kernel, stage.stride, stage.padding)
            for c_in, stage in zip(inputs, _STAGES, strict=False)
        )
        self.importance = nn.ParameterList(torch.ones(1, stage.channels, 1, 1) for stage in _STAGES)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Return the distance of `[B, 3, H, W]` in [0, 1] twice -> `[B]`, non-negative and symmetric.

        It is computed in the dtype of the weights, fp32, also under autocast. On a GPU the convolutions run in TF32 if
        vfi.runtime.numerics allows it. Values are neither rounded nor clamped. Raises ValueError for other shapes and sides
        below
        MIN_SIDE.
        """
        if prediction.shape != truth.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
            raise ValueError(f"expected two tensors [B, 3, H, W], got {tuple(prediction.shape)} and {tuple(truth.shape)}")
        H, W = truth.shape[2:]
        if min(H, W) < MIN_SIDE:
            raise ValueError(f"images are {H}×{W} (height × width); AlexNet's stages need sides of at least {MIN_SIDE}")
        return fp32_island(self._distance, prediction, truth)

    def _distance(self, prediction: Tensor, truth: Tensor) -> Tensor:
        stages = zip(self._features(prediction), self._features(truth), self.importance, strict=True)
        return torch.stack([((x - y).square() * weight).sum(1).mean((1, 2)) for x, y, weight in stages]).sum(0)

    def _features(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the features of each stage, `[B, C, h, w]`, of length 1 over the channels; one by one, to bound the memory."""
        x = (2 * image.to(self.shift.dtype) - 1 - self.shift) / self.scale
        for stage, convolution in zip(_STAGES, self.convolutions, strict=True):
            x = F.max_pool2d(x, 3, 2) if stage.pooled else x
            x = F.relu(convolution(x))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + _EPS)


def load_lpips(folder: Path, device: torch.device) -> Lpips:
    """Return LPIPS with the published weights from `folder`, frozen, in eval mode on `device`.

    Raises JobError for a file that is missing, damaged or not the published one; it names the file and where it is published.
    """
    lpips = Lpips()
    shapes = {name: list(tensor.shape) for name, tensor in lpips.state_dict().items()}
    weights = {name: tensor for file in _FILES for name, tensor in _read(folder, file, shapes).items()}
    lpips.load_state_dict(weights)
    return lpips.requires_grad_(False).eval().to(device)


def _read(folder: Path, file: _Published, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the tensors of a published file that are used, under their names in `Lpips`."""
    path = folder / file.name
    if not path.is_file():
        raise JobError(f"{path} is missing: LPIPS reads {file.name} there, which is published in {file.origin}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        # when torch refuses a pickle, the lines after the first say how to load it anyway
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise JobError(f"{path} cannot be loaded: {reason}. Fetch it again from {file.origin}") from error
    tensors = found if isinstance(found, dict) else {}
    missing = [key for key in file.keys if not isinstance(tensors.get(key), Tensor)]
    others = [
        f"{key} {list(tensors[key].shape)} instead of {shapes[name]}"
        for key, name in file.keys.items()
        if key not in missing and list(tensors[key].shape) != shapes[name]
    ]
    parts = [f"{kind}: {', '.join(keys)}" for kind, keys in (("missing", missing), ("of another shape", others)) if keys]
    if parts:
        raise JobError(f"{path} is of something else: {'; '.join(parts)}. {file.name} is published in {file.origin}")
    return {name: tensors[key] for key, name in file.keys.items()}
