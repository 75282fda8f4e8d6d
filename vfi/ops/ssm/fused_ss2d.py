"""Fused core of an SS2D in Triton: from projected pixels to the gated, normalised sum of the four scan directions.

    sum over directions of RMSNorm(unscan(ssd(silu(conv(scan(x, B, C))), scan(dt))) * silu(z)) * weight

The convolution reads the pixels in each direction by index, and the norm writes the outputs back to the pixels: there is no
separate reordering (vfi/ops/ssm/ss2d_common.py). Only the projected pixels are kept for the backward pass; everything else is
recomputed.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfi.ops.triton import launch_config
from vfi.ops.triton.availability import may_be_tried, multiprocessors, why_unavailable

HEAD_DIMS, STATES = (16, 32, 64), (16, 32, 64, 128)
"""Widths of a head and of a state for which the kernels have tiles."""
_LEAN_BYTES = 2**30  # of one output per direction in memory at a time, where none is kept
_STATE_BYTES = 2**27  # of states and their gradients in memory at a time
_FULL = 8  # programs for each multiprocessor that keep a GPU busy; with fewer, sequences are cut into segments
_SHORTEST = 4  # minimum number of chunks in a segment


# Default blocks and warps where nothing is tuned for the GPU (vfi/ops/triton/launch_config.py): the fastest measured on an
# H100.
_LAUNCH: dict[str, dict[str, int]] = {
    "convolve": {"BLOCK": 32, "WIDTH": 128, "num_warps": 4},
    "time_steps": {"num_warps": 4},
    "carry_states": {"num_warps": 4},
    "step_gradients": {"num_warps": 4},
    "convolution_gradients": {"BLOCK": 32, "WIDTH": 64, "num_warps": 4},
    "time_step_gradients": {"BLOCK": 64, "num_warps": 4},
    "gated_norm": {"BLOCK": 2, "num_warps": 4},
    "gated_norm_gradients": {"BLOCKS": 16, "num_warps": 1},
}
# (warps, stages) of the kernels with matrix products: of half-precision operands, and of fp32.
_SCAN_LAUNCH: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "scan": ((4, 3), (4, 2)),
    "scan_states": ((4, 2), (2, 3)),
    "scan_state_gradients": ((4, 2), (2, 3)),
    "scan_key_gradients": ((4, 3), (4, 3)),
    "scan_gradients": ((4, 3), (4, 1)),
}
# for these, `vfi tune-kernels` also tries "maxnreg", the maximum registers of a thread, so that more programs run at once; 0
# leaves it to the compiler
_FEWER_REGISTERS = ("scan", "scan_key_gradients")
_TILE_BYTES = 8192  # of a state's operands; wider states get shorter chunks and fewer stages, to fit into shared memory
_ROW_BYTES = 256  # of a key's operands; wider keys likewise, where shared memory is small
# compute capabilities with 64 (7.5), 96 (7.0) or 99 KB of shared memory for a program; others have at least 163 KB (CUDA C++
# Programming Guide, compute capabilities)
_SMALL = ((7, 0), (7, 5), (8, 6), (8, 9), (12, 0), (12, 1))


class Shape(NamedTuple):
    """Settings that the shapes of the tensors do not determine."""

    heads: int
    head_dim: int
    state: int
    together: int
    """Frames that form a sequence: 2 interleaved, or 1 alone."""
    precision: str
    """Matrix products of the scan: fp32 (three products of TF32 each), tf32, or input (operands in the dtype of the pixels).
    auto is input, except tf32 for fp16: it rounds alike and has the range of fp32.
    """

    @property
    def inner(self) -> int:
        """Channels of x, z and the output."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of x, B and C, which pass through the convolution."""
        return self.inner + 2 * self.state


class Parameters(NamedTuple):
    """Parameters of an SS2D, as in `mamba_ssm.Mamba2`; A is negative."""

    conv_weight: Tensor
    """[channels, 4]."""
    conv_bias: Tensor
    """[channels]."""
    A: Tensor
    """[heads]."""
    D: Tensor
    """[heads]."""
    dt_bias: Tensor
    """[heads]."""
    norm_weight: Tensor
    """[inner]."""


def fused_ss2d(projected: Tensor, parameters: Parameters, shape: Shape) -> Tensor:
    """Compute `[2B, H, W, inner]` from projected pixels `[2B, H, W, z | x, B, C | dt]`, frame 0 of all pairs first, same dtype.

    Any H and W; fp32, bf16 or fp16. Sums, decays and states are fp32.
    """
    if projected.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"fused_ss2d takes fp32, bf16 or fp16 and was given {projected.dtype}: use --ssd_backend reference")
    check_pixels("fused_ss2d", projected, shape)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (projected, *parameters)):
        result: Tensor = _FusedSS2D.apply(projected, *parameters, shape)
        return result
    return _Run(projected, Parameters(*parameters), shape).without_gradients()


def check_pixels(name: str, projected: Tensor, shape: Shape) -> None:
    """Raise ValueError, which calls the operator `name`, where projected pixels don't have the channels of `shape`."""
    width = shape.inner + shape.channels + shape.heads
    if projected.dim() != 4 or projected.shape[0] % 2 or projected.shape[-1] != width:
        raise ValueError(f"{name} takes pixels [2B, H, W, {width}] and was given {list(projected.shape)}")


def ss2d_obstacle(device: torch.device, head_dim: int, state: int, groups: int) -> str | None:
    """Return why the fused kernels can't run; None if they can."""
    obstacle = why_unavailable(device)
    if not may_be_tried(obstacle):
        return obstacle
    if groups != 1:
        return "the fused kernels have one B and C for all heads (--ssd_groups shared)"
    if head_dim not in HEAD_DIMS or state not in STATES:
        allowed = [", ".join(map(str, sizes)) for sizes in (HEAD_DIMS, STATES)]
        return f"the fused kernels have --head_dim {allowed[0]} and --d_state {allowed[1]}, not {head_dim} and {state}"
    return obstacle


class _FusedSS2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, *arguments: Any) -> Tensor:
        *parameters, shape = arguments
        ctx.save_for_backward(projected, *parameters)
        ctx.shape = shape
        run = _Run(projected, Parameters(*parameters), shape)
        return run.norm(run.scan(run.tokens(range(4), activated=True)), range(4), None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        projected, *parameters = ctx.saved_tensors
        gradients = _Run(projected, Parameters(*parameters), ctx.shape).backward(d_out)
        return (*(g.to(t.dtype) for g, t in zip(gradients, (projected, *parameters), strict=True)), None)


class Tokens(NamedTuple):
    """Inputs of the scan, in the order of its n sequences."""

    x: Tensor
    """[n, L, inner], or together with B and C [n, L, channels], before their SiLU."""
    keys: Tensor
    """[n, L, 2 * state]: B | C."""
    steps: Tensor
    """[n, heads, chunks * chunk], like `decays`: dt."""
    decays: Tensor
    """Base-2 logarithm of the decay since the start of the chunk."""


class _Run:
    """One call: the arguments that all kernels share, and the launches in their order."""

    def __init__(self, projected: Tensor, parameters: Parameters, shape: Shape) -> None:
        from vfi.ops.ssm import ss2d_bwd_kernels, ss2d_fwd_kernels

        self.kernels = vars(ss2d_fwd_kernels) | vars(ss2d_bwd_kernels)
        frames, self.H, self.W, _ = projected.shape
        stride = projected.stride(2)
        if projected.stride() != (self.H * self.W * stride, self.W * stride, stride, 1):
            projected = projected.contiguous()
        self.projected, self.stride, self.shape = projected, projected.stride(2), shape
        self.parameters = Parameters(*(t.detach().contiguous() for t in parameters))
        self.z, self.map, self.raw_steps = projected.split((shape.inner, shape.channels, shape.heads), dim=-1)
        self.frames, self.pixels = frames, self.H * self.W
        self.sequences, self.L = frames // shape.together, shape.together * self.pixels  # of one direction
        half = projected.dtype == torch.bfloat16 or (projected.dtype == torch.float16 and shape.precision == "input")
        self.dot = projected.dtype if half and shape.precision in ("auto", "input") else torch.float32
        tile, self.small = shape.head_dim * shape.state * self.dot.itemsize, _is_small(projected.device)
        self.wide = tile > _TILE_BYTES or (self.small and shape.state * self.dot.itemsize > _ROW_BYTES)
        shortest = 16 if self.small and tile > 2 * _TILE_BYTES else 32
        self.chunk = shortest if self.wide else 64  # tokens whose products are computed at once
        self.chunks = math.ceil(self.L / self.chunk)
        as_torch = shape.precision != "tf32" and projected.dtype == torch.float32
        exact = shape.precision == "fp32" or (as_torch and not torch.backends.cuda.matmul.allow_tf32)
        precision = "tf32x3" if exact else "tf32"
        self.shape_classes = _shape_classes(projected.dtype, self.dot, precision, self.chunk, shape)
        self.scan_constants = {
            "P": shape.head_dim, "S": shape.state, "Q": self.chunk, "DOT": _triton_type(self.dot), "PRECISION": precision,
        }  # fmt: skip

    def new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate an uninitialised output of a kernel."""
        return torch.empty(size, dtype=dtype, device=self.projected.device)

    def options(self, name: str) -> launch_config.Options:
        """Return the blocks, warps and stages of a kernel."""
        default = _LAUNCH.get(name)
        if default is None:
            warps, stages = _SCAN_LAUNCH[name][self.dot == torch.float32]
            stages = min(stages, 2) if self.small and self.dot == torch.float32 else stages
            # not 1 for the scan: Triton 3.6 compiles that into out-of-bounds reads
            default = {"num_warps": warps, "num_stages": min(stages, 2 if name == "scan" else 1) if self.wide else stages}
            default |= {"maxnreg": 0} if name in _FEWER_REGISTERS else {}
        return launch_config.configuration(name, self.shape_classes[name], default, self.projected.device)

    def launch(self, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel."""
        asked = {option: value for option, value in self.options(name).items() if (option, value) != ("maxnreg", 0)}
        self.kernels[name][grid](*arguments, **constants, **asked)

    @property
    def grid_of_pixels(self) -> tuple[int, int, int, int]:
        """Return the sizes that map a pixel to its position in a sequence, and back."""
        return self.L, self.sequences, self.H, self.W

    def without_gradients(self) -> Tensor:
        """Compute the result alone, with fewer directions at a time if they would take too much memory."""
        one = self.frames * self.pixels * (self.shape.inner + self.shape.channels) * self.projected.element_size()
        at_once = next((orders for orders in (4, 2) if orders * one <= _LEAN_BYTES), 1)
        out = None
        for first in range(0, 4, at_once):
            orders = range(first, first + at_once)
            out = self.norm(self.scan(self.tokens(orders, activated=True)), orders, out)
        assert out is not None
        return out

    def tokens(self, orders: range, activated: bool) -> Tokens:
        """Return the scan's inputs for these directions; without `activated`, x includes B and C, all before their SiLU."""
        shape, p, n = self.shape, self.parameters, len(orders) * self.sequences
        x = self.new(n, self.L, shape.inner if activated else shape.channels, dtype=self.projected.dtype)
        keys = self.new(n, self.L, 2 * shape.state, dtype=self.dot)
        steps, decays = (self.new(n, shape.heads, self.chunks * self.chunk) for _ in range(2))
        where = (self.L, orders.start, self.sequences, self.H, self.W)
        block, width = (self.options("convolve")[size] for size in ("BLOCK", "WIDTH"))
        self.launch(
            "convolve", (math.ceil(self.L / block), n, math.ceil(shape.channels / width)),
            self.map, self.stride, p.conv_weight, p.conv_bias, x, keys, *where, shape.inner, shape.channels,
            TOGETHER=shape.together, ACTIVATED=activated,
        )  # fmt: skip
        self.launch(
            "time_steps", (self.chunks, n), self.raw_steps, self.stride, p.dt_bias, p.A, steps, decays, *where,
            shape.heads, Q=self.chunk, HEADS=_power_of_two(shape.heads), TOGETHER=shape.together,
        )  # fmt: skip
        return Tokens(x, keys, steps, decays)

    def segments(self, n: int) -> tuple[int, int]:
        """Return the number of segments into which sequences are cut, and the number of chunks in each."""
        wanted = math.ceil(_FULL * multiprocessors(self.projected.device) / (n * self.shape.heads))
        each = max(math.ceil(self.chunks / wanted), min(_SHORTEST, self.chunks))
        return math.ceil(self.chunks / each), each

    def scan(self, tokens: Tokens) -> Tensor:
        """Return one output per direction, [n, L, inner]."""
        shape, n = self.shape, len(tokens.keys)
        x, keys, steps, decays = tokens
        activated = x.shape[2] == shape.inner
        segments, each = self.segments(n)
        before = keys  # not read if there is only one segment
        if segments > 1:
            before = self.new(n, segments, shape.heads, shape.state, shape.head_dim)
            totals = self.new(n, segments, shape.heads)
            self.launch(
                "scan_states", (shape.heads, n, segments), x, keys, steps, decays, before, totals, self.L, each, shape.heads,
                **self.scan_constants, ACTIVATED=activated, EVERY=False,
            )  # fmt: skip
            size = shape.state * shape.head_dim
            self.launch("carry_states", (shape.heads, n), before, totals, segments, shape.heads, SIZE=size)
        y = self.new(n, self.L, shape.inner, dtype=self.projected.dtype)
        self.launch(
            "scan", (shape.heads, n, segments), x, keys, steps, decays, self.parameters.D, before, y, self.L, each,
            shape.heads, **self.scan_constants, ACTIVATED=activated, CARRIED=segments > 1,
        )  # fmt: skip
        return y

    def norm(self, y: Tensor, orders: range, out: Tensor | None) -> Tensor:
        """Apply gate and norm to y, sum over its directions, and add the sum to `out`."""
        inner, add = self.shape.inner, out is not None
        if out is None:
            out = self.new(self.frames, self.H, self.W, inner, dtype=self.projected.dtype)
        self.launch(
            "gated_norm", (math.ceil(self.pixels / self.options("gated_norm")["BLOCK"]), self.frames),
            y, self.z, self.stride, self.parameters.norm_weight, out, self.L, orders.start, self.sequences, self.H, self.W,
            inner, ADD=add, ORDERS=len(orders), WIDTH=_power_of_two(inner), TOGETHER=self.shape.together,
        )  # fmt: skip
        return out

    def backward(self, d_out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the pixels and of each parameter, in their order."""
        shape, p = self.shape, self.parameters
        d_projected = self.new(*self.projected.shape, dtype=self.projected.dtype)
        dz, d_map, d_raw = d_projected.split((shape.inner, shape.channels, shape.heads), dim=-1)
        d_stride = d_projected.stride(2)

        n = 4 * self.sequences
        tokens = self.tokens(range(4), activated=False)
        dy = self.scan(tokens)  # initially the outputs
        d_norm = self.norm_gradients(dy, d_out.contiguous(), dz, d_stride)
        d_steps = self.new(*tokens.steps.shape)
        d_heads = self.new(n, self.chunks, shape.heads, 2)
        for part in self.sequences_with_states(n):
            self.scan_gradients(Tokens(*(t[part] for t in tokens)), dy[part], d_steps[part], d_heads[part])
        d_convolved = tokens.x
        del dy, tokens

        block, width = (self.options("convolution_gradients")[size] for size in ("BLOCK", "WIDTH"))
        blocks = math.ceil(self.pixels / block)
        d_weights = self.new(blocks * self.frames, 5, shape.channels)
        self.launch(
            "convolution_gradients", (blocks, self.frames, math.ceil(shape.channels / width)),
            self.map, self.stride, p.conv_weight, d_convolved, d_map, d_stride, d_weights, *self.grid_of_pixels, shape.channels,
            TOGETHER=shape.together,
        )  # fmt: skip
        blocks = math.ceil(self.pixels / self.options("time_step_gradients")["BLOCK"])
        d_bias = self.new(blocks * self.frames, shape.heads)
        self.launch(
            "time_step_gradients", (blocks, self.frames),
            self.raw_steps, self.stride, p.dt_bias, d_steps, d_raw, d_stride, d_bias, self.L, self.chunks * self.chunk,
            *self.grid_of_pixels[1:], shape.heads, HEADS=_power_of_two(shape.heads), TOGETHER=shape.together,
        )  # fmt: skip
        d_conv = d_weights.sum(0)
        d_A, d_D = d_heads.sum((0, 1)).unbind(-1)
        return d_projected, d_conv[:4].t(), d_conv[4], d_A, d_D, d_bias.sum(0), d_norm.sum(0)

    def norm_gradients(self, y: Tensor, d_out: Tensor, dz: Tensor, d_stride: int) -> Tensor:
        """Return the gradient of the weight, by program; overwrite the outputs y with their gradients, and fill dz."""
        inner = self.shape.inner
        blocks = math.ceil(self.pixels / self.options("gated_norm_gradients")["BLOCKS"])
        d_norm = self.new(blocks * self.frames, inner)
        self.launch(
            "gated_norm_gradients", (blocks, self.frames), y, self.z, self.stride, self.parameters.norm_weight, d_out, dz,
            d_stride, d_norm, *self.grid_of_pixels, inner, WIDTH=_power_of_two(inner), TOGETHER=self.shape.together,
        )  # fmt: skip
        return d_norm

    def sequences_with_states(self, n: int) -> list[slice]:
        """Split the sequences into parts, so that the states and their gradients of only one part are in memory at a time."""
        one = 2 * self.chunks * self.shape.inner * self.shape.state * self.dot.itemsize
        at_once = max(1, min(n, _STATE_BYTES // one))
        return [slice(first, first + at_once) for first in range(0, n, at_once)]

    def scan_gradients(self, tokens: Tokens, dy: Tensor, d_steps: Tensor, d_heads: Tensor) -> None:
        """Fill d_steps and d_heads; overwrite tokens.x with its gradient."""
        p, shape, n = self.parameters, self.shape, len(dy)
        x, keys, steps, decays = tokens
        states = self.new(n, self.chunks, shape.heads, shape.state, shape.head_dim, dtype=self.dot)
        state_gradients, d_keys = self.new(*states.shape, dtype=self.dot), self.new(*keys.shape, dtype=self.dot)
        sums = self.new(5, *steps.shape)
        size = (self.L, shape.heads)
        self.launch(
            "scan_states", (shape.heads, n, 1), x, keys, steps, decays, states, states, self.L, self.chunks, shape.heads,
            **self.scan_constants, ACTIVATED=False, EVERY=True,
        )  # fmt: skip
        self.launch("scan_state_gradients", (shape.heads, n), keys, decays, dy, state_gradients, *size, **self.scan_constants)
        self.launch(
            "scan_key_gradients", (self.chunks, n), x, keys, steps, decays, states, state_gradients, dy, d_keys, d_heads,
            *size, **self.scan_constants,
        )  # fmt: skip
        self.launch(
            "scan_gradients", (self.chunks, n), x, keys, steps, decays, p.D, states, state_gradients, dy, d_keys, sums, *size,
            **self.scan_constants,
        )  # fmt: skip
        self.launch(
            "step_gradients", (self.chunks, n), steps, decays, p.A, sums, d_heads, d_steps, shape.heads, Q=self.chunk,
            HEADS=_power_of_two(shape.heads),
        )  # fmt: skip


@functools.cache
def _shape_classes(
    pixels: torch.dtype, dot: torch.dtype, precision: str, chunk: int, shape: Shape
) -> dict[str, launch_config.ShapeClass]:
    """Return what each kernel's fastest options depend on: what it is compiled for, except variants that hardly differ."""
    heads, width = _power_of_two(shape.heads), _power_of_two(shape.inner)
    return {
        "convolve": (pixels, dot, shape.together),
        "time_steps": (pixels, chunk, heads, shape.together),
        "carry_states": (shape.state * shape.head_dim,),
        "step_gradients": (chunk, heads),
        "convolution_gradients": (pixels, shape.together),
        "time_step_gradients": (pixels, heads, shape.together),
        "gated_norm": (pixels, width, shape.together),
        "gated_norm_gradients": (pixels, width, shape.together),
        **dict.fromkeys(_SCAN_LAUNCH, (pixels, dot, shape.head_dim, shape.state, chunk, precision)),
    }


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _is_small(device: torch.device) -> bool:
    """Return whether the GPU has little shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _SMALL


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
