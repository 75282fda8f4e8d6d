"""Training losses: L1 between Laplacian pyramids, perceptual distance, and distances between flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vfi.config.configs import ConfigError, OptimConfig
from vfi.ops.loss.laplacian import laplacian_loss
from vfi.training.perceptual_loss import PerceptualLoss

_TEACHER_MARGIN = 0.01  # the teacher is followed where it is better by more than this (mean over colours); RIFE's value


class FlowStage(Protocol):
    """The output of one flow stage: vfi.model.interpolator.Stage."""

    @property
    def flow(self) -> Tensor: ...
    @property
    def merge(self) -> Tensor: ...


class Predicted(Protocol):
    """The part of a vfi.model.interpolator.Prediction that the losses read."""

    @property
    def imgt(self) -> Tensor: ...
    @property
    def stages(self) -> Sequence[FlowStage]: ...
    @property
    def teacher(self) -> FlowStage | None: ...


def training_losses(
    prediction: Predicted,
    imgt: Tensor,
    config: OptimConfig,
    flow: tuple[Tensor, ...] | None = None,
    perceptual: PerceptualLoss | None = None,
) -> dict[str, Tensor]:
    """Return the losses by name; `loss` is their weighted sum, the others are unweighted.

    Args:
        prediction: of the model in training mode, with the outputs of its flow stages.
        imgt: `[B, 3, H, W]`, the ground truth.
        flow: flow_t0 and flow_t1 `[B, 2, H, W]` to distil (Exp-2e), in pixels, and optionally their weights `[B, 2, H, W]`.
        perceptual: the loss of --vgg_weight and --style_weight, on the final image.
    """
    teachers = [prediction.teacher] if prediction.teacher else []
    images = [prediction.imgt, *(stage.merge for stage in (*prediction.stages, *teachers))]
    of_each = laplacian_loss(torch.stack(images), imgt, config.loss_backend)  # in one call: each is dozens of small kernels
    losses = {"image": of_each[0]}
    total = losses["image"]
    if prediction.stages:
        losses["merge"] = of_each[1 : len(prediction.stages) + 1].sum()
        total = total + config.merge_weight * losses["merge"]
    if prediction.teacher is not None:
        losses["teacher_image"] = of_each[-1]
        losses["teacher"] = teacher_loss(prediction.stages, prediction.teacher, imgt)
        total = total + losses["teacher_image"] + config.teacher_weight * losses["teacher"]
    if flow is not None:
        target, weight = torch.cat(flow[:2], dim=1), flow[2] if len(flow) == 3 else 1.0
        losses["distill"] = len(prediction.stages) * (end_point_error(_flows(prediction.stages), target) * weight).mean()
        total = total + config.distill_weight * losses["distill"]
    if perceptual is not None:
        found = perceptual(prediction.imgt, imgt)
        losses |= {"vgg": found.content} if config.vgg_weight else {}
        losses |= {"style": found.style} if config.style_weight else {}
        total = total + found.total
    return {"loss": total} | losses


def check_flow(flow: tuple[Tensor, ...], frame: Tensor) -> tuple[Tensor, ...]:
    """Return what a flow teacher gave for frames `[B, 3, H, W]`; ConfigError unless that is two or three `[B, 2, H, W]`."""
    expected = (frame.shape[0], 2, *frame.shape[2:])
    shapes = [tuple(tensor.shape) for tensor in flow]
    if len(shapes) not in (2, 3) or set(shapes) != {expected}:
        raise ConfigError(f"the flow teacher gave tensors {shapes}; expected two or three of {expected}")
    return flow


def teacher_loss(stages: Sequence[FlowStage], teacher: FlowStage, imgt: Tensor) -> Tensor:
    """Return the mean distance to the teacher's flow, in pixels, summed over the stages.

    It counts where the teacher's merge is clearly better than the stage's own (RIFE).
    """
    own = (torch.stack([stage.merge.detach() for stage in stages]) - imgt).abs().mean(2)
    of_teacher = (teacher.merge.detach() - imgt).abs().mean(1)
    better = (own > of_teacher + _TEACHER_MARGIN).unsqueeze(2)
    return len(stages) * (end_point_error(_flows(stages), teacher.flow.detach()) * better).mean()


def end_point_error(flow: Tensor, target: Tensor) -> Tensor:
    """Return the length of each vector's difference in pixels, fp32.

    `[..., B, 4, H, W]` (flow_t0, flow_t1) and `[B, 4, H, W]` -> `[..., B, 2, H, W]`.
    """
    difference = (flow.float() - target.float()).unflatten(-3, (2, 2))
    # the epsilon keeps the gradient finite at zero, where that of a length is not defined
    return (difference.square().sum(-3) + 1e-6).sqrt()


def _flows(stages: Sequence[FlowStage]) -> Tensor:
    return torch.stack([stage.flow for stage in stages])
