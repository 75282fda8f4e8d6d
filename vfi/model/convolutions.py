"""What do the plain convolutions share? Blocks, and initial weights that keep the signal's size through twenty layers.

PyTorch's default shrinks it by half a layer; without normalisation nothing of a frame's detail then reaches the head, and
training starts with a long plateau at the cross-fade.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SLOPE = 0.25  # of PReLU below zero, when training starts


def scaled_conv(c_in: int, c_out: int, kernel: int, stride: int = 1, *, activated: bool = False) -> nn.Conv2d:
    """A convolution whose output has the variance of its input, after a PReLU if it is `activated`; bias zero (He et al.)."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(conv.weight, a=_SLOPE if activated else 1.0)
    zero(conv.bias)
    return conv


def conv_prelu(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and PReLU."""
    return nn.Sequential(scaled_conv(c_in, c_out, 3, stride, activated=True), nn.PReLU(c_out, _SLOPE))


class ResidualBlock(nn.Module):
    """x + conv(act(conv(x))), then an activation. Starts without the sum's second part, as a plain activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        zero(last.weight, last.bias)
        self.body = nn.Sequential(*conv_prelu(channels, channels), last)
        self.act = nn.PReLU(channels, _SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


def zero(*parameters: Tensor | None) -> None:
    """Set parameters to zero."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter is not None:
                parameter.zero_()
