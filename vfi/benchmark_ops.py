"""Compare the speed and memory of each operator with fused Triton kernels to PyTorch's implementation of it.

    vfi bench-ops                                   on a GPU: all of them, at the sizes of training and 4K
    vfi bench-ops --filter warp --out warp.json

Times are medians of consecutive calls, with an empty cache and without waiting for the CPU; memory is what a call allocates in
addition to its inputs. The roofline bound (column "floor"): inputs read and outputs written once, in the backward pass once
more with gradients and the inputs again, at the rate of a copy that is measured in the same run; arithmetic is not included.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.cli import parse_flags
from vfi.config import presets
from vfi.config.configs import ModelConfig
from vfi.config.renamed_flags import with_new_names
from vfi.errors import JobError, clear_errors
from vfi.evaluation.results import check_output
from vfi.io.dataclass_json import write_text
from vfi.io.text_table import aligned
from vfi.model.ss2d import ss2d
from vfi.model.window_attention import GatedWindowAttention
from vfi.ops.loss.laplacian import laplacian_loss
from vfi.ops.ssm.ssd import kernel_obstacle
from vfi.ops.triton.availability import why_unavailable
from vfi.ops.warp.warp import backward_warp
from vfi.profiling import timing
from vfi.runtime.numerics import set_numerics
from vfi.tracking.environment import environment

SCHEMA, VERSION = "vfi-operators", 1
_HALF = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi bench-ops`; each field is a flag."""

    filter: str = ""
    """Substring of the names of the operators to be measured; default: all."""
    out: Path | None = None
    """Also write all results to this .json file."""


class Variants(NamedTuple):
    """Both implementations of an operator, for the same inputs; modules have the same weights."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    weights: tuple[nn.Parameter, ...] = ()
    """Weights of `ours`, followed by those of `plain`."""


class Operator(NamedTuple):
    """Operator to be measured."""

    name: str
    inputs: tuple[Tensor, ...]
    """Tensors without memory ("meta"), channels-last if they are maps [B, C, H, W]."""
    build: Callable[[torch.device], Variants]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a call: milliseconds, and bytes in addition to its inputs."""

    forward_ms: float
    both_ms: float
    """Time of the forward and backward pass."""
    nbytes: int
    """Bytes of both passes."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of one operator."""

    name: str
    size: str
    """Shape of its first input."""
    floor_ms: float
    both_floor_ms: float
    ours: Cost
    plain: Cost


@clear_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: measure, print the table, and write the results."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_flags(Options, "vfi bench-ops", __doc__, with_new_names(arguments, {"only": "filter"}))
    if options.out:
        check_output(options.out, "operators.json")
    chosen = [operator for operator in all_operators() if options.filter in operator.name]
    if not chosen:
        names = ", ".join(dict.fromkeys(operator.name for operator in all_operators()))
        raise JobError(f"--filter {options.filter!r} is in none of the names: {names}")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if obstacle := why_unavailable(device):
        raise JobError(f"there is nothing to be measured: {obstacle}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    set_numerics()
    gbs = timing.measure_rates(device, _HALF).gbs
    rows = []
    told = environment(device) | {"command": shlex.join(["vfi", "bench-ops", *arguments]), "gbs": gbs}
    for operator in chosen:
        rows.append(measure(operator, device, gbs))
        ours, plain = rows[-1].ours.both_ms, rows[-1].plain.both_ms
        print(f"{operator.name}: {ours:.3f} ms, plain {plain:.3f} ms", file=sys.stderr, flush=True)
        if options.out:  # after each operator, so that an interrupted run keeps its results
            content = {"schema": SCHEMA, "version": VERSION, "environment": told, "rows": list(map(dataclasses.asdict, rows))}
            write_text(options.out, json.dumps(content, indent=1) + "\n")
    print(table(rows, told))


def all_operators() -> list[Operator]:
    """Return the operators at the sizes of base: 32 pairs of 256x256 in training, and a pair of 2176x4096."""
    return [
        scan(64, 32, 32, 256),
        scan(64, 16, 16, 512),
        attention(64, 32, 32, 256),
        attention(2, 272, 512, 256),
        activation(64, 32, 256, 256),
        activation(2, 32, 2176, 4096, residual=True),
        warp(64, 32, 256, 256),
        warp(2, 32, 2176, 4096),
        layer_norm(64, 32, 32, 256),
        side_by_side(32, 32, 256, 256),
        side_by_side(1, 32, 2176, 4096),
        loss(4, 32, 256, 256),
    ]


def scan(frames: int, H: int, W: int, C: int) -> Operator:
    """Return an SS2D with its projections."""

    def build(device: torch.device) -> Variants:
        backend = "reference" if kernel_obstacle(device) else "mamba_ssm"
        ours, plain = (ss2d(C, _config(ssd_backend=name), device) for name in ("fused", backend))
        return _modules(ours, plain, device)

    return Operator("SS2D", (_made(frames, H, W, C),), build)


def attention(frames: int, H: int, W: int, C: int) -> Operator:
    """Return attention in shifted windows of 8, with its projections."""

    def build(device: torch.device) -> Variants:
        ours, plain = (GatedWindowAttention(C, _config(attention_backend=name), True, device) for name in ("fused", "sdpa"))
        return _modules(ours, plain, device)

    return Operator("window attention", (_made(frames, H, W, C),), build)


def activation(frames: int, C: int, H: int, W: int, residual: bool = False) -> Operator:
    """Return bias, skip connection and PReLU."""

    def build(device: torch.device) -> Variants:
        from vfi.ops.pointwise.bias_prelu_kernels import bias_prelu

        def plain(x: Tensor, bias: Tensor, slope: Tensor, *rest: Tensor) -> Tensor:
            x = x + bias.view(-1, 1, 1).to(x.dtype)
            return F.prelu(sum(rest, x), slope.to(x.dtype))

        return Variants(bias_prelu, plain)

    maps = [_map(frames, C, H, W) for _ in range(1 + residual)]
    vectors = [_made(C, dtype=torch.float32) for _ in range(2)]
    return Operator("bias, skip, PReLU" if residual else "bias, PReLU", (maps[0], *vectors, *maps[1:]), build)


def warp(frames: int, C: int, H: int, W: int) -> Operator:
    """Return a warp of features by a flow of about one pixel, different for each pixel."""

    def build(device: torch.device) -> Variants:
        from vfi.ops.warp.warp_kernels import backward_warp_fused

        return Variants(backward_warp_fused, backward_warp)

    return Operator("warp", (_map(frames, C, H, W), _map(frames, 2, H, W, dtype=torch.float32)), build)


def layer_norm(frames: int, H: int, W: int, C: int) -> Operator:
    """Return a layer norm over channels, as under autocast: to fp32, and back."""

    def build(device: torch.device) -> Variants:
        from vfi.ops.pointwise import layer_norm_kernels

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, (C,), weight, bias).to(x.dtype)

        return Variants(lambda x, weight, bias: layer_norm_kernels.layer_norm(x, weight, bias, 1e-5), plain)

    return Operator("layer norm", (_made(frames, H, W, C), *(_made(C, dtype=torch.float32) for _ in range(2))), build)


def side_by_side(pairs: int, C: int, H: int, W: int) -> Operator:
    """Return RefineNet's finest concatenation: pixel-shuffled maps from below, features of both frames, the frames."""

    def build(device: torch.device) -> Variants:
        from vfi.ops.pointwise.concat_kernels import concat_channels

        def plain(below: Tensor, *parts: Tensor) -> Tensor:
            stacked = torch.cat((F.pixel_shuffle(below, 2), *(part.to(below.dtype) for part in parts)), 1)
            return stacked.contiguous(memory_format=torch.channels_last)

        return Variants(lambda below, *parts: concat_channels(parts, below.dtype, below), plain)

    below, features = _map(pairs, 4 * C, H // 2, W // 2), (_map(pairs, C, H, W) for _ in range(2))
    return Operator("side by side", (below, *features, _map(pairs, 6, H, W, dtype=torch.float32)), build)


def loss(predictions: int, B: int, H: int, W: int) -> Operator:
    """Return the training loss of all predictions at once."""

    def build(device: torch.device) -> Variants:
        fused, plain = (functools.partial(laplacian_loss, backend=name) for name in ("fused", "torch"))
        return Variants(fused, plain)

    return Operator("loss", (_made(predictions, B, 3, H, W, dtype=torch.float32), _map(B, 3, H, W, dtype=torch.float32)), build)


def measure(operator: Operator, device: torch.device, gbs: float) -> Row:
    """Measure both implementations, one after the other."""
    inputs = [_filled(given, device) for given in operator.inputs]
    ours, plain, weights = operator.build(device)
    costs = []
    for function in (ours, plain):
        with torch.no_grad():
            forward = timing.milliseconds(functools.partial(_run, function, inputs, ()), device)
        leaves = [*(given.requires_grad_() for given in inputs), *weights]
        both = functools.partial(_run, function, inputs, leaves)
        costs.append(Cost(forward, timing.milliseconds(both, device), peak_bytes(both, device)))
    read, written = sum(given.nbytes for given in inputs), _run(ours, inputs, ()).nbytes
    floor, both_floor = (1e-6 * nbytes / gbs for nbytes in (read + written, 3 * read + 2 * written))
    size = "×".join(map(str, operator.inputs[0].shape))
    return Row(operator.name, size, floor, both_floor, *costs)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a call allocates in addition to the present ones."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def table(rows: Sequence[Row], told: dict[str, Any]) -> str:
    """Format the results as a readable table."""
    versions = ", ".join(f"{name} {told['packages'][name]}" for name in ("torch", "triton") if name in told["packages"])
    head = f"{told['device']}, bf16 autocast, {versions}; floor: {told['gbs']:,.0f} GB/s; ms, and MiB of both passes"
    lines = [["", "", "floor", "forward", "plain", "", "floor", "both", "plain", "", "MiB", "plain"]]
    for row in rows:
        cells = [row.name, row.size]
        for floor, ours, plain in (
            (row.floor_ms, row.ours.forward_ms, row.plain.forward_ms),
            (row.both_floor_ms, row.ours.both_ms, row.plain.both_ms),
        ):
            cells += [f"{floor:.3f}", f"{ours:.3f}", f"{plain:.3f}", f"{plain / ours:.1f}x"]
        lines.append([*cells, *(f"{cost.nbytes / 2**20:,.0f}" for cost in (row.ours, row.plain))])
    return f"{head}\n\n{aligned(lines)}"


def _run(function: Callable[..., Tensor], inputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """Call `function` under autocast; with `leaves`, also run the backward pass to those that it depends on."""
    with torch.autocast(inputs[0].device.type, _HALF):
        output = function(*inputs)
    if leaves:
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
    return output


def _config(**backends: Any) -> ModelConfig:
    return presets.override(presets.base(), **backends).model


def _modules(ours: nn.Module, plain: nn.Module, device: torch.device) -> Variants:
    ours, plain = ours.to(device), plain.to(device)
    plain.load_state_dict(ours.state_dict())
    return Variants(ours, plain, (*ours.parameters(), *plain.parameters()))


def _made(*size: int, dtype: torch.dtype = _HALF) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _map(*size: int, dtype: torch.dtype = _HALF) -> Tensor:
    return _made(*size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _filled(given: Tensor, device: torch.device) -> Tensor:
    """Return random numbers with the shape and memory order of `given`."""
    return torch.empty_like(given, device=device).normal_()


if __name__ == "__main__":
    main()
