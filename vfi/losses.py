"""How far is a prediction from the truth, for training? L1 between Laplacian pyramids, and distances between flows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.config import OptimConfig
from vfi.ops.precision import fp32_island

LEVELS = 5
_TEACHER_MARGIN = 0.01  # the teacher is followed where it is better by more than this (mean over colours); RIFE's value


class FlowStage(Protocol):
    """What one flow stage says: vfi.model.interpolator.Stage."""

    @property
    def flow(self) -> Tensor: ...
    @property
    def merge(self) -> Tensor: ...


class Predicted(Protocol):
    """What the losses read of a vfi.model.interpolator.Prediction."""

    @property
    def imgt(self) -> Tensor: ...
    @property
    def stages(self) -> Sequence[FlowStage]: ...
    @property
    def teacher(self) -> FlowStage | None: ...


def training_losses(
    prediction: Predicted, imgt: Tensor, config: OptimConfig, flow: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The losses by name; `loss` is their weighted sum, the others are what they are before the weight.

    Args:
        prediction: of the model in training, with what its flow stages say.
        imgt: `[B, 3, H, W]`, the truth.
        flow: flow_t0 and flow_t1 `[B, 2, H, W]` to be learnt from (Exp-2e), in pixels.
    """
    losses = {"image": laplacian_loss(prediction.imgt, imgt)}
    total = losses["image"]
    if prediction.stages:
        losses["merge"] = _sum(laplacian_loss(stage.merge, imgt) for stage in prediction.stages)
        total = total + config.merge_weight * losses["merge"]
    if prediction.teacher is not None:
        losses["teacher_image"] = laplacian_loss(prediction.teacher.merge, imgt)
        losses["teacher"] = _sum(teacher_loss(stage, prediction.teacher, imgt) for stage in prediction.stages)
        total = total + losses["teacher_image"] + config.teacher_weight * losses["teacher"]
    if flow is not None:
        target = torch.cat(flow, dim=1)
        losses["distill"] = _sum(end_point_error(stage.flow, target).mean() for stage in prediction.stages)
        total = total + config.distill_weight * losses["distill"]
    return {"loss": total} | losses


def teacher_loss(stage: FlowStage, teacher: FlowStage, imgt: Tensor) -> Tensor:
    """Mean distance to the teacher's flow, in pixels, where the teacher's merge is clearly the better one (RIFE)."""
    own = (stage.merge.detach() - imgt).abs().mean(1, keepdim=True)
    of_teacher = (teacher.merge.detach() - imgt).abs().mean(1, keepdim=True)
    return (end_point_error(stage.flow, teacher.flow.detach()) * (own > of_teacher + _TEACHER_MARGIN)).mean()


def end_point_error(flow: Tensor, target: Tensor) -> Tensor:
    """`[B, 4, H, W]` (flow_t0, flow_t1) twice -> `[B, 2, H, W]`: the length of each vector's difference in pixels, fp32."""
    difference = (flow.float() - target.float()).unflatten(1, (2, 2))
    # the length has no gradient at zero
    return (difference.square().sum(2) + 1e-6).sqrt()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def laplacian_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Sum over five levels, and the coarse image left below them, of the mean absolute difference of the Laplacian pyramids.

    `[B, C, H, W]`, sides from 64 up. Source: the loss of EMA-VFI and VFIMamba (5 levels, 5x5 binomial filter, plain sum),
    which leaves the coarse image out: then nothing holds the mean colour. The pyramid is linear, so one pyramid of the
    difference does for two.
    """
    return fp32_island(_laplacian_loss, prediction, truth)


def _laplacian_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    if min(truth.shape[2:]) < 2 ** (LEVELS + 1):
        raise ValueError(f"images are {list(truth.shape[2:])}; {LEVELS} levels need sides of at least {2 ** (LEVELS + 1)}")
    current = prediction - truth
    total = current.new_zeros(())
    for _ in range(LEVELS):
        coarse = _blur(current)[:, :, ::2, ::2]
        total = total + (current - _expand(coarse, current.shape)).abs().mean()
        current = coarse
    return total + current.abs().mean()


def _expand(coarse: Tensor, shape: torch.Size) -> Tensor:
    """Twice the size: zeros in between, then the blur with four times its weight."""
    spread = coarse.new_zeros(shape)
    spread[:, :, ::2, ::2] = coarse
    return 4 * _blur(spread)


@functools.cache  # made anew it would be copied to the GPU, which waits for that, dozens of times a step
def _taps(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([1, 4, 6, 4, 1], dtype=dtype, device=device) / 16


def _blur(x: Tensor) -> Tensor:
    """The 5x5 binomial filter, one axis after the other; edges are reflected."""
    channels = x.shape[1]
    taps = _taps(x.dtype, x.device)
    x = _reflected(x) if torch.are_deterministic_algorithms_enabled() else F.pad(x, (2, 2, 2, 2), mode="reflect")
    x = F.conv2d(x, taps.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def _reflected(x: Tensor) -> Tensor:
    """`F.pad(x, (2, 2, 2, 2), mode="reflect")`, which has no deterministic backward pass on a GPU, and is faster."""
    for axis in (2, 3):
        before, after = x.narrow(axis, 1, 2), x.narrow(axis, x.shape[axis] - 3, 2)
        x = torch.cat((before.flip(axis), x, after.flip(axis)), dim=axis)
    return x
