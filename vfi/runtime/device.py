"""Choice of device and precision."""

from __future__ import annotations

from typing import Literal

import torch

from vfi.errors import JobError
from vfi.runtime.logging import logger

DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    if name == "fp16" and device.type == "cpu":
        logger.warning("--precision fp16 is for a GPU: on a CPU it takes far longer than fp32")
    return _TYPES[name]


def describe_precision(precision: torch.dtype) -> str:
    """Return the name of a precision in results and messages."""
    return next(f"{name} autocast" if precision.itemsize == 2 else name for name, one in _TYPES.items() if one == precision)


def autocast_to(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the region in which matrix products are of this dtype; for fp32 it changes nothing."""
    half = precision.itemsize == 2
    return torch.autocast(device.type, precision if half else torch.bfloat16, enabled=half)
