"""Choice between fused Triton kernels and PyTorch for the operators between the convolutions, when a network is built.

All of them are fused, or none. Each takes several passes over a map in PyTorch and one as a fused kernel: bias, skip
connection and PReLU; concatenation of channels, with the pixel shuffle; warping; layer norms in half precision. Without a GPU,
modules use PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfi.ops.triton.availability import select_fused
from vfi.ops.warp.warp import backward_warp


class FusedOps(NamedTuple):
    """The fused operators."""

    bias_prelu: Callable[..., Tensor]
    """vfi/ops/pointwise/bias_prelu_kernels.py."""
    concat_channels: Callable[..., Tensor]
    """vfi/ops/pointwise/concat_kernels.py."""
    backward_warp: Callable[..., Tensor]
    """vfi/ops/warp/warp_kernels.py; PyTorch's warping in deterministic runs, because the kernels sum the gradient of `x` in an
    arbitrary order.
    """
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """vfi/ops/pointwise/layer_norm_kernels.py."""


class FusedOpsModule(nn.Module):
    """Module that uses the fused operators if it has them."""

    pointwise: FusedOps | None = None

    def bias_prelu(self, x: Tensor, bias: Any, slope: Any, residual: Tensor | None = None) -> Tensor:
        """Apply the fused bias and PReLU to a map that nothing else needs: without gradients the result overwrites it."""
        assert self.pointwise is not None
        activated: Tensor = self.pointwise.bias_prelu(x, bias, slope, residual, not torch.is_grad_enabled())
        return activated


def set_fused_ops(network: nn.Module, pointwise: FusedOps | None) -> None:
    """Let all modules of `network` use these fused operators, or PyTorch's if None."""
    for module in network.modules():
        if isinstance(module, FusedOpsModule):
            module.pointwise = pointwise


def select_fused_ops(backend: str, device: torch.device) -> tuple[FusedOps | None, str]:
    """Return the fused operators, or None for PyTorch's, and a line that states the choice and the reason.

    The backend `fused` raises if the kernels can't run.
    """
    taken, line = select_fused("pointwise", backend, device)
    return _import() if taken else None, line


def _import() -> FusedOps:
    from vfi.ops.pointwise.bias_prelu_kernels import bias_prelu
    from vfi.ops.pointwise.concat_kernels import concat_channels
    from vfi.ops.pointwise.layer_norm_kernels import layer_norm
    from vfi.ops.warp.warp_kernels import backward_warp_fused

    def warp(x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
        return (backward_warp if torch.are_deterministic_algorithms_enabled() else backward_warp_fused)(x, flow, top)

    return FusedOps(bias_prelu, concat_channels, warp, layer_norm)
