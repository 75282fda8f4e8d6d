"""Availability of the fused Triton kernels on a device, the same for all of them: vfi/ops/*/*_kernels.py."""

from __future__ import annotations

import functools
import importlib.util

import torch

BACKENDS = ("auto", "torch", "fused")
_CAPABILITY = (8, 0)  # minimum compute capability: bf16 products and asynchronous copies


def why_unavailable(device: torch.device) -> str | None:
    """Return why the fused kernels can't run on `device`; None if they can."""
    if device.type != "cuda":
        return f"the fused kernels need a CUDA GPU and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        needed = ".".join(map(str, _CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {needed}, which the fused kernels need"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; docs/performance.md has the command"
    return None


def select_fused(name: str, backend: str, device: torch.device) -> tuple[bool, str]:
    """Return whether fused kernels serve `--NAME_backend`, and a line with the reason; `fused` raises if they can't run."""
    if backend not in BACKENDS:
        raise ValueError(f"{name}_backend {backend!r} does not exist; choose from {', '.join(BACKENDS)}")
    if backend == "torch":
        return False, f"{name}: torch (asked for)"
    obstacle = why_unavailable(device)
    if obstacle is None:
        return True, f"{name}: fused ({'asked for' if backend == 'fused' else f'available on {device}'})"
    if backend == "fused":
        raise RuntimeError(f"{name}_backend fused cannot run: {obstacle}; use --{name}_backend auto or torch")
    return False, f"{name}: torch ({obstacle})"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
