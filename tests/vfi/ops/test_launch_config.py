"""Launch configurations of the fused Triton kernels: those stored for their GPU and shape class, else the defaults."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from vfi.ops.ssm import fused_ss2d
from vfi.ops.triton import launch_config, tuned_configs

CARD = "sm_90, triton 3.6"
GPU = torch.device("cuda", 0)
PLAIN = {"BLOCK": 32, "num_warps": 4}
FAST = {"BLOCK": 64, "num_warps": 2}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def keep(monkeypatch, tmp_path):
    """`keep(kernel, shape_class, options)`: puts it into a file in place of the one in the tree; the GPU is a CARD."""
    content: dict[str, Any] = {CARD: {"device": "H100", "kernels": {}, "fused": {}}}
    monkeypatch.setattr(tuned_configs, "FILE", tmp_path / "kernels.json")
    monkeypatch.setattr(tuned_configs, "card", lambda device: CARD)

    def write(kernel: str, shape_class: launch_config.ShapeClass, options: launch_config.Options) -> None:
        entry = {"key": launch_config.written(shape_class), "config": options}
        content[CARD]["fused"].setdefault(kernel, []).append(entry)
        tuned_configs.FILE.write_text(json.dumps(content))
        forget()

    forget = launch_config.known.cache_clear
    yield write
    forget()


def test_a_known_card_has_options_for_its_shape_classes(keep):
    keep("scan", (torch.bfloat16, 32, True, "tf32"), FAST)
    assert launch_config.configuration("scan", (torch.bfloat16, 32, True, "tf32"), PLAIN, GPU) == FAST
    for other in ((torch.float32, 32, True, "tf32"), (torch.bfloat16, 64, True, "tf32"), (torch.bfloat16, 32, True, "tf32x3")):
        assert launch_config.configuration("scan", other, PLAIN, GPU) is PLAIN
    assert launch_config.configuration("convolve", (torch.bfloat16, 32, True, "tf32"), PLAIN, GPU) is PLAIN
    assert launch_config.configuration("scan", (torch.bfloat16, 32, True, "tf32"), PLAIN, torch.device("cpu")) is PLAIN


def test_another_card_has_none(keep, monkeypatch):
    keep("scan", (32,), FAST)
    monkeypatch.setattr(tuned_configs, "card", lambda device: "sm_90, triton 3.7")
    assert launch_config.configuration("scan", (32,), PLAIN, GPU) is PLAIN


def test_a_triton_by_another_name_has_none(keep, monkeypatch):
    def card(device: torch.device) -> str:
        raise importlib.metadata.PackageNotFoundError("triton")

    keep("scan", (32,), FAST)
    monkeypatch.setattr(tuned_configs, "card", card)
    assert launch_config.configuration("scan", (32,), PLAIN, GPU) is PLAIN


def test_the_file_is_read_once(keep):
    keep("scan", (32,), FAST)
    assert launch_config.configuration("scan", (32,), PLAIN, GPU) == FAST
    tuned_configs.FILE.unlink()
    assert launch_config.configuration("scan", (32,), PLAIN, GPU) == FAST


def ss2d(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> list[Tensor]:
    """Forward and backward pass of an SS2D, 1 pair of 5x7, 2 heads of 16, state 16."""
    shape = fused_ss2d.Shape(heads=2, head_dim=16, state=16, together=2, precision="input")
    sizes = [(shape.channels, 4), (shape.channels,), (2,), (2,), (2,), (shape.inner,)]
    parameters = [torch.rand(size, device=device, requires_grad=True) for size in sizes]
    parameters[2] = -parameters[2].detach()
    projected = torch.randn(2, 5, 7, shape.inner + shape.channels + 2, device=device).to(dtype).requires_grad_()
    y = fused_ss2d.fused_ss2d(projected, fused_ss2d.Parameters(*parameters), shape)
    y.sum().backward()
    return [y.detach(), projected.grad]


def attention(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", window: int = 8) -> list[Tensor]:
    """Forward and backward pass, 2 heads of 16, a gate for each."""
    from vfi.ops.attention.window_attention_kernels import gated_window_attention_fused

    projected = torch.randn(2, 5, 11, 98, device=device).to(dtype).requires_grad_()
    y = gated_window_attention_fused(projected, 2, 16, window, 0)
    y.sum().backward()
    return [y.detach(), projected.grad]


_TOKENS = (torch.bfloat16, torch.bfloat16, 16, 16, 64, "tf32")
_WINDOW = (torch.bfloat16, 8, 16, 1, False)
# of each kernel: the shape class that the functions above launch it with
CLASSES: dict[str, dict[str, launch_config.ShapeClass]] = {
    "ss2d": {
        "convolve": (torch.bfloat16, torch.bfloat16, 2),
        "time_steps": (torch.bfloat16, 64, 2, 2),
        "carry_states": (256,),
        "step_gradients": (64, 2),
        "convolution_gradients": (torch.bfloat16, 2),
        "time_step_gradients": (torch.bfloat16, 2, 2),
        "gated_norm": (torch.bfloat16, 32, 2),
        "gated_norm_gradients": (torch.bfloat16, 32, 2),
        "scan": _TOKENS,
        "scan_states": _TOKENS,
        "scan_state_gradients": _TOKENS,
        "scan_key_gradients": _TOKENS,
        "scan_gradients": _TOKENS,
    },
    "attention": {"window_attention_forward": _WINDOW, "window_attention_backward": _WINDOW},
    "attention in parts": {
        "window_attention_forward": (torch.bfloat16, 14, 16, 1, False),
        "window_attention_backward_in_parts": (torch.bfloat16, 14, 16, 1, False),
    },
}
RUNS: dict[str, Callable[..., list[Tensor]]] = {
    "ss2d": ss2d,
    "attention": attention,
    "attention in parts": functools.partial(attention, window=14),
}


@pytest.fixture
def asked(monkeypatch) -> dict[str, tuple[launch_config.ShapeClass, launch_config.Options]]:
    """Of each kernel that is launched meanwhile: its shape class, and what its code says."""
    plain, met = launch_config.configuration, {}

    def note(kernel, shape_class, default, device):
        met[kernel] = shape_class, default
        return plain(kernel, shape_class, default, device)

    monkeypatch.setattr(launch_config, "configuration", note)
    return met


def launched(run: Callable[[], list[Tensor]]) -> dict[str, dict[str, Any]]:
    """What each kernel is launched with, by name; it is not run."""
    from triton.runtime.jit import JITFunction

    given: dict[str, dict[str, Any]] = {}
    with mock.patch.object(JITFunction, "run", lambda kernel, *_, **options: given.update({kernel.__name__: options})):
        run()
    return given


@needs_triton
@pytest.mark.parametrize("operator", RUNS)
def test_every_kernel_is_launched_with_what_is_known(keep, asked, monkeypatch, operator):
    monkeypatch.setattr(fused_ss2d, "multiprocessors", lambda device: 100)  # so that sequences are cut into segments
    monkeypatch.setattr(fused_ss2d, "_SHORTEST", 1)
    before = launched(RUNS[operator])
    assert {kernel: shape_class for kernel, (shape_class, _) in asked.items()} == CLASSES[operator]
    assert set(before) == set(asked)
    for kernel, (shape_class, default) in asked.items():
        assert before[kernel].items() >= {name: value for name, value in default.items() if value}.items()
        assert before[kernel].get("maxnreg") is None  # 0 leaves it to the compiler
        keep(kernel, shape_class, {name: 2 * value or 128 for name, value in default.items()})
    of_gpu = launch_config.known(GPU)
    monkeypatch.setattr(launch_config, "known", lambda device: of_gpu)  # for the tensors here lie on a CPU
    after = launched(RUNS[operator])
    for kernel, (_, default) in asked.items():
        assert after[kernel].items() >= {name: 2 * value or 128 for name, value in default.items()}.items()


def with_other_blocks(operator: str) -> tuple[list[Tensor], list[Tensor], int]:
    """Results as the code says and with half of its blocks, and how many kernels have blocks."""
    plain, kernels = launch_config.configuration, set()

    def halved(kernel, shape_class, default, device):
        sizes = {name: value // 2 or 1 for name, value in default.items() if name[0].isupper()}
        kernels.update([kernel] if sizes else [])
        return plain(kernel, shape_class, default, device) | sizes

    results = []
    for choose in (plain, halved):
        torch.manual_seed(0)
        with mock.patch.object(launch_config, "configuration", choose):
            results.append(RUNS[operator](torch.float16))  # bf16 can't be interpreted
    return *results, len(kernels)


@needs_triton
@pytest.mark.parametrize(
    ("operator", "with_blocks"),
    [pytest.param("ss2d", 5, marks=pytest.mark.slow), ("attention", 1), ("attention in parts", 2)],
)
def test_grids_follow_the_blocks(interpreter, operator, with_blocks):
    ours, others, kernels = interpreter.submit(with_other_blocks, operator).result()
    assert kernels == with_blocks
    for one, other in zip(ours, others, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-3)
