"""Motion estimation: flows from the timestep to both frames and a blending mask, in three stages, coarse to fine.

The stages work on the grids of levels 4, 3 and 2 (strides 16, 8, 4). Each sees the backbone's features of both frames,
warped by the flow so far, the original and the warped frames, that flow, the mask and the timestep; it adds a residual flow
and mask on a grid twice as fine. Source: IFNet (RIFE, arXiv 2011.06294); features in place of images at the coarse stages:
EMA-VFI.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.config.configs import ModelConfig
from vfi.model.backbone import level_widths, of_each_frame
from vfi.model.layers import ConvPReLU, ResidualBlock, zero
from vfi.ops.pointwise.dispatch import FusedOpsModule
from vfi.ops.warp.warp import backward_warp, resize_flow

STAGE_LEVELS = (4, 3, 2)
_WIDTHS = {4: 12, 3: 8, 2: 4}  # channels of a stage, times F
_BLOCKS = 3
_OUT = 5  # flow_t0, flow_t1, mask logit
_TRUTH_DETAIL = 4  # the teacher's grid has this stride: it sees each 4x4 pixels of the ground truth as 48 channels


class FlowEstimate(NamedTuple):
    """Motion on one grid, in fp32. Access the fields by name."""

    flow: Tensor
    """[2B, 2, h, w]: flow_t0 of all pairs, then flow_t1, in pixels of this grid."""
    mask_logit: Tensor
    """[B, 1, h, w], which is added to the prior of the timestep."""

    def at(self, size: tuple[int, int]) -> FlowEstimate:
        """Return this motion resized to another grid of (height, width) = `size`."""
        if self.flow.shape[2:] == size:
            return self
        mask_logit = F.interpolate(self.mask_logit, size=size, mode="bilinear", align_corners=False)
        return FlowEstimate(resize_flow(self.flow, size), mask_logit)


class FlowStage(nn.Module):
    """Predict, from the inputs on one grid, a residual Motion on a grid twice as fine; initially no motion at all."""

    def __init__(self, feature_width: int, width: int, extra: int = 0) -> None:
        super().__init__()
        seen = 2 * feature_width + 4 * 3 + 4 + 1 + 1 + extra
        self.body = nn.Sequential(ConvPReLU(seen, width), *(ResidualBlock(width) for _ in range(_BLOCKS)))
        self.head = nn.Conv2d(width, 4 * _OUT, 3, padding=1)
        zero(self.head.weight, self.head.bias)

    def forward(self, seen: Tensor) -> FlowEstimate:
        flow_t0, flow_t1, mask_logit = F.pixel_shuffle(self.head(self.body(seen)).float(), 2).split((2, 2, 1), dim=1)
        return FlowEstimate(torch.cat((flow_t0, flow_t1)), mask_logit)


class FlowNet(FusedOpsModule):
    """Estimate the Motion of each stage, on the grids of strides 8, 4 and 2, from features and frames.

    `forward(features, frames, timestep)`: `features` as the backbone returns them, `frames` `[2B, 3, H, W]`, `timestep` `[B]`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = level_widths(config)
        self.stages = nn.ModuleList(FlowStage(widths[level], _WIDTHS[level] * config.width) for level in STAGE_LEVELS)
        level = STAGE_LEVELS[-1]
        truth = 3 * _TRUTH_DETAIL**2
        self.teacher = FlowStage(widths[level], _WIDTHS[level] * config.width, extra=truth) if config.teacher else None

    def forward(self, features: list[Tensor], frames: Tensor, timestep: Tensor) -> list[FlowEstimate]:
        motions: list[FlowEstimate] = []
        for stage, level in zip(self.stages, STAGE_LEVELS, strict=True):
            so_far = motions[-1] if motions else _zero_flow(features[level])
            motions.append(_compose(so_far, stage(self._stage_input(features[level], frames, so_far, timestep))))
        return motions

    def teach(
        self, features: list[Tensor], frames: Tensor, timestep: Tensor, motion: FlowEstimate, imgt: Tensor
    ) -> FlowEstimate:
        """Return the teacher's Motion: the last stage's, corrected by a stage that sees the ground truth `[B, 3, H, W]`."""
        assert self.teacher is not None, "the network was built without a teacher"
        level = STAGE_LEVELS[-1]
        start = FlowEstimate(*(t.detach() for t in motion)).at((features[level].shape[2], features[level].shape[3]))
        seen = self._stage_input(features[level], frames, start, timestep, F.pixel_unshuffle(imgt, _TRUTH_DETAIL))
        return _compose(start, self.teacher(seen))

    def _stage_input(self, features: Tensor, frames: Tensor, motion: FlowEstimate, timestep: Tensor, *more: Tensor) -> Tensor:
        """Concatenate all inputs of a stage on its grid, for each pair."""
        size = features.shape[2:]
        small = F.interpolate(frames, size=size, mode="area")
        time = timestep.view(-1, 1, 1, 1).expand(-1, 1, *size)
        others = (*of_each_frame(small), *of_each_frame(motion.flow), motion.mask_logit, time, *more)
        if self.pointwise is not None:
            warp = self.pointwise.backward_warp
            features0, features1 = of_each_frame(warp(features, motion.flow))
            small0, small1 = of_each_frame(warp(small, motion.flow))
            return self.pointwise.concat_channels((features0, small0, features1, small1, *others), features.dtype)
        moved = of_each_frame(backward_warp(torch.cat((features, small.to(features.dtype)), dim=1), motion.flow))
        return torch.cat([part.to(features.dtype) for part in (*moved, *others)], dim=1)


def _zero_flow(features: Tensor) -> FlowEstimate:
    """Return zero flow and a neutral mask."""
    frames, _, h, w = features.shape
    return FlowEstimate(
        features.new_zeros((frames, 2, h, w), dtype=torch.float32), features.new_zeros((frames // 2, 1, h, w)).float()
    )


def _compose(so_far: FlowEstimate, residual: FlowEstimate) -> FlowEstimate:
    coarse = so_far.at((residual.flow.shape[2], residual.flow.shape[3]))
    return FlowEstimate(coarse.flow + residual.flow, coarse.mask_logit + residual.mask_logit)
