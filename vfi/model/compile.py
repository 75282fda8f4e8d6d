"""Execution options that keep the results: compile modules of a network, or recompute their activations.

Both replace `forward` of modules in place: modules, parameters and their names stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vfi.model.backbone import LGSBlock
from vfi.model.flow import FlowStage
from vfi.model.interpolator import FrameInterpolator
from vfi.model.refinement import LazyWarpedFeatures, RefineNet
from vfi.model.ss2d import SS2D, Mamba2SS2D
from vfi.model.window_attention import GatedWindowAttention
from vfi.ops.attention.window_attention import gated_window_attention
from vfi.ops.pointwise.dispatch import set_fused_ops
from vfi.ops.ssm.scan_order import Scan

_VARIANTS = 64  # of the same code: widths, shifted windows or not, crops of a curriculum, frozen or not; by default
# the ninth would run uncompiled, with only a log message


def compile_modules(network: FrameInterpolator, without_gradients: bool = False) -> None:
    """Compile, for training, the computations between the sums of an LGS block, the flow stages and RefineNet.

    Call it before `checkpoint_activations`. Three things stay uncompiled: the reordering and the core of the scan, which are
    operators of their own; the residual mixing, because it is recorded by hooks, which compiled code would skip; and, unless
    `without_gradients` is set, forward passes without gradients, because validation frames come in all sizes.
    """
    from torch._dynamo import config as dynamo  # imported here because it takes a second to load

    for module in network.modules():
        if isinstance(module, SS2D):
            scan, unscan, sequences = module.scan
            module.scan = Scan(torch.compiler.disable(scan), torch.compiler.disable(unscan), sequences)
            module.island = torch.compiler.disable(module.island)
        if isinstance(module, Mamba2SS2D):
            module.core = torch.compiler.disable(module.core)
        if isinstance(module, GatedWindowAttention):
            if module.attend is None:
                module.fused = torch.compiler.disable(module.fused)
            elif module.attend is not gated_window_attention:
                module.attend = torch.compiler.disable(module.attend)
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    for part in _compiled(network):
        compiled = torch.compile(part.forward, dynamic=False)
        set_fused_ops(part, None)  # the compiler generates its own kernels between the convolutions
        part.forward = compiled if without_gradients else _in_training(compiled, part.forward)


def _compiled(network: FrameInterpolator) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, LGSBlock):
            yield from (*module.branches.values(), module.fusion)
        elif isinstance(module, FlowStage | RefineNet):
            yield module


def _in_training(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args)
        # warp the features before the call: that has a fused Triton kernel
        return compiled(*(list(one) if isinstance(one, LazyWarpedFeatures) else one for one in args))

    return forward


def checkpoint_activations(network: FrameInterpolator) -> None:
    """Keep only the inputs of LGS blocks, flow stages and RefineNet for the backward pass, and recompute the rest there."""
    parts: list[nn.Module] = [part for part in network.modules() if isinstance(part, LGSBlock | FlowStage | RefineNet)]
    for part in parts:  # they draw no random numbers
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
