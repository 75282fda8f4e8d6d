"""Convolution blocks, and initial weights that preserve the signal variance through twenty layers.

PyTorch's default halves the signal in each layer; without normalisation no detail of a frame then reaches the head, and
training starts with a long plateau at the cross-fade.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.ops.pointwise.dispatch import FusedOpsModule

_SLOPE = 0.25  # initial slope of PReLU below zero


class Conv(nn.Conv2d):
    """Convolution that can leave its bias to the next operator and accept or return zero-padded channels.

    Its input may have additional channels of zeros, and so may its output: cuDNN copies, at each call, a half-precision map
    whose number of channels is not a multiple of 8.
    """

    def forward(self, x: Tensor, with_bias: bool = True, multiple: int = 1) -> Tensor:
        """Convolve `x`; the result is padded with zero channels to a multiple of `multiple`."""
        weight, bias = self.weight, self.bias if with_bias else None
        more_in, more_out = x.shape[1] - self.in_channels, -self.out_channels % multiple
        if more_in or more_out:
            weight = F.pad(weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
            bias = bias if bias is None else F.pad(bias, (0, more_out))
        return F.conv2d(x, weight, bias, self.stride, self.padding)


def scaled_conv(c_in: int, c_out: int, kernel: int, stride: int = 1, *, activated: bool = False) -> Conv:
    """Return a convolution that preserves the variance of its input, after a PReLU if `activated`; zero bias (He et al.)."""
    conv = Conv(c_in, c_out, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(conv.weight, a=_SLOPE if activated else 1.0)
    zero(conv.bias)
    return conv


class ConvPReLU(nn.Sequential, FusedOpsModule):
    """3x3 convolution and PReLU. With fused kernels, the input may have more channels (zeros) than the convolution takes."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__(scaled_conv(c_in, c_out, 3, stride, activated=True), nn.PReLU(c_out, _SLOPE))

    def forward(self, x: Tensor) -> Tensor:
        if self.pointwise is None:
            return super().forward(x)
        conv, act = self
        return self.bias_prelu(conv(x, with_bias=False), conv.bias, act.weight)


class ResidualBlock(FusedOpsModule):
    """x + conv(act(conv(x))), then an activation. Initially the second summand is zero: the block is a plain activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = Conv(channels, channels, 3, padding=1)
        zero(last.weight, last.bias)
        self.body = nn.Sequential(*ConvPReLU(channels, channels), last)
        self.act = nn.PReLU(channels, _SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        if self.pointwise is None:
            return self.act(x + self.body(x))
        first, inner_act, last = self.body
        inner = self.bias_prelu(first(x, with_bias=False), first.bias, inner_act.weight)
        out = last(inner, with_bias=False)
        return self.bias_prelu(out, last.bias, self.act.weight, x.to(out.dtype))


class LayerNorm(nn.LayerNorm, FusedOpsModule):
    """Layer norm over channels, the last dimension. It runs in fp32 under autocast; with fused kernels, in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if self.pointwise is None:
            return super().forward(x)
        return self.pointwise.layer_norm(x, self.weight, self.bias, self.eps)


def zero(*parameters: Tensor | None) -> None:
    """Set the given parameters to zero."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter is not None:
                parameter.zero_()
