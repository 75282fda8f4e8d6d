"""Costs of a network from its shapes: parameters, MACs, memory and traffic, for each part.

    cost = count(model, batch=1, size=(736, 1280), precision=torch.bfloat16)      # no GPU, nothing is computed

and from vfi.profiling.timing, which measures:

    measured = measure(step, make_frames, device, repeats=10)
    milliseconds = measure_parts(model, step, make_frames, device, repeats=10)
    floors = floors_ms(cost, measure_rates(device, torch.bfloat16))

A part is a child of the network, of the backbone, or of the blocks of one stage: new modules automatically become parts.
MACs (multiply-accumulates, half the FLOPs) are those of convolutions, matrix products and attention, as PyTorch's
`FlopCounterMode` counts them. Not counted: elementwise work, norms, softmax, gathers, warping, and the short convolution and
the propagated states of the scan.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from vfi.model.backbone import LEVELS
from vfi.runtime.device import autocast_to

FIRST_STAGE_LEVEL = LEVELS - 2
"""Pyramid level of the backbone's first stage of blocks; the second one follows."""
REST = "rest"
"""Everything that runs outside all parts: padding, blending, residual sums."""


def part_of(path: str) -> str | None:
    """Return the part of a module or parameter with this dotted path; None for a module that contains parts."""
    names = path.split(".")
    if names[:2] == ["backbone", "stages"]:
        inner = [name for name in names[4:] if name != "branches"]
        return f"stride {2 ** (FIRST_STAGE_LEVEL + int(names[2]))} {inner[0].rstrip('0123456789')}" if inner else None
    depth = 2 if names[0] == "backbone" else 1
    return " ".join(names[:depth]) if names[0] and len(names) >= depth else None


def part_names(model: nn.Module) -> list[str]:
    """Return the names of all parts of a model, in the order of its modules."""
    paths = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return list(dict.fromkeys(part for path in paths if path != "backbone.stages" and (part := part_of(path))))


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Return the number of trained values of every part, in the order of the model; they add up to the whole model."""
    numbers = dict.fromkeys((*part_names(model), REST), 0)
    for name, parameter in model.named_parameters():
        numbers[part_of(name) or REST] += parameter.numel()
    return numbers


@dataclasses.dataclass
class _Call:
    """One call of a part's module: clock readings, and the call that contains it."""

    part: str
    parent: int | None
    start: Any
    end: Any = None


@contextmanager
def watch_parts(model: nn.Module, clock: Callable[[], Any]) -> Iterator[list[_Call]]:
    """Read `clock` before and after every call of a part's module; the model itself is the part REST."""
    calls: list[_Call] = []
    open_calls: list[int] = []

    def enter(part: str) -> None:
        calls.append(_Call(part, open_calls[-1] if open_calls else None, clock()))
        open_calls.append(len(calls) - 1)

    def leave() -> None:
        calls[open_calls.pop()].end = clock()

    handles = []
    for module, part in [(model, REST), *outermost_parts(model)]:
        handles.append(module.register_forward_pre_hook(lambda module, args, part=part: enter(part)))
        handles.append(module.register_forward_hook(lambda module, args, output: leave()))
    with registered(handles):
        yield calls


@contextmanager
def registered(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks afterwards."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def outermost_parts(module: nn.Module, path: str = "") -> Iterator[tuple[nn.Module, str]]:
    """Yield the topmost modules of every part that are called as functions, which lists and dicts of modules are not."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        part = part_of(child_path) if child_path != "backbone.stages" else None
        if part is None or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from outermost_parts(child, child_path)
        else:
            yield child, part


def by_part(calls: Sequence[_Call], elapsed: Callable[[Any, Any], float]) -> dict[str, float]:
    """Return the sum over every part's calls, without the parts that were called inside them."""
    sums: dict[str, float] = {}
    for call in calls:  # a caller comes before its callees
        amount = elapsed(call.start, call.end)
        sums[call.part] = sums.get(call.part, 0) + amount
        if call.parent is not None:
            sums[calls[call.parent].part] -= amount
    return dict(sums)


class CostCounter(TorchDispatchMode):
    """Count every operator that runs inside it, on real or on fake tensors, with gradients off.

    `macs`: total; `by_kind`: by kind of operator; `peak`: largest number of bytes alive at once in tensors that were created
    inside; `operations`: (MACs, bytes read and written) of every operator that accesses memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()
        self.operations: list[tuple[int, int]] = []
        self.macs = self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        given = [tensor.untyped_storage() for tensor in read]
        new = [storage for tensor in made if (storage := tensor.untyped_storage()) not in self._seen and storage not in given]
        if func.is_view or not (new or func._schema.is_mutable):  # or a query, such as that for a tensor's device
            return out
        formula = _formulas().get(func.overloadpacket)
        macs = formula(*args, **kwargs, out_val=out) // 2 if formula else 0
        if macs:
            self.macs += macs
            self.by_kind[_kind(func.overloadpacket.__name__)] += macs
        self.operations.append((macs, sum(map(_nbytes, (*read, *made)))))
        for storage in new:
            self._keep(storage)
        return out

    def _keep(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until nothing refers to it any more."""
        self._seen.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


@functools.cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Return the functions that count the floating-point operations of an operator, by its packet."""
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # takes half a second, and is rarely needed

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    # before torch 2.15 the registry only has attention on GPUs
    return flop_registry | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes that are read for a tensor: an expanded one repeats its data."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _kind(operator: str) -> str:
    if "scaled_dot_product" in operator:
        return "attention"
    kinds = {"mm": "linear layers", "addmm": "linear layers", "bmm": "batched products", "baddbmm": "batched products"}
    return "convolutions" if "convolution" in operator else kinds.get(operator, operator)


class Traffic(NamedTuple):
    """Bytes of the calls of a part: all inputs and outputs, and its weights."""

    inputs: int = 0
    outputs: int = 0
    weights: int = 0

    @property
    def forward(self) -> int:
        """Return the bytes of a forward pass, where each is read or written at least once."""
        return sum(self)

    @property
    def training(self) -> int:
        """Return the bytes of both passes.

        Backward, inputs, weights and the gradient of the outputs are read, and the gradients of inputs and weights written.
        """
        return 3 * self.inputs + 2 * self.outputs + 3 * self.weights


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one forward pass, from its shapes alone. MACs by part and by kind add up to the same total."""

    macs: dict[str, int]
    by_kind: dict[str, int]
    peak_bytes: int
    """Weights, inputs, and the maximum of tensors alive at once."""
    operations: list[tuple[int, int]]
    """(MACs, bytes) of every operator."""
    traffic: dict[str, Traffic]
    """Traffic of each part; intermediate results between the operators of one part do not count."""


def count(model: nn.Module, batch: int, size: tuple[int, int], precision: torch.dtype) -> Cost:
    """Return the cost of `model(img0, img1, timestep)` for a batch of frames of (H, W); the model is on the CPU, unfused.

    Nothing is computed and no memory is allocated: the frames are fake tensors, which have a shape and no content.
    """
    counter = CostCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        frames = (*torch.empty(2, batch, 3, *size), torch.empty(batch))
        with (
            autocast_to(torch.device("cpu"), precision),
            watch_parts(model, lambda: counter.macs) as calls,
            _watch_traffic(model, precision) as traffic,
            counter,
        ):
            model(*frames)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    peak = weights + sum(frame.nbytes for frame in frames) + counter.peak
    macs = by_part(calls, lambda start, end: end - start)
    return Cost({part: int(number) for part, number in macs.items()}, dict(counter.by_kind), peak, counter.operations, traffic)


@contextmanager
def _watch_traffic(model: nn.Module, precision: torch.dtype) -> Iterator[dict[str, Traffic]]:
    """Record the traffic of each part, with weights of that precision; the model itself is the part REST, without weights."""
    traffic: dict[str, Traffic] = {}

    def add(part: str, module: nn.Module, given: object, output: object) -> None:
        inputs, outputs = (
            sum(_nbytes(one) for one in tree_leaves(values) if isinstance(one, Tensor)) for values in (given, output)
        )
        weights = 0 if part == REST else precision.itemsize * sum(parameter.numel() for parameter in module.parameters())
        before = traffic.get(part, Traffic())
        traffic[part] = Traffic(*map(sum, zip(before, (inputs, outputs, weights), strict=True)))

    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output, part=part: add(part, module, (args, kwargs), output), with_kwargs=True
        )
        for module, part in [(model, REST), *outermost_parts(model)]
    ]
    with registered(handles):
        yield traffic


def receptive_fields(levels: Sequence[nn.Module]) -> list[int]:
    """Return the receptive field in pixels, along one axis, of the convolutions of all levels up to each one."""
    field = jump = 1
    fields = []
    for level in levels:
        for conv in (module for module in level.modules() if isinstance(module, nn.Conv2d)):
            field += (conv.kernel_size[0] - 1) * conv.dilation[0] * jump
            jump *= conv.stride[0]
        fields.append(field)
    return fields
