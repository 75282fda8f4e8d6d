"""What colour has each pixel of the frame between? RefineNet: a decoder from both frames' features to mask and residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfi.config import ModelConfig
from vfi.model.backbone import LEVELS, level_widths, of_each_frame
from vfi.model.convolutions import ResidualBlock, conv_prelu, scaled_conv, zero


class RefineNet(nn.Module):
    """Features of both frames, coarse to fine, and at full size the frames themselves -> mask logit and residual.

    `forward(features, images, timestep)`: `features` as the backbone gives them ([2B, C, h, w], finest first), `images`
    `[B, 6, H, W]` (both warped frames), `timestep` `[B]`; returns `[B, 1, H, W]` and `[B, 3, H, W]` in fp32. The last layer
    starts at zero, so an untrained network returns a plain cross-fade.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = level_widths(config)
        extra = [6] + [0] * (LEVELS - 2) + [1]  # the frames at level 0, the timestep at the coarsest level
        inputs = [2 * widths[level] + extra[level] for level in range(LEVELS)]
        for level in range(LEVELS - 1):
            inputs[level] += widths[level]  # from the level below
        self.mix = nn.ModuleList(
            nn.Sequential(conv_prelu(c_in, c_out), ResidualBlock(c_out)) for c_in, c_out in zip(inputs, widths, strict=True)
        )
        # 1x1 convolution and pixel shuffle: an upsampling whose backward pass is deterministic on a GPU
        self.up = nn.ModuleList(
            nn.Sequential(scaled_conv(widths[level + 1], 4 * widths[level], 1), nn.PixelShuffle(2))
            for level in range(LEVELS - 1)
        )
        self.head = nn.Conv2d(widths[0], 4, 3, 1, 1)
        zero(self.head.weight, self.head.bias)

    def forward(self, features: list[Tensor], images: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        coarsest = _side_by_side(features[-1])
        time = timestep.to(coarsest.dtype).view(-1, 1, 1, 1).expand(-1, 1, *coarsest.shape[2:])
        x = self.mix[-1](torch.cat((coarsest, time), dim=1))
        for level in range(LEVELS - 2, 0, -1):
            x = self.mix[level](torch.cat((self.up[level](x), _side_by_side(features[level])), dim=1))
        x = self.mix[0](torch.cat((self.up[0](x), _side_by_side(features[0]), images.to(x.dtype)), dim=1))
        mask_logit, residual = self.head(x).float().split((1, 3), dim=1)
        return mask_logit, residual


def _side_by_side(features: Tensor) -> Tensor:
    """[2B, C, h, w] -> [B, 2C, h, w]: both frames' features of a pair."""
    return torch.cat(of_each_frame(features), dim=1)
