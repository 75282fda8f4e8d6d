"""The network that predicts the in-between frame: the whole method on one screen.

    img0, img1 [B, 3, H, W] RGB in [0, 1], timestep [B] in (0, 1)  ->  Prediction

Phase 1: features of both frames -> RefineNet -> a mask that blends the frames, and a residual colour. From phase 2 on,
frames and features are warped to the timestep by the flow before they enter RefineNet. Both start from a cross-fade.
Height and width are at least 32: frames are padded internally to multiples of 16 / scale, and the prediction is cropped back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.config.configs import SCALES, ModelConfig
from vfi.model.backbone import STRIDE, HybridBackbone, of_each_frame
from vfi.model.flow import FlowEstimate, FlowNet
from vfi.model.refinement import LazyWarpedFeatures, RefineNet
from vfi.ops.pointwise.dispatch import FusedOpsModule, select_fused_ops, set_fused_ops
from vfi.ops.warp.warp import backward_warp

MIN_SIZE = 32


class Stage(NamedTuple):
    """Output of one flow stage at full size; used by the loss only."""

    flow: Tensor
    """[B, 4, H, W]: flow_t0, flow_t1."""
    merge: Tensor
    """[B, 3, H, W]: the frames warped by this flow and blended by this stage's mask."""


class Prediction(NamedTuple):
    """Output of the model, `[B, …, H, W]` in fp32. Access the fields by name."""

    imgt: Tensor
    """[B, 3, H, W] in-between frame; not clamped, so that a loss sees colours outside [0, 1]."""
    mask_logit: Tensor
    """[B, 1, H, W] before the sigmoid; the mask weights warped0 against warped1."""
    residual: Tensor
    """[B, 3, H, W] colour added to the blend."""
    warped0: Tensor
    """[B, 3, H, W] img0 warped to the timestep; without flow, img0 itself."""
    warped1: Tensor
    """[B, 3, H, W] img1, likewise."""
    flow_t0: Tensor | None = None
    """[B, 2, H, W] (dx, dy) in pixels from the timestep to frame 0; None in phase 1."""
    flow_t1: Tensor | None = None
    """[B, 2, H, W] (dx, dy) in pixels from the timestep to frame 1; None in phase 1."""
    stages: tuple[Stage, ...] = ()
    """Output of each flow stage; in training only."""
    teacher: Stage | None = None
    """Output of the teacher; in training only, and only if the network has a teacher."""


class Encoded(NamedTuple):
    """Everything about a pair of frames that does not depend on the timestep, computed once for any number of them."""

    frames: Tensor
    """[2B, 3, H', W'] padded frames, frame 0 of all pairs first."""
    padding: tuple[int, int, int, int]
    """Padded pixels at the left, right, top and bottom."""
    features: list[Tensor]
    """Features of the frames at full size, finest level first."""
    small_frames: Tensor
    """Frames at the size at which flow is estimated."""
    small_features: list[Tensor]
    """Features of `small_frames`, finest level first."""


class FrameInterpolator(FusedOpsModule):
    """Network of one ModelConfig, built for one type of device (which determines the fast paths)."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.backbone = HybridBackbone(config, torch.device(device))
        self.flow = FlowNet(config) if config.phase > 1 else None
        self.refine = RefineNet(config) if config.phase == 1 or config.warp != "flow_only" else None
        self.warps_features = config.phase > 1 and config.warp == "feature"
        self.to(memory_format=torch.channels_last).to(device=device)
        pointwise, self.choice = select_fused_ops(config.pointwise_backend, torch.device(device))
        set_fused_ops(self, pointwise)

    def forward(
        self, img0: Tensor, img1: Tensor, timestep: Tensor, imgt: Tensor | None = None, scale: float | None = None
    ) -> Prediction:
        """Predict the frame at `timestep`.

        `imgt` is the ground truth, which the teacher sees in training; `scale` defaults to that of the config.
        """
        return self.decode(self.encode(img0, img1, scale), timestep, imgt)

    def encode(self, img0: Tensor, img1: Tensor, scale: float | None = None) -> Encoded:
        """Compute the features of the frames for `decode`.

        `scale` 1, 0.5 or 0.25: flow is estimated at this fraction of the frame size. Raises ValueError for shapes or a scale
        that
        the network can't take.
        """
        scale = self.config.scale if scale is None else scale
        check_frames(img0, img1, scale)
        if scale != 1 and self.flow is None:
            raise ValueError(f"scale is {scale}, but this network is of phase 1: it has no flow to estimate at another size")
        padding = _padding(img0, round(STRIDE / scale))
        frames = F.pad(torch.cat((img0, img1)), padding, mode="replicate").contiguous(memory_format=torch.channels_last)
        features = self.backbone(frames) if scale == 1 or self.refine else []
        if scale == 1:
            return Encoded(frames, padding, features, frames, features)
        small = F.interpolate(frames, scale_factor=scale, mode="area")
        return Encoded(frames, padding, features, small, self.backbone(small))

    def decode(self, encoded: Encoded, timestep: Tensor, imgt: Tensor | None = None) -> Prediction:
        """Predict the frame at `timestep` `[B]` between the encoded frames.

        Raises ValueError if `timestep` is not `[B]`.
        """
        frames, padding = encoded.frames, encoded.padding
        if timestep.shape != (frames.shape[0] // 2,):
            raise ValueError(f"timestep must be [B] = [{frames.shape[0] // 2}]; given {list(timestep.shape)}")
        # the prior of the mask is a cross-fade: sigmoid(logit(1 - t)) = 1 - t
        prior = torch.logit(1 - timestep.float(), eps=1e-6).view(-1, 1, 1, 1)
        motions = self._estimate_flow(encoded, timestep)
        motion = motions[-1] if motions else None
        warped = frames
        features: Sequence[Tensor] = encoded.features
        mask_logit: Tensor = prior.expand(-1, 1, *frames.shape[2:])
        residual = frames.new_zeros(frames.shape[0] // 2, *frames.shape[1:])
        if motion:
            warped, mask_logit = self._warp(frames, motion.flow), prior + motion.mask_logit
        if motion and self.warps_features:
            features = LazyWarpedFeatures(self._warp, features, motion.flow)
        if self.refine:
            refined_logit, residual = self.refine(features, torch.cat(of_each_frame(warped), dim=1), timestep)
            mask_logit = mask_logit + refined_logit
        warped0, warped1 = of_each_frame(_crop(warped, padding))
        mask_logit, residual = _crop(mask_logit, padding), _crop(residual, padding)
        prediction = Prediction(_blend(mask_logit, warped0, warped1) + residual, mask_logit, residual, warped0, warped1)
        if motion is None:
            return prediction
        flow_t0, flow_t1 = of_each_frame(_crop(motion.flow, padding))
        prediction = prediction._replace(flow_t0=flow_t0, flow_t1=flow_t1)
        return self._with_stages(prediction, encoded, motions, timestep, prior, imgt) if self.training else prediction

    def _estimate_flow(self, encoded: Encoded, timestep: Tensor) -> list[FlowEstimate]:
        """Return the Motion of every stage, the last one at full size; empty in phase 1."""
        if self.flow is None:
            return []
        motions = self.flow(encoded.small_features, encoded.small_frames, timestep)
        return [*motions[:-1], motions[-1].at((encoded.frames.shape[2], encoded.frames.shape[3]))]

    def _with_stages(
        self,
        prediction: Prediction,
        encoded: Encoded,
        motions: list[FlowEstimate],
        timestep: Tensor,
        prior: Tensor,
        imgt: Tensor | None,
    ) -> Prediction:
        """Add the outputs of the stages, and of the teacher, for the loss."""
        assert self.flow is not None
        size = (encoded.frames.shape[2], encoded.frames.shape[3])

        def stage(motion: FlowEstimate, warped: tuple[Tensor, Tensor] | None = None) -> Stage:
            motion = motion.at(size)
            mask_logit = _crop(prior + motion.mask_logit, encoded.padding)
            warped0, warped1 = warped or of_each_frame(_crop(self._warp(encoded.frames, motion.flow), encoded.padding))
            flow = _crop(torch.cat(of_each_frame(motion.flow), dim=1), encoded.padding)
            return Stage(flow, _blend(mask_logit, warped0, warped1))

        teacher = None
        if imgt is not None and self.flow.teacher is not None:
            truth = F.interpolate(
                F.pad(imgt, encoded.padding, mode="replicate"), size=encoded.small_frames.shape[2:], mode="area"
            )
            taught = self.flow.teach(encoded.small_features, encoded.small_frames, timestep, motions[-1], truth)
            teacher = stage(taught)
        # the frames are already warped by the flow of the last stage
        last = stage(motions[-1], (prediction.warped0, prediction.warped1))
        return prediction._replace(stages=(*map(stage, motions[:-1]), last), teacher=teacher)

    def _warp(self, x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
        return (backward_warp if self.pointwise is None else self.pointwise.backward_warp)(x, flow, top)

    def choices(self) -> list[str]:
        """Return one line for each fast-path decision: what the operator uses, and why."""
        return sorted({str(module.choice) for module in self.modules() if hasattr(module, "choice")})

    @property
    def all_fused(self) -> bool:
        """Whether all operators use fused Triton kernels."""
        return all(": fused" in choice for choice in self.choices())


def check_frames(img0: Tensor, img1: Tensor, scale: float = 1.0) -> None:
    """Raise ValueError for shapes, or a scale, that the network can't take."""
    if img0.shape != img1.shape or img0.dim() != 4 or img0.shape[1] != 3:
        raise ValueError(f"img0 and img1 must both be [B, 3, H, W]; given {list(img0.shape)} and {list(img1.shape)}")
    if min(img0.shape[2:]) < MIN_SIZE:
        raise ValueError(f"frames are {img0.shape[2]}x{img0.shape[3]}; height and width must be at least {MIN_SIZE}")
    if scale not in SCALES:
        raise ValueError(f"scale is {scale}; choose from {', '.join(map(str, SCALES))}")


def _blend(mask_logit: Tensor, warped0: Tensor, warped1: Tensor) -> Tensor:
    """Compute mask * warped0 + (1 - mask) * warped1 in fp32, in one pass."""
    mask = mask_logit.sigmoid()
    return torch.lerp(warped1.to(mask.dtype), warped0.to(mask.dtype), mask)


def _padding(image: Tensor, multiple: int) -> tuple[int, int, int, int]:
    """Return the centred (left, right, top, bottom) that pads both sides to multiples of `multiple`.

    It is written without a remainder so that, for a size that is traced as a symbol and already a multiple, the result is
    provably 0.
    """
    extra_h, extra_w = ((size + multiple - 1) // multiple * multiple - size for size in image.shape[2:])
    return extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2


def _crop(t: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    left, right, top, bottom = padding
    return t[:, :, top : t.shape[2] - bottom, left : t.shape[3] - right]
