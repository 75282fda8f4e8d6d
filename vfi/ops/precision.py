"""Operations that stay in fp32 under bf16 or fp16 autocast: everything called through `fp32_island`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_HALF = (torch.float16, torch.bfloat16)


def fp32_island(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call `function` with autocast off and every fp16 or bf16 tensor argument converted to fp32; float64 stays float64."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    args, kwargs = tuple(map(_raise, args)), {name: _raise(value) for name, value in kwargs.items()}
    if not torch.is_autocast_enabled(device):  # a region would become a separate graph where the network is traced
        return function(*args, **kwargs)
    with torch.autocast(device, enabled=False):
        return function(*args, **kwargs)


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
