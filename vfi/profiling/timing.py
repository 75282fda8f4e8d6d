"""Measured time and memory of a network, by part, and roofline bounds to compare them with."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vfi.profiling.costs import Cost, by_part, outermost_parts, registered, watch_parts

WARMUP = 3
_ROTATION = 3  # different inputs, so that none of them stays in a cache
_CACHE_BYTES = 2**28  # larger than the cache of any GPU
_HEAD_START, _PARTS_HEAD_START = 60_000_000, 10_000_000  # clock cycles, 30 and 5 ms: longer than Python takes to launch a call


class Rates(NamedTuple):
    """Peak rates of a device."""

    tflops: float
    """10^12 operations per second, in products of large matrices."""
    gbs: float
    """10^9 bytes read or written per second, by a copy."""


def measure_rates(device: torch.device, precision: torch.dtype, repeats: int = 10) -> Rates:
    """Measure the rates of this device, with matrix products in that precision."""
    side, nbytes = (8192, 2**30) if device.type == "cuda" else (256, 2**26)  # larger than any cache
    pair = torch.empty(2, nbytes, dtype=torch.uint8, device=device).unbind()
    copied = measure(lambda pair: pair[0].copy_(pair[1]), lambda: pair, device, repeats)
    product = measure(
        lambda pair: torch.mm(*pair), lambda: tuple(torch.randn(2, side, side, device=device, dtype=precision)), device, repeats
    )
    return Rates(2 * side**3 / product.ms / 1e9, 2 * nbytes / copied.ms / 1e6)


def floors_ms(cost: Cost, rates: Rates, training: bool = False) -> dict[str, float]:
    """Return the roofline bound of every part in ms: its products or its traffic, whichever takes longer.

    `training`: both passes.
    """
    floors = {}
    for part, traffic in cost.traffic.items():
        products = (3 if training else 1) * 2e-9 * cost.macs[part] / rates.tflops
        memory = 1e-6 * (traffic.training if training else traffic.forward) / rates.gbs
        floors[part] = max(products, memory)
    return floors


def roofline_ms(operations: Sequence[tuple[int, int]], tflops: float, gbs: float) -> float:
    """Return the time if every operator ran alone at the full rate of either arithmetic (TFLOP/s) or memory (GB/s)."""
    return 1e3 * sum(max(2 * macs / (tflops * 1e12), nbytes / (gbs * 1e9)) for macs, nbytes in operations)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Time and memory of a call.

    `ms`: median of one call. Bytes are the peak of a call after warm-up, including weights and inputs; None on a CPU.
    """

    ms: float
    allocated: int | None = None
    reserved: int | None = None


Step = Callable[[tuple[Tensor, ...]], object]


def measure(step: Step, make_frames: Callable[[], tuple[Tensor, ...]], device: torch.device, repeats: int) -> Measured:
    """Measure time and memory of `step(frames)`; the caller handles torch.OutOfMemoryError."""
    frames = make_frames()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    for _ in range(WARMUP):
        step(frames)
    allocated = reserved = None
    if on_gpu:  # before the other inputs exist; the memory for choosing algorithms in the warm-up stays in `reserved`
        torch.cuda.reset_peak_memory_stats(device)
        step(frames)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    rotation = [frames, *(make_frames() for _ in range(_ROTATION - 1))]
    clock, elapsed = _clock(device)
    times = []
    for number in range(repeats):
        start = clock()
        step(rotation[number % _ROTATION])
        times.append((start, clock()))
    return Measured(statistics.median(elapsed(*pair) for pair in times), allocated, reserved)


def measure_parts(
    model: nn.Module, step: Step, make_frames: Callable[[], tuple[Tensor, ...]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Return the median milliseconds of every part over calls of `step(frames)`, which calls the model once.

    They add up to the whole call.
    """
    rotation = [make_frames() for _ in range(_ROTATION)]
    step(rotation[0])
    clock, elapsed = _clock(device)
    passes = []
    for number in range(repeats):
        with watch_parts(model, clock) as calls:
            queue_ahead(device)
            step(rotation[number % _ROTATION])
        passes.append(calls)
    sums = [by_part(calls, elapsed) for calls in passes]
    return {part: statistics.median(one[part] for one in sums) for part in sums[0]}


def measure_training_parts(
    model: nn.Module, step: Step, frames: tuple[Tensor, ...], device: torch.device, precision: torch.dtype, repeats: int
) -> dict[str, Measured]:
    """Measure the forward and backward pass of every part, each of its calls alone, with its arguments from `step(frames)`.

    `step` calls the model with gradients. The result is the time of all calls, and the memory of the largest call in addition
    to
    its arguments. Parts that call others, such as the residual mixing, are left out.
    """
    given: list[tuple[nn.Module, Any]] = []
    with watch_parts(model, lambda: None) as calls, _watch_given(model, given):
        step(frames)
    clock, elapsed = _clock(device)
    sums: dict[str, Measured] = {}
    callers = {call.parent for call in calls}
    for index, (call, (module, arguments)) in enumerate(zip(calls, given, strict=True)):
        if index in callers:
            continue
        times = []
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        for number in range(WARMUP + repeats):
            if number == WARMUP and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), arguments)
            queue_ahead(device, _PARTS_HEAD_START)
            start = clock()
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                output = module(*args, **kwargs)
            made = [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.requires_grad]
            torch.autograd.backward(made, [torch.ones_like(one) for one in made])
            times.append((start, clock()))
            del output, made  # and the gradients of the arguments with them
        ms = statistics.median(elapsed(*pair) for pair in times[WARMUP:])
        taken = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        known = sums.get(call.part, Measured(0.0, taken))
        sums[call.part] = Measured(known.ms + ms, taken and max(taken, known.allocated or 0))
    model.zero_grad(set_to_none=True)
    return sums


@contextmanager
def _watch_given(model: nn.Module, given: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Record the arguments of every call of a part's module, in the order of `watch_parts`."""

    def add(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((module, (args, kwargs)))

    modules = [model, *(module for module, _ in outermost_parts(model))]
    handles = [module.register_forward_pre_hook(add, with_kwargs=True) for module in modules]
    with registered(handles):
        yield


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Return the median time of calls that find none of their inputs in the GPU's cache and never wait for the CPU."""
    clock, elapsed = _clock(device)
    other = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(WARMUP + repeats):
        other.zero_()
        queue_ahead(device)
        start = clock()
        call()
        times.append((start, clock()))
    return statistics.median(elapsed(*pair) for pair in times[WARMUP:])


def queue_ahead(device: torch.device, cycles: int = _HEAD_START) -> None:
    """Delay the next launches in the GPU's queue, so that none of them waits for the CPU."""
    if device.type == "cuda":
        torch.cuda._sleep(cycles)


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Return a function that takes a reading, and one that returns the milliseconds between two of them."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: 1e3 * (end - start)

    def clock() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return clock, elapsed
