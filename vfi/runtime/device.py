"""Choice of device and precision."""

from __future__ import annotations

from typing import Literal

import torch

from vfi.errors import JobError

DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "fp32", "bf16"]


def pick_device(name: DeviceName) -> torch.device:
    """Return the device: for `auto` the GPU if there is one. Raises JobError for `cuda` on a machine without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise JobError("--device cuda: no CUDA GPU is usable here; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_precision(name: PrecisionName, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: for `auto` bf16 on a GPU that supports it, fp32 elsewhere. Weights keep theirs."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def describe_precision(precision: torch.dtype) -> str:
    """Return the name of a precision in results and messages."""
    return "bf16 autocast" if precision == torch.bfloat16 else "fp32"


def autocast_to(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
