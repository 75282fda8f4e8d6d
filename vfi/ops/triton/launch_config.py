"""With which blocks, warps and stages is a kernel of our own launched? As was fastest on such a card, else as its code says.

    options = configuration("scan", shape_class, {"num_warps": 4, "num_stages": 3}, x.device)     # before every launch
    scan[grid](x, ..., **options)

What is known stands in tuned_kernels.json under "fused": {kernel: [{"key": shape class, "config": options}]}, for the card and
the compiler that it was measured with (vfi/ops/triton/tuned_configs.py); `vfi tune` makes it. A shape class has what a kernel
is compiled for: types, the width of a head, the size of a state; not the size of the frames. The file is read once a process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from vfi.ops.triton import tuned_configs

Options = dict[str, int]
"""BLOCK, num_warps …: by the name under which a launch is given them."""
ShapeClass = tuple[Any, ...]
"""Numbers, names and types."""


def configuration(kernel: str, shape_class: ShapeClass, default: Options, device: torch.device) -> Options:
    """What is known for a kernel on this device; what is not, as in `default`."""
    found = known(device).get((kernel, shape_class))
    return default if found is None else default | found


@functools.cache
def known(device: torch.device) -> dict[tuple[str, ShapeClass], Options]:
    """All that is known for a GPU; nothing for others, nor for a CPU."""
    if device.type != "cuda":
        return {}
    try:
        kernels = tuned_configs.entry(device, tuned_configs.FILE, "fused")
    except importlib.metadata.PackageNotFoundError:  # a nightly build of Triton, by another name
        return {}
    return {(name, _read(one["key"])): one["config"] for name, entries in kernels.items() for one in entries}


def written(shape_class: ShapeClass) -> list[int | str | bool]:
    """As it stands in the file."""
    return [str(value) if isinstance(value, torch.dtype) else value for value in shape_class]


def _read(key: list[Any]) -> ShapeClass:
    return tuple(getattr(torch, value[6:]) if str(value).startswith("torch.") else value for value in key)


@contextlib.contextmanager
def timed(kernel: str) -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """Meanwhile every launch of a kernel lies between two events, which are in the list."""
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

    with mock.patch.object(JITFunction, "run", launch):
        yield events


def can_not_run(error: Exception) -> bool:
    """Does it say that a kernel can't be compiled with these options, or takes more than the GPU has?"""
    from triton.errors import TritonError

    # the last is what the compiler's passes raise
    return isinstance(error, TritonError) or (isinstance(error, RuntimeError) and "PassManager" in str(error))
