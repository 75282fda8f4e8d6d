"""Record the forward and backward passes of training once, as CUDA graphs, and replay them without waiting for Python.

    enable_expandable_segments()                           # before there is a tensor on the GPU
    capture_graphs(network)                                # before it is prepared for training
    prediction = network(img0, img1, timestep, imgt)       # recorded at the first call for a shape, which takes seconds
    training_losses(prediction, imgt, config)["loss"].backward()

A training step is two thousand small kernels, and on a slow processor they take less time than Python needs to launch them one
by one. A replay launches all kernels of a pass at once, on the memory in which they were recorded. So weights must stay where
they are (an optimizer updates them in place), nothing may depend on Python values, and each forward pass must have its backward
pass before the next one; gradients are copied out, so that they may be kept and accumulated as usual.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from vfi.model.interpolator import FrameInterpolator, Prediction, Stage
from vfi.runtime.cuda_graphs import TensorReadTracker

_WARM_UP = 3  # passes before the recorded one: kernels are compiled and selected, and memory use settles
_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # read by torch when the first GPU tensor is allocated
_SPARE = 1.25  # times the memory of these passes: when memory runs out during a capture, CUDA does not recover


def enable_expandable_segments() -> None:
    """Reduce the memory left free between recorded tensors; to be called before there is a tensor on a GPU.

    A recording keeps its memory segments to itself; expandable ones are fewer and better filled. An allocator setting in the
    environment is left as it is.
    """
    if not any(name in os.environ for name in _ALLOCATORS):
        os.environ[_ALLOCATORS[0]] = "expandable_segments:True"


def capture_graphs(network: FrameInterpolator) -> GraphRecorder:
    """Replay the passes of `network` that have gradients, on a GPU; other passes, as in validation, run as usual.

    Gradients come from what the loss reads: the image, the stages and the teacher of a Prediction.
    """
    recorder = GraphRecorder(network, network.forward)
    setattr(network, "forward", recorder)  # noqa: B010 (type checkers refuse to assign to a method)
    return recorder


class GraphRecorder:
    """The forward pass of a network: replayed in training, eager otherwise. Holds the graphs of the latest shape."""

    def __init__(self, network: FrameInterpolator, plain: Callable[..., Prediction]) -> None:
        self.network, self.plain = network, plain
        self.key: Hashable = None
        self.passes: _Passes | None = None

    @property
    def pool_bytes_free(self) -> int:
        """Bytes that passes use but torch.cuda.memory_allocated doesn't count, since they are free between recordings."""
        return self.passes.pool_bytes_free if self.passes else 0

    def __call__(
        self, img0: Tensor, img1: Tensor, timestep: Tensor, imgt: Tensor | None = None, scale: float | None = None
    ) -> Prediction:
        inputs = [img0, img1, timestep] if imgt is None else [img0, img1, timestep, imgt]
        if not (img0.is_cuda and self.network.training and torch.is_grad_enabled()):
            return self.plain(*inputs, scale=scale)
        weights = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        modes = tuple(module.training for module in self.network.modules())
        key = (scale, autocast, modes, tuple(map(id, weights.values())), *((t.shape, t.stride(), t.dtype) for t in inputs))
        if self.passes is None or key != self.key:
            self.passes = None  # release its memory first

            # separate leaves on the same memory: the node that accumulates a weight's gradient belongs to the stream in which
            # it was first used, which must not become part of a recording
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in weights.items()}
            plain = _Plain(self.network, self.plain)

            def forward(*inputs: Tensor) -> Prediction:
                # tensors already in the outer region's cast cache would be recorded as they are, and never cast again
                with torch.autocast("cuda", autocast[1], enabled=autocast[0], cache_enabled=False):
                    prediction: Prediction = functional_call(plain, leaves, inputs, {"scale": scale})
                    return prediction

            self.passes, self.key = _Passes(forward, inputs, list(leaves.values()), list(weights.values())), key
        return self.passes(inputs)


class _Plain(nn.Module):
    """A network called by its eager forward pass; parameters keep their names."""

    def __init__(self, network: FrameInterpolator, plain: Callable[..., Prediction]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = network._modules, network._parameters, network._buffers
        self.plain = plain

    def forward(self, *inputs: Tensor, scale: float | None) -> Prediction:
        return self.plain(*inputs, scale=scale)


class _Passes:
    """A forward and a backward pass recorded for one shape."""

    def __init__(
        self, forward: Callable[..., Prediction], inputs: list[Tensor], leaves: list[Tensor], weights: list[nn.Parameter]
    ) -> None:
        self.inputs, self.leaves, self.weights = [tensor.detach().clone() for tensor in inputs], leaves, weights
        self.turn = 0
        """Number of the forward pass that the memory holds."""
        gc.collect()  # frees the graphs of a network that a roll-back replaced
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                outputs = _outputs(forward(*self.inputs))
                self._gradients(outputs, [torch.zeros_like(output) for output in outputs])
                del outputs
        torch.cuda.current_stream().wait_stream(beside)
        _check_memory(torch.cuda.memory_reserved() - before)
        # other threads, which load data or monitor NCCL, call CUDA meanwhile
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode="thread_local"), TensorReadTracker() as reads:
            prediction = forward(*self.inputs)
        outputs = _outputs(prediction)
        self.output_gradients = [torch.zeros_like(output) for output in outputs]
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode="thread_local"):
            self.weight_gradients = self._gradients(outputs, self.output_gradients)
        self.prediction: Prediction = tree_map_only(Tensor, Tensor.detach, prediction)
        self.outputs = _outputs(self.prediction)
        self.kept = list(reads.kept.values())
        segments = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] == pool]
        self.pool_bytes_free = sum(segment["total_size"] - segment["allocated_size"] for segment in segments)
        torch.cuda.reset_peak_memory_stats()  # the recording counted memory that is pool_bytes_free from here on

    def __call__(self, inputs: list[Tensor]) -> Prediction:
        torch._foreach_copy_(self.inputs, inputs)
        return _with_outputs(self.prediction, list(_Replayed.apply(self, *self.weights)))

    def _gradients(self, outputs: list[Tensor], of_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.autocast("cuda", enabled=False):  # as backward passes run normally; this one is inside a forward pass
            return torch.autograd.grad(outputs, self.leaves, of_outputs, allow_unused=True)


def _check_memory(taken: int) -> None:
    """Raise OutOfMemoryError unless there is room for a graph of passes that took `taken` bytes, which are cached now."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < _SPARE * taken:
        raise torch.OutOfMemoryError(f"CUDA out of memory: to be recorded, a step needs {_SPARE * taken / 2**30:.1f} GiB")


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: _Passes, *weights: Tensor) -> tuple[Tensor, ...]:
        passes.turn += 1
        ctx.passes, ctx.turn = passes, passes.turn
        ctx.set_materialize_grads(False)
        passes.forward.replay()
        return tuple(output.detach() for output in passes.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        passes: _Passes = ctx.passes
        if ctx.turn != passes.turn:
            raise RuntimeError("with --cuda_graphs a forward pass must have its backward pass before the next one")
        for own, given in zip(passes.output_gradients, gradients, strict=True):
            if given is None:
                own.zero_()
            else:
                own.copy_(given)
        passes.backward.replay()
        made = [gradient for gradient in passes.weight_gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in made]
        torch._foreach_copy_(copies, made)
        rest = iter(copies)
        return None, *(None if gradient is None else next(rest) for gradient in passes.weight_gradients)


def _outputs(prediction: Prediction) -> list[Tensor]:
    """Return the tensors that the loss reads."""
    stages = (*prediction.stages, *([prediction.teacher] if prediction.teacher else []))
    return [prediction.imgt, *(tensor for stage in stages for tensor in (stage.flow, stage.merge))]


def _with_outputs(prediction: Prediction, outputs: list[Tensor]) -> Prediction:
    """Return `prediction` with these tensors in place of its own: the inverse of `_outputs`."""
    imgt, *rest = outputs
    stages = [Stage(flow, merge) for flow, merge in zip(rest[::2], rest[1::2], strict=True)]
    teacher = stages.pop() if prediction.teacher else None
    return prediction._replace(imgt=imgt, stages=tuple(stages), teacher=teacher)
