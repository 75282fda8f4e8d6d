"""How is a network run, for the same numbers? Parts of it compiled, or with activations that are computed anew.

Both change `forward` of parts in place: modules, parameters and their names stay as they are.
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
from vfi.model.refinement import MovedFeatures, RefineNet
from vfi.model.ss2d import SS2D, Mamba2SS2D
from vfi.model.window_attention import GatedWindowAttention
from vfi.ops.attention.window_attention import gated_window_attention
from vfi.ops.pointwise.dispatch import give_pointwise
from vfi.ops.ssm.scan_order import Scan

_VARIANTS = 64  # of the same code: widths, windows shifted or not, crops of a curriculum, frozen or not; by default the ninth
# would run uncompiled, with a word in the log


def compile_parts(network: FrameInterpolator, without_gradients: bool = False) -> None:
    """Compile, for training, what lies between the sums of an LGS block, the flow stages and RefineNet.

    To be called before `recompute`. Left as they are: the reordering and the core of the scan, which have kernels of their own;
    the residual mixing, for it is recorded by hooks, which compiled code would leave out; and, unless asked for, forward
    passes without gradients, for frames to be validated on come in all sizes.
    """
    from torch._dynamo import config as dynamo  # it takes a second to load

    for module in network.modules():
        if isinstance(module, SS2D):
            scan, unscan, sequences = module.scan
            module.scan = Scan(torch.compiler.disable(scan), torch.compiler.disable(unscan), sequences)
            module.island = torch.compiler.disable(module.island)
        if isinstance(module, Mamba2SS2D):
            module.fused = torch.compiler.disable(module.fused)
        if isinstance(module, GatedWindowAttention):
            if module.attend is None:
                module.fused = torch.compiler.disable(module.fused)
            elif module.attend is not gated_window_attention:
                module.attend = torch.compiler.disable(module.attend)
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    for part in _compiled(network):
        compiled = torch.compile(part.forward, dynamic=False)
        give_pointwise(part, None)  # the compiler makes kernels of what lies between convolutions itself
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
        # features are moved before: that has a kernel of its own
        return compiled(*(list(one) if isinstance(one, MovedFeatures) else one for one in args))

    return forward


def recompute(network: FrameInterpolator) -> None:
    """Keep for the backward pass what goes into an LGS block, a flow stage or RefineNet, and compute the rest anew there."""
    parts: list[nn.Module] = [part for part in network.modules() if isinstance(part, LGSBlock | FlowStage | RefineNet)]
    for part in parts:  # nothing in them is random
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
