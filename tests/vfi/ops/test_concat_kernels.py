"""Fused concatenation against torch.cat, bit for bit: interpreted on the CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
# not imported here: the interpreter's process imports this module, too
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Part(NamedTuple):
    """A map: how many channels, and how it lies in memory."""

    channels: int
    kind: str = "channels_last"
    dtype: torch.dtype = SINGLE
    needs_grad: bool = True


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def scalars(t: Tensor) -> Tensor:
    return t[:, :, :1, :1].contiguous().expand_as(t)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "contiguous": torch.Tensor.contiguous,
    "second_frames": lambda t: channels_last(torch.cat((t.flip(0), t)))[len(t) :],
    "second_frames_contiguous": lambda t: torch.cat((t.flip(0), t))[len(t) :],
    "slice_of_channels": lambda t: channels_last(torch.cat((t, t, t), dim=1))[:, 3 : 3 + t.shape[1]],
    "every_other_frame": lambda t: channels_last(t.repeat_interleave(2, dim=0))[::2],
    "left_half": lambda t: torch.cat((t, t), dim=3)[..., : t.shape[3]],
    "upper_half": lambda t: channels_last(torch.cat((t, t), dim=2))[:, :, : t.shape[2]],
    "columns_first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "scalars": scalars,
    "one_value": lambda t: t[:1, :1, :1, :1].expand_as(t),
}


class Case(NamedTuple):
    """What is stacked: the size of the output, channels before the shuffle and parts."""

    size: tuple[int, int, int]
    shuffled: Part | None
    parts: tuple[Part, ...]
    dtype: torch.dtype = SINGLE
    multiple: int = 8

    def __str__(self) -> str:
        maps = [self.shuffled, *self.parts]
        names = ["none" if part is None else f"{part.channels}_{part.kind}_{str(part.dtype)[6:]}" for part in maps]
        return f"{self.size}-{'-'.join(names)}-{str(self.dtype)[6:]}-{self.multiple}"


def made(case: Case, device: str = "cpu") -> list[Tensor]:
    """The maps, the shuffled one first."""
    generator = torch.Generator().manual_seed(sum(case.size))
    B, H, W = case.size
    maps = []
    for part in (case.shuffled, *case.parts):
        if part is not None:
            h, w = (H // 2, W // 2) if part is case.shuffled else (H, W)
            values = torch.randn(B, part.channels, h, w, generator=generator).to(device, part.dtype)
            maps.append(KINDS[part.kind](values).detach().requires_grad_(part.needs_grad))
    return maps


def both_forms(case: Case, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacked by the kernel, and by torch."""
    kernels = importlib.import_module("vfi.ops.pointwise.concat_kernels")
    parts = maps if case.shuffled is None else maps[1:]
    ours = kernels.concat_channels(parts, case.dtype, None if case.shuffled is None else maps[0], case.multiple)
    theirs = torch.cat([*([] if case.shuffled is None else [F.pixel_shuffle(maps[0], 2)]), *parts], dim=1).to(case.dtype)
    return ours, F.pad(theirs, (0, 0, 0, 0, 0, -theirs.shape[1] % case.multiple))


def unwritten(size: tuple[int, ...], memory_format: torch.memory_format, **options: Any) -> Tensor:
    return torch.full(size, torch.nan, **options).contiguous(memory_format=memory_format)


def check(case: Case, device: str = "cpu") -> None:
    """Output and gradients are those of torch, and what the kernels do not write is NaN."""
    maps = made(case, device)
    with mock.patch.object(torch, "empty", unwritten):
        ours, theirs = both_forms(case, maps)
        assert ours.dtype == case.dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, theirs)
        leaves = [t for t in maps if t.requires_grad]
        if not leaves:
            assert not ours.requires_grad
            return
        grad = torch.randn(*theirs.shape, generator=torch.Generator().manual_seed(0)).to(ours)
        for odd in (grad, channels_last(grad), grad[:, :1, :1].expand_as(grad)):
            of_ours, of_theirs = (torch.autograd.grad(t, leaves, odd, retain_graph=True) for t in (ours, theirs))
            for leaf, mine, right in zip(leaves, of_ours, of_theirs, strict=True):
                assert (mine.dtype, mine.shape) == (leaf.dtype, leaf.shape)
                assert torch.equal(mine, right)


def refine(width: int, dtype: torch.dtype) -> tuple[Part, tuple[Part, ...]]:
    """What the decoder stacks at full size."""
    half = Part(width, "second_frames", dtype)
    return Part(4 * width, dtype=dtype), (half, half, Part(6, needs_grad=False))


def flow(width: int, dtype: torch.dtype) -> tuple[Part, ...]:
    """What a stage of the flow stacks."""
    features, frames = Part(width, "second_frames", dtype), Part(3, "second_frames", needs_grad=False)
    flows = Part(2, "second_frames_contiguous")
    return (*(features,) * 2, *(frames,) * 4, *(flows,) * 2, Part(1, "contiguous"), Part(1, "scalars"))


SMALL = [
    *(Case((2, 6, 10), *refine(16, dtype), dtype) for dtype in (SINGLE, HALF)),
    Case((1, 4, 34), *refine(8, HALF), SINGLE),
    Case((1, 2, 2), *refine(3, SINGLE), HALF),
    Case((2, 6, 10), None, flow(16, HALF), HALF),
    Case((2, 3, 5), None, flow(20, SINGLE), SINGLE),
    Case((1, 18, 16), None, flow(8, SINGLE), HALF),
    *(Case((2, 6, 10), None, (Part(3), Part(20, kind, HALF), Part(1, kind)), HALF) for kind in KINDS),
    *(Case((2, 4, 34), Part(4 * 8, kind, HALF), (Part(8, kind),), SINGLE) for kind in KINDS),
    *(Case((1, 2, 2), None, (Part(3, kind, HALF),), SINGLE) for kind in ("channels_last", "contiguous", "scalars")),
    *(Case((1, 1, 7), None, (Part(16, kind), Part(1, kind))) for kind in ("channels_last", "contiguous")),
    Case((2, 6, 10), Part(4 * 16), ()),
    Case((1, 2, 2), Part(4 * 3, "contiguous", HALF), (), SINGLE),
    Case((1, 6, 10), Part(4 * 72), (Part(72, dtype=HALF), Part(120), Part(5)), HALF),
    Case((2, 6, 10), Part(4 * 3), (Part(8, dtype=HALF), Part(20)), HALF, multiple=1),
    Case((2, 6, 10), None, (Part(8, dtype=HALF), Part(1)), HALF, multiple=32),
    Case((0, 4, 6), None, (Part(8), Part(3)), HALF),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreted(interpreter, case):
    interpreter.submit(check, case).result()


@pytest.mark.parametrize("needed", range(8))
def test_only_gradients_that_are_needed(interpreter, needed):
    """Of the shuffled map, of a part that is cast, and of one that is not."""
    first, cast, same = (bool(needed >> i & 1) for i in range(3))
    parts = (Part(5, "contiguous", SINGLE, cast), Part(16, "second_frames", HALF, same), Part(3, needs_grad=cast))
    interpreter.submit(check, Case((2, 4, 6), Part(4 * 8, needs_grad=first), parts, HALF)).result()


def is_view_of_the_gradient() -> tuple[bool, bool]:
    maps = made(Case((2, 4, 6), None, (Part(8, dtype=HALF), Part(8))))
    ours, _ = both_forms(Case((2, 4, 6), None, (), HALF), maps)
    grad = channels_last(torch.randn_like(ours))
    same, cast = (t.untyped_storage().data_ptr() for t in torch.autograd.grad(ours, maps, grad))
    return same == grad.untyped_storage().data_ptr(), cast == grad.untyped_storage().data_ptr()


def test_gradients_without_a_cast_are_views(interpreter):
    assert interpreter.submit(is_view_of_the_gradient).result() == (True, False)


def test_values_that_half_precision_does_not_have(interpreter):
    interpreter.submit(check_extremes).result()


def check_extremes() -> None:
    """Overflow, underflow, ties, infinities and signed zeros are cast as torch casts them."""
    values = torch.tensor([65519.0, 65520.0, -1e9, 6e-8, 2e-8, 1 + 2**-11, 1 + 3 * 2**-11, torch.inf, -torch.inf, -0.0])
    ours, theirs = both_forms(Case((1, 2, 5), None, (), HALF), [values.view(1, 1, 2, 5)])
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.contiguous().view(torch.int16))


def test_every_channel_is_moved_once():
    """3 channels, 40 that so begin within 8, 101 that do not, 8 that are no neighbours, and 6, of 160."""
    kernels = importlib.import_module("vfi.ops.pointwise.concat_kernels")
    last, planes = kernels.Strides(40, 0, 0, 1, 40), kernels.Strides(40, 0, 1, 0, 1)
    rows, eights, owners = kernels.moves((3, 40, 101, 8, 6), (last, last, last, planes, last), 160, True)
    assert [tuple(row) for row in rows] == [(8, 32, 1, 5), (48, 32, 2, 5), (80, 32, 2, 37), (112, 32, 2, 69)]
    assert eights == (0, 40, 144, 152)
    assert owners[:8] == ((0, 0), (0, 1), (0, 2), *((1, i) for i in range(5)))
    assert owners[8:16] == (*((1, i) for i in range(37, 40)), *((2, i) for i in range(5)))
    assert owners[16:] == (*((3, i) for i in range(8)), *((4, i) for i in range(6)), (-1, 0), (-1, 0))
    # without the first and the last
    rows, eights, _ = kernels.moves((3, 40, 101, 8, 6), (None, last, last, planes, None), 160, False)
    assert [row.map_ for row in rows] == [0, 1, 1, 1]
    assert eights == (0, 40, 144)


def test_what_is_not_taken():
    stack = importlib.import_module("vfi.ops.pointwise.concat_kernels").concat_channels
    good = torch.zeros(2, 3, 4, 6)
    for parts, dtype, wrong in (
        ([good.double()], SINGLE, "float64"),
        ([good], torch.float64, "float64"),
        ([good.int()], HALF, "int32"),
    ):
        with pytest.raises(TypeError, match=f"bf16, fp16 or fp32 and was given torch.{wrong}"):
            stack(parts, dtype)
    with pytest.raises(ValueError, match=r"was given \[2, 3, 4, 6\], \[2, 3, 4, 5\]"):
        stack([good, good[..., 1:]], SINGLE)
    with pytest.raises(ValueError, match=r"was given \[2, 3, 4, 6\], \[1, 3, 4, 6\]"):
        stack([good, good[1:]], SINGLE)
    with pytest.raises(ValueError, match=r"was given \[3, 4, 6\]"):
        stack([good[0]], SINGLE)
    with pytest.raises(ValueError, match=r"\[B, 4 \* C, H / 2, W / 2\] and maps .* was given \[2, 3, 2, 3\], \[2, 3, 4, 6\]"):
        stack([good], SINGLE, good[:, :, :2, :3])
    with pytest.raises(ValueError, match=r"was given \[2, 4, 4, 6\], \[2, 3, 4, 6\]"):
        stack([good], SINGLE, torch.zeros(2, 4, 4, 6))
    with pytest.raises(ValueError, match="was given none"):
        stack([], SINGLE)
    with pytest.raises(ValueError, match="multiple of 0 channels"):
        stack([good], SINGLE, multiple=0)


LARGE = [
    *(Case((4, 64, 96), *refine(32, dtype), dtype) for dtype in (BRAIN, HALF, SINGLE)),
    *(Case((3, 46, 80), *refine(128, dtype), dtype) for dtype in (BRAIN, HALF, SINGLE)),
    *(Case((3, 46, 80), None, flow(128, dtype), dtype) for dtype in (BRAIN, HALF, SINGLE)),
    *(Case((2, 34, 60), *refine(32, SINGLE), dtype) for dtype in (BRAIN, HALF)),
    Case((2, 34, 60), *refine(32, HALF), BRAIN),
    Case((1, 34, 62), Part(4 * 20, dtype=BRAIN), (Part(3), Part(20, dtype=BRAIN), Part(1, "scalars")), BRAIN),
    Case((1, 34, 62), Part(4 * 3, dtype=BRAIN), (Part(100, dtype=BRAIN),), BRAIN, multiple=1),
    *(Case((2, 46, 80), Part(4 * 24, kind, BRAIN), (Part(20, kind), Part(24, kind, BRAIN)), BRAIN) for kind in KINDS),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_compiled(case):
    check(case, "cuda")


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    """Offsets of 64 bits, in one frame and of frames."""
    kernels = importlib.import_module("vfi.ops.pointwise.concat_kernels")
    small = torch.randn(2, 8, 2, 16, device="cuda", dtype=BRAIN)
    for frames, repeats in ((1, 4096), (2, 2048)):
        wide = channels_last(small[:frames]).repeat(1, 1, repeats, 1024 // 16)
        part = channels_last(wide[:, :1].expand(-1, 264, -1, -1))
        out = kernels.concat_channels([part], BRAIN)
        assert out.numel() > 2**31
        assert torch.equal(out[-1:, -1:], wide[-1:, :1])


@pytest.mark.gpu
def test_other_sizes_of_frames_are_not_compiled_anew():
    kernels = importlib.import_module("vfi.ops.pointwise.concat_kernels")
    compiled = []
    for size in ((2, 16, 32), (1, 12, 20), (3, 64, 48)):
        check(Case(size, *refine(16, BRAIN), BRAIN), "cuda")
        compiled.append([len(kernel.device_caches[0][0]) for kernel in (kernels.stack_maps, kernels.unstack_maps)])
    assert compiled[0] == compiled[1] == compiled[2]
