"""Search for the fastest blocks, warps and stages of the fused Triton kernels on this GPU, option by option, kernel by kernel.

    found = list(search_step(TrainingStep(config, device, torch.bfloat16), known=()))
    kernels = as_entries(found)                 # everything faster than the defaults in the code, for tuned_kernels.json

A training step shows which SS2Ds, window attentions, loss and operators between convolutions run on which inputs; each is then
run alone, forward and backward, and only the kernel in question is measured. A choice counts if it is more than 3 % and one
microsecond faster than the default in the code, and the results are the same.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from vfi.model.ss2d import SS2D
from vfi.model.window_attention import GatedWindowAttention
from vfi.ops.loss.laplacian import choose_loss
from vfi.ops.pointwise.dispatch import FusedOps, FusedOpsModule
from vfi.ops.triton import launch_config, tuned_configs
from vfi.ops.triton.precompile import compiling_ahead
from vfi.profiling.timing import queue_ahead
from vfi.runtime.attributes import replaced
from vfi.training.synthetic_step import TrainingStep

Key = tuple[str, launch_config.ShapeClass]
"""A kernel and its shape class."""
_VALUES = {"num_warps": (1, 2, 4, 8), "num_stages": (1, 2, 3, 4), "TOKENS": (16, 32, 64), "maxnreg": (0, 128, 168)}
_FACTORS = (0.25, 0.5, 2)  # multiples of the default that are tried for other block sizes
_NEVER = (
    ("scan", "num_stages", 1),  # Triton 3.6 compiles it into out-of-bounds reads, which affect later launches
    ("scan", "num_warps", 8),
    ("scan_gradients", "num_warps", 1),  # a single warp lacks the registers, and compiling takes minutes
    ("scan_key_gradients", "num_warps", 1),
)
_GAIN = 0.97  # maximum fraction of the default's time for a choice to be kept
_SHORTEST_GAIN = 0.001  # ms, about the resolution of CUDA's clock
_REPEATS = 5
_AHEAD = 20_000_000  # cycles, 10 ms, in which a run is queued
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # another summation order; a mistake is larger


class Found(NamedTuple):
    """Result of the search for a kernel and a shape class."""

    kernel: str
    shape_class: launch_config.ShapeClass
    default: launch_config.Options
    options: launch_config.Options
    """The fastest options; `default` if nothing was faster."""
    before: float
    """Milliseconds of its launches in one run, with the default."""
    after: float
    tried: int
    skipped: int
    """Of the tried options: could not be compiled, exceeded the GPU's resources, or gave other results."""

    @property
    def key(self) -> Key:
        return self.kernel, self.shape_class

    def __str__(self) -> str:
        of = ", ".join(map(str, launch_config.written(self.shape_class)))
        changed = ", ".join(f"{name} {value}" for name, value in self.options.items() if value != self.default[name])
        time = f"{self.before:.4f} ms -> {self.after:.4f} ms with {changed}" if changed else f"{self.before:.4f} ms as it is"
        return f"{self.kernel} ({of}): {time}; {self.tried} tried, {self.skipped} of them can't be taken"


def search_step(step: TrainingStep, known: Collection[Key]) -> Iterator[Found]:
    """Search for all kernels of a step that have options, except those that are `known`."""
    step.compile_ahead()
    yield from search(parts_of(step), known)


def as_entries(found: Sequence[Found]) -> tuned_configs.Kernels:
    """Return the results worth keeping, in the format of the file."""
    kernels: tuned_configs.Kernels = {}
    for one in found:
        if one.options != one.default:
            chosen = {option: value for option, value in one.options.items() if value}  # 0 leaves "maxnreg" to the compiler
            entry = {"key": launch_config.written(one.shape_class), "config": chosen}
            kernels.setdefault(one.kernel, []).append(entry)
    return dict(sorted(kernels.items()))


class Part:
    """One operation of a training step: `part()` runs it alone, forward and backward, on the inputs that it had in the step.

    Args:
        run: returns one tensor.
        given: its arguments; tensors among them that require a gradient get one.
        parameters: other tensors that get one.
    """

    def __init__(
        self, run: Callable[..., Tensor], given: tuple[Any, ...], precision: torch.dtype, parameters: Sequence[Tensor] = ()
    ) -> None:
        self.run, self.precision, self.parameters = run, precision, parameters
        self.given = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), given)
        self.tensors = [leaf for leaf in tree_leaves(self.given) if isinstance(leaf, Tensor)]
        self.device = self.tensors[0].device
        self.grad = torch.empty(0)

    def __call__(self) -> list[Tensor]:
        """Return the output and all gradients."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            y = self.run(*self.given)
        if not y.requires_grad:
            return [y]
        if self.grad.shape != y.shape:
            self.grad = torch.randn_like(y)
        asked = [tensor for tensor in self.tensors if tensor.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, (*asked, *self.parameters), self.grad)]

    def milliseconds(self, kernel: str) -> float:
        """Return the time of all launches of a kernel in a run, the median of several runs."""
        sums = []
        with launch_config.timed(kernel) as events:
            for _ in range(_REPEATS):
                events.clear()
                queue_ahead(self.device, _AHEAD)
                self()
                torch.cuda.synchronize(self.device)
                sums.append(sum(before.elapsed_time(after) for before, after in events))
        return statistics.median(sums)

    def agrees(self, results: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
        """Return whether these results are the same up to rounding."""
        most = _ROUNDING[self.precision]
        pairs = zip(results, wanted, strict=True)
        return all(bool((one - other).float().norm() <= most * other.float().norm()) for one, other in pairs)


def parts_of(step: TrainingStep) -> list[Part]:
    """Return the parts that a training step runs, one of each kind."""
    met: dict[Hashable, Part] = {}

    def note(run: Callable[..., Tensor], given: tuple[Any, ...], kind: Hashable, parameters: Sequence[Tensor] = ()) -> None:
        shapes = [_layout(leaf) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(given)]
        key = kind, *shapes, *(parameter.shape for parameter in parameters)
        if key not in met:
            met[key] = Part(run, given, step.precision, parameters)

    def noted(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*given: Any) -> Tensor:
            note(operator, given, operator)
            return operator(*given)

        return run

    with contextlib.ExitStack() as after:
        for module in step.model.modules():
            if isinstance(module, SS2D | GatedWindowAttention):
                hook = module.register_forward_pre_hook(
                    lambda module, given: note(module, given, type(module).__name__, [*module.parameters()])
                )
                after.callback(hook.remove)
            elif isinstance(module, FusedOpsModule) and module.pointwise is not None:
                after.enter_context(replaced(module, "pointwise", FusedOps(*map(noted, module.pointwise))))
        if choose_loss(step.config.optim.loss_backend, step.device)[0]:
            from vfi.ops.loss import laplacian_kernels

            after.enter_context(replaced(laplacian_kernels, "pyramid_sizes", noted(laplacian_kernels.pyramid_sizes)))
        step(step.make_frames())
    return list(met.values())


def _layout(t: Tensor) -> Hashable:
    return t.shape, t.stride(), t.dtype, t.requires_grad


class _Chooser:
    """Replacement for `launch_config.configuration`: options that were found or are tried, else the default in the code."""

    def __init__(self) -> None:
        self.asked: dict[Key, launch_config.Options] = {}
        """Requested kernels and shape classes, with the defaults in the code."""
        self.taken: dict[Key, launch_config.Options] = {}

    def __call__(
        self, kernel: str, shape_class: launch_config.ShapeClass, default: launch_config.Options, device: torch.device
    ) -> launch_config.Options:
        self.asked[kernel, shape_class] = default
        return self.taken.get((kernel, shape_class), default)


def search(parts: Sequence[Part], known: Collection[Key]) -> Iterator[Found]:
    """Search for the kernels of these parts. A kernel is measured in all parts that launch it for its shape class."""
    chooser = _Chooser()
    defaults, users = dict[Key, launch_config.Options](), dict[Key, list[Part]]()
    with replaced(launch_config, "configuration", chooser):
        for part in parts:
            chooser.asked = {}
            part()
            asked = {key: default for key, default in chooser.asked.items() if key not in known}
            _compile_ahead(part, chooser, {key: default for key, default in asked.items() if key not in defaults})
            defaults |= asked
            for key in asked:
                users.setdefault(key, []).append(part)
        for key, default in defaults.items():
            found = _search_one(key, default, users[key], chooser)
            chooser.taken[key] = found.options
            yield found


def _search_one(key: Key, default: launch_config.Options, users: Sequence[Part], chooser: _Chooser) -> Found:
    kernel, _ = key
    wanted = [part() for part in users]

    def measure(options: launch_config.Options) -> float | None:
        chooser.taken[key] = options
        try:
            if not all(part.agrees(part(), results) for part, results in zip(users, wanted, strict=True)):
                return None
            return sum(part.milliseconds(kernel) for part in users)
        except Exception as error:
            if not launch_config.can_not_run(error):
                raise
            return None

    best, tried, skipped = fastest(default, lambda option: candidates(kernel, option, default[option]), measure)
    before, after = measure(default), measure(best)  # again, one after the other: the minimum of many is partly luck
    if before is None or after is None:
        raise RuntimeError(f"{kernel} does not give the same twice, with {default} or with {best}")
    if after >= min(_GAIN * before, before - _SHORTEST_GAIN):
        best, after = default, before
    return Found(*key, default, best, before, after, tried, skipped)


def fastest(
    default: launch_config.Options,
    values: Callable[[str], Sequence[int]],
    measure: Callable[[launch_config.Options], float | None],
) -> tuple[launch_config.Options, int, int]:
    """Return the fastest options, changing one after another; how many were tried, and how many could not be measured."""
    best, least, tried, skipped = default, measure(default), 0, 0
    for option in default:
        before = best
        for value in values(option):
            if value == before[option]:
                continue
            time = measure(before | {option: value})
            tried += 1
            if time is None:
                skipped += 1
            elif least is None or time < least:
                best, least = before | {option: value}, time
    return best, tried, skipped


def candidates(kernel: str, option: str, default: int) -> list[int]:
    """Return the values of an option that are tried."""
    values = _VALUES.get(option, sorted({max(1, int(default * factor)) for factor in _FACTORS}))
    return [value for value in values if (kernel, option, value) not in _NEVER]


def _compile_ahead(part: Part, chooser: _Chooser, defaults: dict[Key, launch_config.Options]) -> None:
    """Compile in parallel all candidates that change a single option."""
    if part.device.type != "cuda":
        return
    with compiling_ahead(part.device, failing=True):
        for key, default in defaults.items():
            for option, value in default.items():
                for other in candidates(key[0], option, value):
                    chooser.taken[key] = default | {option: other}
                    part()
            del chooser.taken[key]
