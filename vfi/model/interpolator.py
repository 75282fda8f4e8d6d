"""How is the frame between made? The whole method on one screen.

    img0, img1 [B, 3, H, W] RGB in [0, 1], timestep [B] in (0, 1)  ->  Prediction

Phase 1: backbone features of both frames -> RefineNet -> a mask that blends the frames and a residual colour.
Any H and W from 32 up: frames are padded inside to multiples of 16 and the prediction is cropped back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.config import ModelConfig
from vfi.model.backbone import STRIDE, HybridBackbone
from vfi.model.refine import RefineNet

MIN_SIZE = 32


class Prediction(NamedTuple):
    """What the model says, `[B, …, H, W]` in fp32. Read by name."""

    imgt: Tensor
    """[B, 3, H, W] the frame between; not clamped, so that a loss sees colours outside [0, 1]."""
    mask_logit: Tensor
    """[B, 1, H, W] before the sigmoid; the mask weighs warped0 against warped1."""
    residual: Tensor
    """[B, 3, H, W] colour added to the blend."""
    warped0: Tensor
    """[B, 3, H, W] img0 moved to the timestep; without flow img0 itself."""
    warped1: Tensor
    """[B, 3, H, W] likewise for img1."""
    flow_t0: Tensor | None = None
    """[B, 2, H, W] (dx, dy) in pixels from the timestep to frame 0; None in phase 1."""
    flow_t1: Tensor | None = None
    """[B, 2, H, W] likewise to frame 1."""


class FrameInterpolator(nn.Module):
    """The network of one ModelConfig, built for a kind of device (which decides the fast paths)."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.backbone = HybridBackbone(config, torch.device(device))
        self.refine = RefineNet(config)
        self.to(memory_format=torch.channels_last).to(device=device)

    def forward(self, img0: Tensor, img1: Tensor, timestep: Tensor) -> Prediction:
        check_frames(img0, img1, timestep)
        padding = _padding(*img0.shape[2:])
        frames = F.pad(torch.cat((img0, img1)), padding, mode="replicate").contiguous(memory_format=torch.channels_last)
        features = self.backbone(frames)
        images = torch.cat(frames.chunk(2), dim=1)
        mask_logit, residual = (_crop(t, padding) for t in self.refine(features, images, timestep))
        # without flow nothing is known about where to look, so the mask starts from a cross-fade: sigmoid(logit(1 - t)) = 1 - t
        mask_logit = mask_logit + torch.logit(1 - timestep.float()).view(-1, 1, 1, 1)
        mask = mask_logit.sigmoid()
        imgt = mask * img0 + (1 - mask) * img1 + residual
        return Prediction(imgt, mask_logit, residual, img0, img1)

    def choices(self) -> list[str]:
        """Which fast path each operator took and why, one line each."""
        return sorted({str(module.choice) for module in self.modules() if hasattr(module, "choice")})


def check_frames(img0: Tensor, img1: Tensor, timestep: Tensor) -> None:
    """Raise ValueError for shapes that the network can't take."""
    if img0.shape != img1.shape or img0.dim() != 4 or img0.shape[1] != 3:
        raise ValueError(f"img0 and img1 must both be [B, 3, H, W]; given {list(img0.shape)} and {list(img1.shape)}")
    if min(img0.shape[2:]) < MIN_SIZE:
        raise ValueError(f"frames are {img0.shape[2]}x{img0.shape[3]}; height and width must be at least {MIN_SIZE}")
    if timestep.shape != img0.shape[:1]:
        raise ValueError(f"timestep must be [B] = [{img0.shape[0]}]; given {list(timestep.shape)}")


def _padding(H: int, W: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that brings both sides to multiples of STRIDE, centred."""
    extra_h, extra_w = -H % STRIDE, -W % STRIDE
    return extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2


def _crop(t: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    left, right, top, bottom = padding
    return t[:, :, top : t.shape[2] - bottom, left : t.shape[3] - right]
