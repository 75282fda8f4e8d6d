"""The fused kernels of inference, compiled for a V100 and a T4 that are not there."""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import pytest
import torch

from vfi.config import presets
from vfi.model.interpolator import FrameInterpolator
from vfi.ops.attention import window_attention
from vfi.ops.ssm import fused_ss2d
from vfi.ops.triton import availability, precompile
from vfi.runtime.device import autocast_to

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = {
    "convolve", "time_steps", "scan", "gated_norm", "window_attention_forward", "warp_forward", "bias_prelu_forward",
    "stack_maps", "layer_norm_forward",
}  # fmt: skip


@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
@pytest.mark.parametrize(("architecture", "shared"), [(70, 96), (75, 64)])
def test_kernels_are_compiled(compile_for, monkeypatch, architecture, shared, precision):
    """In fp16 and fp32, each within the shared memory (KB) that such a card has for a program."""
    import triton

    from vfi.ops.pointwise import bias_prelu_kernels

    cache, kernels = compile_for(architecture), list[Any]()
    for module in (availability, window_attention, fused_ss2d):
        monkeypatch.setattr(module, "why_unavailable", lambda device: None)
    monkeypatch.setattr(fused_ss2d, "_is_small", lambda device: True)
    # nothing is launched, so that maps on the CPU do
    stand_in = types.SimpleNamespace(JITFunction=type(None), next_power_of_2=triton.next_power_of_2)
    monkeypatch.setattr(bias_prelu_kernels, "triton", stand_in)
    monkeypatch.setattr(precompile, "_load", lambda compile_or_find: kernels.append(compile_or_find()))
    config = presets.override(
        presets.tiny(), phase=2, ssd_backend="fused", attention_backend="fused", pointwise_backend="fused"
    ).model
    network = FrameInterpolator(config, "cpu").eval()
    assert network.all_fused
    region = autocast_to(torch.device("cpu"), precision)
    with torch.inference_mode(), region, precompile.compiling_ahead(torch.device("cuda", architecture)):
        network(*torch.rand(2, 1, 3, 64, 96), torch.tensor([0.5]))
    assert {kernel.metadata.name for kernel in kernels} >= KERNELS
    assert max(kernel.metadata.shared for kernel in kernels) <= shared * 1024
    targets = [path.read_text() for path in cache.glob("*/*.ptx")]
    assert targets
    assert all(f".target sm_{architecture}" in text for text in targets)
    assert list(cache.glob("*/*.cubin"))
