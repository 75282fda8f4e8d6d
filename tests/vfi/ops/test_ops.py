"""Operators against brute force in float64."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F

from vfi.errors import JobError
from vfi.ops.attention.window_attention import choose_window_attention, gated_window_attention, gated_window_attention_flash
from vfi.ops.precision import fp32_island
from vfi.ops.ssm import ssd
from vfi.ops.ssm.causal_conv1d import causal_conv1d
from vfi.ops.ssm.scan_order import interleaved_merge, interleaved_scan, interleaved_unscan
from vfi.ops.ssm.ssd import choose_ssd, ssd_reference


def test_scan_order_of_every_token():
    B, H, W = 2, 3, 5
    places = [(h, w) for h in range(H) for w in range(W)]
    columns = sorted(places, key=lambda place: (place[1], place[0]))
    x = torch.arange(2 * B * H * W, dtype=torch.float64).view(2 * B, H, W, 1)
    scanned = interleaved_scan(x)
    assert scanned.shape == (4 * B, 2 * H * W, 1)
    for order, walk in enumerate((places, columns, places, columns)):
        for b in range(B):
            expected = [x[frame * B + b, h, w, 0] for h, w in walk for frame in (0, 1)]
            expected = expected[::-1] if order >= 2 else expected
            assert scanned[order * B + b, :, 0].tolist() == [value.item() for value in expected]


@pytest.mark.parametrize(("B", "H", "W"), [(1, 1, 1), (2, 3, 5), (3, 8, 4)])
def test_scan_is_undone_in_every_order(B, H, W):
    x = torch.randn(2 * B, H, W, 6, dtype=torch.float64)
    scanned = interleaved_scan(x)
    assert torch.equal(interleaved_unscan(scanned, B, H, W), x.expand(4, -1, -1, -1, -1))
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64).repeat_interleave(B).view(-1, 1, 1)
    torch.testing.assert_close(interleaved_merge(scanned * weights, B, H, W), x * 1111)


def recurrence(x, dt, A, B, C, D, dt_bias):
    """The state-space recurrence, token by token."""
    N, L, H, P = x.shape
    step = F.softplus(dt + dt_bias)
    group = H // B.shape[2]
    y = torch.empty_like(x)
    for n in range(N):
        for h in range(H):
            state = torch.zeros(P, B.shape[-1], dtype=x.dtype)
            for i in range(L):
                state = state * torch.exp(step[n, i, h] * A[h]) + step[n, i, h] * torch.outer(x[n, i, h], B[n, i, h // group])
                y[n, i, h] = state @ C[n, i, h // group] + D[h] * x[n, i, h]
    return y


def ssd_inputs(L, N=2, H=4, P=3, G=2, S=5, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(L)
    shapes = [(N, L, H, P), (N, L, H), (H,), (N, L, G, S), (N, L, G, S), (H,), (H,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return [tensor.to(device, dtype) for tensor in tensors]


@pytest.mark.parametrize("L", [1, 7, 64, 65, 200])
def test_ssd_reference_is_the_recurrence(L):
    inputs = ssd_inputs(L)
    torch.testing.assert_close(ssd_reference(*inputs), recurrence(*inputs), rtol=1e-9, atol=1e-9)


def test_ssd_reference_gradients():
    inputs = [tensor.requires_grad_() for tensor in ssd_inputs(70, N=1, H=2, P=2, G=1, S=2)]
    assert torch.autograd.gradcheck(ssd_reference, inputs, fast_mode=True)


def test_ssd_reference_survives_wide_steps():
    """Large time steps decay to nothing; the masked upper triangle must not overflow into NaN."""
    inputs = ssd_inputs(130, dtype=torch.float32)
    inputs[1] = inputs[1] * 100
    inputs[0].requires_grad_()
    y = ssd_reference(*inputs)
    y.sum().backward()
    assert y.isfinite().all()
    assert inputs[0].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssd_stays_fp32_over_2_to_the_15_tokens_under_autocast(dtype):
    """A state that forgets slowly sums thousands of tokens: with the island the error stays that of fp32."""
    exact = ssd_inputs(2**15, N=1, H=2, P=4, G=1, S=4)
    exact[1] = exact[1] - 6  # time steps around 0.002
    truth = ssd_reference(*exact)
    inputs = [tensor.float() for tensor in exact]
    with torch.autocast("cpu", dtype=dtype):
        island, bare = ssd_reference(*inputs), ssd._ssd_reference(*inputs)
    errors = [((y.double() - truth).norm() / truth.norm()).item() for y in (island, bare, ssd_reference(*inputs))]
    print(f"relative error under {dtype} autocast: island {errors[0]:.1e}, without {errors[1]:.1e}; fp32 {errors[2]:.1e}")
    assert errors[0] == errors[2] < 1e-5
    assert errors[1] > 100 * errors[0]


def test_ssd_backend_choice_says_why():
    cpu = torch.device("cpu")

    def narrow_heads(device: torch.device) -> str:
        return "heads are too narrow"

    neither = {"fused": narrow_heads, "blocked": lambda device: "heads differ"}
    name, function, reason = choose_ssd("auto", cpu, neither)
    assert (name, function) == ("reference", ssd_reference)
    assert reason == (
        "ssd: reference (heads are too narrow; mamba_ssm's kernels need a CUDA GPU and the device is cpu; heads differ)"
    )
    assert choose_ssd("auto", cpu, {"fused": lambda device: None, "blocked": narrow_heads}) == (
        "fused", None, "ssd: fused (available on cpu)")  # fmt: skip
    with pytest.raises(JobError, match="fused cannot run: heads are too narrow; use --ssd_backend auto"):
        choose_ssd("fused", cpu, neither)
    with pytest.raises(JobError, match="mamba_ssm cannot run"):
        choose_ssd("mamba_ssm", cpu, neither)
    with pytest.raises(ValueError, match="does not exist"):
        choose_ssd("cuda", cpu, neither)


@pytest.mark.parametrize("asked", [None, "0"])
def test_what_the_kernels_tuning_finds_is_kept(monkeypatch, asked):
    """Triton reads the variable when the kernels are defined, so it is set by then; a user's own choice stays."""
    seen = []

    class Kernels(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            seen.append((name, os.environ.get("TRITON_CACHE_AUTOTUNING")))
            return print

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "selective_scan_cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", Kernels("mamba_ssm.ops.triton.ssd_combined"))
    monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", asked or "")
    if asked is None:
        monkeypatch.delenv("TRITON_CACHE_AUTOTUNING")
    ssd.import_kernel.cache_clear()
    try:
        assert ssd.import_kernel() is print
    finally:
        ssd.import_kernel.cache_clear()
    assert seen[-1] == ("mamba_chunk_scan_combined", asked or "1")


def test_a_part_of_a_package_is_imported_without_the_whole(tmp_path, monkeypatch):
    (tmp_path / "heavy" / "inner").mkdir(parents=True)
    (tmp_path / "heavy" / "__init__.py").write_text("from heavy.inner.part import answer\nweight = 10\n")
    (tmp_path / "heavy" / "inner" / "__init__.py").write_text("")
    (tmp_path / "heavy" / "inner" / "part.py").write_text("import heavy\nanswer = 42\nlight = not hasattr(heavy, 'weight')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with ssd._bare_package("heavy"):
        part = importlib.import_module("heavy.inner.part")
    assert (part.answer, part.light) == (42, True)
    whole = importlib.import_module("heavy")
    assert (whole.answer, whole.weight) == (42, 10)
    with ssd._bare_package("heavy"):
        assert importlib.import_module("heavy") is whole
    with pytest.raises(ModuleNotFoundError, match="heavier is not installed"), ssd._bare_package("heavier"):
        pass
    for name in [name for name in sys.modules if name.partition(".")[0] == "heavy"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.gpu
@pytest.mark.parametrize("L", [100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssd_kernel_against_float64(L, dtype):
    """Error, forward and backward, against plain torch on inputs of the same dtype (the kernel's products: TF32 or bf16).

    Triton cuts the factors of a product to 10 bits of mantissa for TF32 where cuBLAS rounds: up to 2^-10 each, one way, which
    sums over many tokens don't even out.
    """
    _, kernel, reason = choose_ssd("mamba_ssm", torch.device("cuda"), dict.fromkeys(("fused", "blocked"), lambda device: None))
    assert "mamba_ssm" in reason
    exact = [t.requires_grad_() for t in ssd_inputs(L, H=4, P=32, G=1, S=64, device="cuda")]
    grad = torch.randn(2, L, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cuda()
    truth = [ssd_reference(*exact), *torch.autograd.grad(ssd_reference(*exact), exact, grad)]
    errors = {}
    torch.backends.cuda.matmul.allow_tf32 = True
    for name, function in (("kernel", kernel), ("reference", ssd_reference)):
        # A, D and dt_bias are parameters: fp32 whatever the activations are
        low = [t.detach().to(torch.float32 if t.dim() == 1 else dtype).requires_grad_() for t in exact]
        y = function(*low)
        results = [y, *torch.autograd.grad(y, low, grad.to(y.dtype))]
        errors[name] = [((r.double() - t).norm() / t.norm()).item() for r, t in zip(results, truth, strict=True)]
    torch.backends.cuda.matmul.allow_tf32 = False
    print(dtype, L, errors)
    for of_kernel, of_reference in zip(errors["kernel"], errors["reference"], strict=True):
        assert of_kernel < 2 * of_reference + {torch.float32: 2**-8, torch.bfloat16: 1e-2}[dtype]


def test_causal_conv_is_the_depthwise_convolution():
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = conv(x.transpose(1, 2))[..., :9].transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, conv.weight.squeeze(1), conv.bias), expected)


def attention_by_pixel(q, k, v, gate, window, shift):
    """For every pixel: softmax over the pixels of the frame that lie in its window."""
    B, H, W, heads, d = q.shape
    y = torch.zeros_like(q)

    def window_of(h, w):
        return (h + shift) // window, (w + shift) // window

    pixels = [(h, w) for h in range(H) for w in range(W)]
    for h, w in pixels:
        near = [p for p in pixels if window_of(*p) == window_of(h, w)]
        rows, columns = (list(axis) for axis in zip(*near, strict=True))
        for b in range(B):
            for head in range(heads):
                weights = torch.softmax(k[b, rows, columns, head] @ q[b, h, w, head] / d**0.5, dim=0)
                y[b, h, w, head] = weights @ v[b, rows, columns, head]
    return y if gate is None else y * torch.sigmoid(gate)


@pytest.mark.parametrize(("window", "shift"), [(7, 0), (8, 4), (14, 7), (4, 0)])
@pytest.mark.parametrize("gate_width", [0, 1, 3])
def test_window_attention_by_pixel(window, shift, gate_width):
    q, k, v = torch.randn(3, 2, 12, 9, 2, 3, dtype=torch.float64)
    gate = torch.randn(2, 12, 9, 2, gate_width, dtype=torch.float64) if gate_width else None
    result = gated_window_attention(q, k, v, gate, window, shift)
    torch.testing.assert_close(result, attention_by_pixel(q, k, v, gate, window, shift))


def test_window_attention_gradients():
    q, k, v = (torch.randn(1, 5, 6, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gate = torch.randn(1, 5, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: gated_window_attention(*t, 4, 2), (q, k, v, gate), fast_mode=True)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """What flash_attn's function of this name does, sequence by sequence, but computed and returned in float64."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q[0] == 0
    assert cu_seqlens_q[-1] == len(q)
    bounds = cu_seqlens_q.tolist()
    y = []
    for start, end in itertools.pairwise(bounds):
        assert 0 < end - start <= min(max_seqlen_q, max_seqlen_k)
        queries, keys, values = (t[start:end].double() for t in (q, k, v))  # [tokens, heads, d]
        scores = torch.einsum("ihd,jhd->hij", queries, keys) / q.shape[-1] ** 0.5
        y.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), values))
    return torch.cat(y)


@pytest.fixture
def flash_attn_stand_in(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize(("window", "shift"), [(7, 0), (8, 4), (14, 7), (4, 0), (3, 2), (4, 1)])
@pytest.mark.parametrize("gate_width", [0, 1, 3])
@pytest.mark.usefixtures("flash_attn_stand_in")
def test_flash_attn_gets_every_window_by_pixel(window, shift, gate_width):
    """The indexing around flash_attn, for sizes that windows do and do not divide: output and gradients."""
    shapes = [(2, 12, 9, 2, 3)] * 3 + ([(2, 12, 9, 2, gate_width)] if gate_width else [])
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    no_gate = [] if gate_width else [None]
    y = gated_window_attention_flash(*inputs, *no_gate, window, shift)
    expected = attention_by_pixel(*exact, *no_gate, window, shift)
    # all in float64 but the gate, which the operator computes in the dtype of its inputs
    torch.testing.assert_close(y, expected, **({"rtol": 1e-2, "atol": 1e-2} if gate_width else {}))
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((out * weight).sum(), t) for out, t in ((y, inputs), (expected, exact)))
    for ours, true in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("flash_attn_stand_in")
def test_flash_attn_refuses_fp32():
    q = torch.randn(1, 4, 4, 1, 2)
    with pytest.raises(JobError, match=r"was given torch.float32: .*--attention_backend sdpa"):
        gated_window_attention_flash(q, q, q, None, 4, 0)


@pytest.mark.usefixtures("flash_attn_stand_in")
def test_flash_attn_trains_after_inference_at_the_same_size():
    """The order of tokens is cached: one made in inference mode must serve autograd, too."""
    q = torch.randn(1, 5, 11, 1, 2).bfloat16()
    with torch.inference_mode():
        gated_window_attention_flash(q, q, q, None, 4, 1)
    q.requires_grad_()
    gated_window_attention_flash(q, q, q, None, 4, 1).sum().backward()
    assert q.grad.isfinite().all()


def test_attention_backend_choice_says_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_window_attention("sdpa", cpu, 32) == (gated_window_attention, "attention: sdpa (asked for)")
    function, reason = choose_window_attention("auto", cpu, 32)
    assert function is gated_window_attention
    assert reason == "attention: sdpa (the fused kernels need a CUDA GPU and the device is cpu)"
    with pytest.raises(ValueError, match="does not exist"):
        choose_window_attention("flash", cpu, 32)
    with pytest.raises(JobError, match="flash_attn cannot run: its kernels need a CUDA GPU and the device is cpu"):
        choose_window_attention("flash_attn", cpu, 32)
    capability = {"value": (7, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["value"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(JobError, match=r"flash_attn cannot run: Tesla V100 is older than compute capability 8\.0"):
        choose_window_attention("flash_attn", cuda, 32)
    assert "attention: sdpa (on Tesla V100, of compute capability 7.0, " in choose_window_attention("auto", cuda, 32)[1]
    with pytest.raises(JobError, match="fused cannot run: the fused kernels take heads of 16, 32, 64 channels, not 8"):
        choose_window_attention("fused", cuda, 8)
    capability["value"] = (6, 1)
    with pytest.raises(JobError, match=r"fused cannot run: Tesla V100 is older than compute capability 7\.0"):
        choose_window_attention("fused", cuda, 32)
    capability["value"] = (9, 0)
    assert choose_window_attention("auto", cuda, 32) == (None, "attention: fused (available on cuda)")
    assert (
        choose_window_attention("auto", cuda, 8)[1]
        == "attention: sdpa (the fused kernels take heads of 16, 32, 64 channels, not 8)"
    )
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JobError, match="package flash_attn is not installed"):
        choose_window_attention("flash_attn", cuda, 32)
    with pytest.raises(JobError, match="package triton is not installed"):
        choose_window_attention("fused", cuda, 32)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "shift"), [(8, 0), (8, 4), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_against_float64(window, shift, dtype):
    """Output and every gradient: at most twice the error of SDPA on the same inputs."""
    pytest.importorskip("flash_attn")
    flash, _ = choose_window_attention("flash_attn", torch.device("cuda"), 32)
    torch.manual_seed(0)
    shapes = [(2, 24, 35, 4, 32)] * 3 + [(2, 24, 35, 4, 1)]
    low = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    weight = torch.randn(shapes[0], device="cuda", dtype=torch.float64)
    results = []
    for function, to in ((gated_window_attention, torch.float64), (flash, dtype), (gated_window_attention, dtype)):
        inputs = [t.to(to).requires_grad_() for t in low]
        y = function(*inputs, window, shift)
        results.append([y.detach(), *torch.autograd.grad((y.double() * weight).sum(), inputs)])
    for true, of_flash, of_sdpa in zip(*results, strict=True):
        errors = [((t.double() - true).norm() / true.norm()).item() for t in (of_flash, of_sdpa)]
        assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_island_computes_in_fp32_under_autocast(dtype):
    a = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert (a @ a).dtype == dtype
        inside = fp32_island(torch.matmul, a.to(dtype), a)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, a.to(dtype).float() @ a, rtol=0, atol=0)
    assert fp32_island(torch.matmul, a.double(), a.double()).dtype == torch.float64


def test_scan_gradients():
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, 30, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interleaved_scan, (x,))
    assert torch.autograd.gradcheck(lambda t: interleaved_unscan(t, 2, 3, 5), (y,))


def test_scan_trains_after_inference_at_the_same_size():
    """The index is cached: one made in inference mode must serve autograd, too."""
    with torch.inference_mode():
        interleaved_scan(torch.randn(2, 9, 11, 1))
    x = torch.randn(2, 9, 11, 1, requires_grad=True)
    interleaved_scan(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))
