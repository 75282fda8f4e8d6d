"""Capture the forward passes of small frames as CUDA graphs and replay them, so that they don't wait for the CPU.

    graphs = Graphs()
    imgt = graphs(function, img0, img1, timestep)       # function(img0, img1, timestep), to the bit

A network is hundreds of kernels, and launching them one by one takes longer than running them on frames up to about 1080p, or
up to 4K if other threads need Python, too. A graph holds the kernels and the addresses they work on. So the function may depend
only on its inputs and on tensors that stay in place, such as weights; those that its operators read are kept alive with the
graph.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_BEFORE = 2  # calls of a shape before its graph is worth its making; in them kernels are tuned and caches filled
_LARGEST = 2176 * 4096  # pixels of all frames of the batch: above, the GPU is what one waits for
_SPARE = 1.25  # times what is expected, for what does not fit side by side
_KEPT = 4  # graphs, those used last; they share one pool of memory

Function = Callable[..., Tensor]


class Graphs:
    """Calls functions of tensors by CUDA graphs where that is faster: on a GPU, for small frames of a recurring shape."""

    def __init__(self) -> None:
        self.limit: float = math.inf
        """Bytes of the GPU that all of this process may take."""
        self.call_counts: Counter[Hashable] = Counter()
        self.captured: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self.pool: Any = None

    def __call__(self, function: Function, *inputs: Tensor, kind: Hashable = None) -> Tensor:
        """Return `function(*inputs)`. Functions that compute different things for the same shapes must differ in `kind`."""
        if not _is_worth_capturing(inputs[0]):
            return function(*inputs)
        key = (kind, *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs))
        if key not in self.captured:
            self.call_counts[key] += 1
            if self.call_counts[key] < _BEFORE:
                return function(*inputs)
            if self.call_counts[key] == _BEFORE:
                with (
                    TensorReadTracker()
                ):  # a compiled function compiles once more under it, which must not happen during the capture
                    return function(*inputs)
            if not self._fits(inputs[0].device):
                self.call_counts[key] = 0
                return function(*inputs)
            self._make(key, function, inputs)
        self.captured.move_to_end(key)
        return self.captured[key](inputs)

    def drop(self) -> bool:
        """Discard all graphs, so that their memory can be released, and return whether there was one."""
        there = bool(self.captured)
        self.captured.clear()
        self.call_counts.clear()
        self.pool = None
        return there

    def _fits(self, device: torch.device) -> bool:
        """Return whether there is memory for a graph, as much as the calls before it took.

        CUDA does not recover when memory runs out during a capture.
        """
        taken, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
        free = min(torch.cuda.mem_get_info(device)[0], self.limit - torch.cuda.memory_reserved(device))
        return free > _SPARE * (taken - used)

    def _make(self, key: Hashable, function: Function, inputs: tuple[Tensor, ...]) -> None:
        if len(self.captured) == _KEPT:
            dropped, _ = self.captured.popitem(last=False)
            self.call_counts[dropped] = 0
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        self.captured[key] = CapturedCall(function, inputs, self.pool)


class CapturedCall:
    """A function of tensors captured as a CUDA graph for inputs of one shape; it must have been called with them before."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], pool: Any = None) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # other threads, which load data, call CUDA meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"), TensorReadTracker() as reads:
            self.output = function(*self.inputs)
        self.kept = list(reads.kept.values())

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.output.clone()


class TensorReadTracker(TorchFunctionMode):
    """Collects the existing tensors that operators read, such as indices that a cache may drop.

    No dispatch mode: the first one of a process imports PyTorch's compiler, which takes seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}
        self.own: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if (address := tensor.untyped_storage().data_ptr()) not in self.own:
                self.kept.setdefault(address, tensor)
        result = func(*args, **(kwargs or {}))
        self.own.update(tensor.untyped_storage().data_ptr() for tensor in _tensors(result))
        return result


def _tensors(values: Any) -> list[Tensor]:
    # a compiler's tensors, of a subclass or on the device "meta", have no memory
    return [value for value in tree_leaves(values) if type(value) in (Tensor, nn.Parameter) and not value.is_meta]


def _is_worth_capturing(frames: Tensor) -> bool:
    """Return whether launching kernels takes longer than running them on `frames` `[B, 3, H, W]`."""
    return frames.is_cuda and frames.shape[0] * frames.shape[2] * frames.shape[3] <= _LARGEST
