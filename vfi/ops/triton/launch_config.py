"""Launch configurations (blocks, warps, stages) of the fused Triton kernels: tuned for the GPU, else the default in the code.

    options = configuration("scan", shape_class, {"num_warps": 4, "num_stages": 3}, x.device)     # before every launch
    scan[grid](x, ..., **options)

Tuned configurations are in tuned_kernels.json under "fused": {kernel: [{"key": shape class, "config": options}]}, for the GPU
and the compiler with which they were measured (vfi/ops/triton/tuned_configs.py); `vfi tune-kernels` writes the file. A shape
class has what a kernel is compiled for: dtypes, the width of a head, the size of a state; not the frame size. The file is read
once per process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch

from vfi.ops.triton import tuned_configs
from vfi.runtime.attributes import replaced

Options = dict[str, int]
"""BLOCK, num_warps …: values by the name of the launch argument."""
ShapeClass = tuple[Any, ...]
"""Numbers, names and dtypes."""


def configuration(kernel: str, shape_class: ShapeClass, default: Options, device: torch.device) -> Options:
    """Return the tuned options of a kernel on this device; those of `default` for the rest."""
    found = known(device).get((kernel, shape_class))
    return default if found is None else default | found


@functools.cache
def known(device: torch.device) -> dict[tuple[str, ShapeClass], Options]:
    """Return all tuned options for a GPU; empty for other GPUs and for a CPU."""
    if device.type != "cuda":
        return {}
    try:
        kernels = tuned_configs.entry(device, tuned_configs.FILE, "fused")
    except importlib.metadata.PackageNotFoundError:  # a nightly build of Triton has another package name
        return {}
    return {(name, _read(one["key"])): one["config"] for name, entries in kernels.items() for one in entries}


def written(shape_class: ShapeClass) -> list[int | str | bool]:
    """Return a shape class as it is stored in the file."""
    return [str(value) if isinstance(value, torch.dtype) else value for value in shape_class]


def _read(key: list[Any]) -> ShapeClass:
    return tuple(getattr(torch, value[6:]) if str(value).startswith("torch.") else value for value in key)


@contextlib.contextmanager
def timed(kernel: str) -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """While active, every launch of a kernel is enclosed by two events, which are appended to the list."""
    from triton.runtime.jit import JITFunction

    run, events = JITFunction.run, list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    def launch(function: Any, *arguments: Any, **options: Any) -> Any:
        if function.__name__ != kernel:
            return run(function, *arguments, **options)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        result = run(function, *arguments, **options)
        after.record()
        events.append((before, after))
        return result

    with replaced(JITFunction, "run", launch):
        yield events


def can_not_run(error: Exception) -> bool:
    """Return whether the error says that a kernel can't be compiled with these options or exceeds the GPU's resources."""
    from triton.errors import TritonError

    # the last is raised by the compiler's passes
    return isinstance(error, TritonError) or (isinstance(error, RuntimeError) and "PassManager" in str(error))
