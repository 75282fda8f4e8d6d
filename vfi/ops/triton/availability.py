"""Availability of the fused Triton kernels on a device, the same for all of them: vfi/ops/*/*_kernels.py."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch

from vfi.errors import JobError

BACKENDS = ("auto", "torch", "fused")
UnavailableReason = Callable[[torch.device], str | None]
"""device -> why kernels can't run there, or None if they can."""
_CAPABILITY = (8, 0)  # minimum compute capability that `auto` takes: bf16 products and asynchronous copies
_COMPILED = (7, 0)  # … for which the kernels of fp16 and fp32 are compiled in a test, and which nobody has run


class Untried(str):
    """Reason why `auto` passes kernels over; a user who names them may try."""


def may_be_tried(obstacle: str | None) -> bool:
    """Return whether kernels run, or can be tried by name, in spite of what `why_unavailable` says."""
    return obstacle is None or isinstance(obstacle, Untried)


def why_unavailable(device: torch.device) -> str | None:
    """Return why the fused kernels can't run on `device`, or are not taken by `auto` (Untried); None if they can."""
    if device.type != "cuda":
        return f"the fused kernels need a CUDA GPU and the device is {device.type}"
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < _COMPILED:
        return f"{name} is older than compute capability {'.'.join(map(str, _COMPILED))}, which the fused kernels need"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; docs/performance.md has the command"
    if capability < _CAPABILITY:
        return Untried(
            f"on {name}, of compute capability {'.'.join(map(str, capability))}, the fused kernels were compiled for fp16 and "
            f"fp32, but never run"
        )
    return None


def select_fused(name: str, backend: str, device: torch.device) -> tuple[bool, str]:
    """Return whether fused kernels serve `--NAME_backend`, and a line with the reason; `fused` raises if they can't run."""
    chosen, line = select_backend(name, f"{name}_backend", backend, BACKENDS, device, {"fused": why_unavailable})
    return chosen == "fused", line


def select_backend(
    operator: str,
    flag: str,
    backend: str,
    backends: Sequence[str],
    device: torch.device,
    kernels: Mapping[str, UnavailableReason],
) -> tuple[str, str]:
    """Return the backend that serves an operator, and a line that states the choice and the reason.

    `backends`: the values of the flag, "auto" and the reference first. `kernels` maps those with kernels for this operator, the
    best first, to functions that return why each can't run. A named backend that can't run raises JobError, an unknown one
    ValueError.
    """
    _, reference, *_ = backends
    if backend not in backends:
        raise ValueError(f"{flag} {backend!r} does not exist; choose from {', '.join(backends)}")
    if backend == reference:
        return backend, f"{operator}: {reference} (asked for)"
    if backend != "auto":
        problem = kernels[backend](device) if backend in kernels else f"{operator} has no such kernels"
        if not may_be_tried(problem):
            raise JobError(f"--{flag} {backend} cannot run: {problem}; use --{flag} auto or {reference}")
        return backend, f"{operator}: {backend} (asked for{f'; {problem}' if problem else ''})"
    problems: list[str] = []
    for name, why in kernels.items():
        problem = why(device)
        if problem is None:
            return name, f"{operator}: {name} ({'; '.join((f'available on {device}', *problems))})"
        problems.append(problem)
    return reference, f"{operator}: {reference} ({'; '.join(problems)})"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
