"""Fusion of the branches: a convolution body with channel attention, ECAB or CAB."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from vfi.model.layers import Conv
from vfi.ops.pointwise.dispatch import FusedOpsModule

_BODY_SQUEEZE = 3  # C -> C/3 -> C, as in VFIMamba's CAB
_GATE_SQUEEZE = 30


def eca_kernel_size(channels: int) -> int:
    """Return |log2(C) / 2 + 1/2|, raised to the next odd number, as the code of ECA-Net does.

    32 -> 3, 64 -> 3, 128 -> 5, 256 -> 5, 512 -> 5.
    """
    k = int(abs(math.log2(channels) / 2 + 0.5))
    return k if k % 2 else k + 1


class ECA(nn.Module):
    """Weight the channels of [B, H, W, C]: global average -> 1-D convolution over channels, no bias -> sigmoid.

    Channels are the last dimension here, as they are in memory: in PyTorch's order, the gradient of the average would have a
    different memory layout from the gradient that it is added to.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        k = eca_kernel_size(channels)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(1, 2))
        return x * self.conv(pooled.unsqueeze(1)).sigmoid().unsqueeze(1)


class SqueezeExcite(nn.Module):
    """Weight the channels of [B, H, W, C] through a bottleneck of C/30 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // _GATE_SQUEEZE)
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean(dim=(1, 2))))).sigmoid()
        return x * gate[:, None, None, :]


class ChannelAttentionBlock(FusedOpsModule):
    """Transform [B, H, W, C] -> the same shape: conv C -> C/3, GELU, conv C/3 -> C, then a gate for each channel.

    With fused kernels (on a GPU), the map between the convolutions is zero-padded to a multiple of 8 channels.
    """

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        hidden = max(8, channels // _BODY_SQUEEZE)
        self.reduce = Conv(channels, hidden, 3, padding=1)
        self.expand = Conv(hidden, channels, 3, padding=1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)  # a view: channels-last memory
        hidden = F.gelu(self.reduce(x, multiple=1 if self.pointwise is None else 8))
        return self.gate(self.expand(hidden).permute(0, 2, 3, 1))


def fusion_block(channels: int, use_ecab: bool) -> ChannelAttentionBlock:
    """Return ECAB, or CAB: the same body with the gate of ECA-Net or of squeeze-and-excitation."""
    return ChannelAttentionBlock(channels, ECA(channels) if use_ecab else SqueezeExcite(channels))
