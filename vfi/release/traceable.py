"""Trace the network into a single graph with dynamic height, width and batch size.

    network = traceable(network)                # on a CPU, in fp32; a copy, the original stays unchanged
    imgt = network(img0, img1, timestep)        # [B, 3, H, W] in [0, 1], [B] -> the same up to rounding, clamped
    program = trace(network)

The network's computation depends on the size: indices come from a cache, chunks of tokens are processed in a loop, and windows
get a mask only where they need one. A graph would freeze the choices for the size that it was traced at. Here the operators
have a single code path for all sizes, at the cost of some memory and time.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.errors import JobError
from vfi.model.backbone import STRIDE
from vfi.model.interpolator import FrameInterpolator, check_frames
from vfi.model.ss2d import Mamba2SS2D
from vfi.model.window_attention import GatedWindowAttention
from vfi.ops.attention.window_attention import gated_window_attention_open
from vfi.ops.pointwise.dispatch import set_fused_ops
from vfi.ops.ssm.scan_order import ALL, OPEN_SCANS
from vfi.ops.ssm.ssd import ssd_open

_TRACED_AT = (2, 3, 80, 96)  # any size would do


class TraceableInterpolator(nn.Module):
    """The network reduced to two frames and a timestep -> the in-between frame."""

    def __init__(self, network: FrameInterpolator) -> None:
        super().__init__()
        self.network = network
        self.multiple = round(STRIDE / network.config.scale)

    def forward(self, img0: Tensor, img1: Tensor, timestep: Tensor) -> Tensor:
        check_frames(img0, img1)
        B, _, H, W = img0.shape
        top, bottom = _around(H, self.multiple)
        left, right = _around(W, self.multiple)
        # padded here, so that every size inside the network is a plain multiple and nothing is left to pad
        frames = F.pad(torch.cat((img0, img1)), (left, right, top, bottom), mode="replicate")
        imgt: Tensor = self.network(*frames.split([B, B]), timestep).imgt
        return imgt.narrow(2, top, H).narrow(3, left, W).clamp(0, 1)


def traceable(network: FrameInterpolator) -> TraceableInterpolator:
    """Return a copy of `network` for tracing. Raises JobError naming an operator that has no traceable form."""
    if network.config.backbone_mode != "gated_attn_only" and network.config.ssm != "mamba2":
        raise JobError(
            f"--ssm {network.config.ssm} cannot be traced: its operator (vfi/ops/ssm/selective_scan.py) is a loop over tokens, "
            f"whose number changes with the size of the frames. Use --format torch, or a model with --ssm mamba2"
        )
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # channels-last weights would be saved twice
    open_operators(network, network.config.scan)
    return TraceableInterpolator(network).eval()


def open_operators(network: nn.Module, scan: str) -> None:
    """Replace the operators of the blocks in `network` by variants with a single code path for all sizes."""
    for module in network.modules():
        if isinstance(module, Mamba2SS2D):
            module.scan, module.ssd = OPEN_SCANS[scan], ssd_open
            module.forward = functools.partial(module.some_pairs, orders=len(ALL))  # type: ignore[method-assign]
        elif isinstance(module, GatedWindowAttention):
            module.attend = gated_window_attention_open
    set_fused_ops(network, None)


def trace(network: nn.Module) -> torch.export.ExportedProgram:
    """Trace one graph for every batch, height and width. Takes half a minute or more, mostly for symbolic algebra on sizes."""
    B = _TRACED_AT[0]
    frames = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    example = (torch.zeros(_TRACED_AT), torch.zeros(_TRACED_AT), torch.full((B,), 0.5))
    with torch.no_grad(), open_sizes():
        return torch.export.export(
            network,
            example,
            dynamic_shapes=(frames, frames, {0: torch.export.Dim.AUTO}),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextlib.contextmanager
def open_sizes() -> Iterator[None]:
    """Apply PyTorch's settings for work on a graph with symbolic sizes."""
    # deferred: the imports take seconds
    import torch._dynamo.config
    import torch.fx.experimental._config

    with (
        # a batch of one is no special case
        torch.fx.experimental._config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        # caching results costs more than recomputing them
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
    ):
        yield


def _around(size: int, multiple: int) -> tuple[int, int]:
    """Return the padding before and after, as the network pads: together they cancel `size` out, if it is symbolic.

    No negative number is divided, which ONNX would round in the other direction.
    """
    whole = (size + multiple - 1) // multiple
    before = whole * (multiple // 2) - (size + 1) // 2
    return before, whole * multiple - size - before
