"""Which operators between the convolutions run as kernels of our own? All or none of these, chosen when a network is built.

Each costs several passes over a map in PyTorch and one here: bias, skip connection and PReLU; channels side by side, with the
pixel shuffle; warping; layer norms in half precision. Modules that can do without are left as they are where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfi.ops.triton.availability import takes_fused
from vfi.ops.warp.warp import backward_warp


class Pointwise(NamedTuple):
    """The kernels."""

    bias_prelu: Callable[..., Tensor]
    """vfi/ops/pointwise/bias_prelu_kernels.py."""
    stack_channels: Callable[..., Tensor]
    """vfi/ops/pointwise/concat_kernels.py."""
    backward_warp: Callable[..., Tensor]
    """vfi/ops/warp/warp_kernels.py; PyTorch's in deterministic runs, for the kernels sum up the gradient of `x` in any
    order."""
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """vfi/ops/pointwise/layer_norm_kernels.py."""


class PointwiseModule(nn.Module):
    """A module that takes such kernels where it has them."""

    pointwise: Pointwise | None = None

    def bias_prelu(self, x: Tensor, bias: Any, slope: Any, residual: Tensor | None = None) -> Tensor:
        """By its kernel, of a map that nothing else needs: without gradients the result takes its place."""
        assert self.pointwise is not None
        activated: Tensor = self.pointwise.bias_prelu(x, bias, slope, residual, not torch.is_grad_enabled())
        return activated


def give_pointwise(network: nn.Module, pointwise: Pointwise | None) -> None:
    """Let all modules of `network` take these kernels, or PyTorch's operators."""
    for module in network.modules():
        if isinstance(module, PointwiseModule):
            module.pointwise = pointwise


def choose_pointwise(backend: str, device: torch.device) -> tuple[Pointwise | None, str]:
    """The kernels, or None for PyTorch's operators, and a line that says what was taken and why.

    fused raises where the kernels can't run.
    """
    taken, line = takes_fused("pointwise", backend, device)
    return _import() if taken else None, line


def _import() -> Pointwise:
    from vfi.ops.pointwise.bias_prelu_kernels import bias_prelu
    from vfi.ops.pointwise.concat_kernels import stack_channels
    from vfi.ops.pointwise.layer_norm_kernels import layer_norm
    from vfi.ops.warp.warp_kernels import backward_warp_fused

    def warp(x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
        return (backward_warp if torch.are_deterministic_algorithms_enabled() else backward_warp_fused)(x, flow, top)

    return Pointwise(bias_prelu, stack_channels, warp, layer_norm)
