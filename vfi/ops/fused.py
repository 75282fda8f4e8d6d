"""Can kernels of our own run on a device? The same for all of them: vfi/ops/*_kernels.py."""

from __future__ import annotations

import functools
import importlib.util

import torch

_CAPABILITY = (8, 0)  # bf16 products and asynchronous copies


def fused_obstacle(device: torch.device) -> str | None:
    """Why they can't; None where they can."""
    if device.type != "cuda":
        return f"the fused kernels need a CUDA GPU and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        needed = ".".join(map(str, _CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {needed}, which the fused kernels need"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; README.md has the command"
    return None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
