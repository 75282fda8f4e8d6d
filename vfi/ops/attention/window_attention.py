"""Attention inside (shifted) windows with a gate on its output: fused, on PyTorch's SDPA, or on flash_attn.

SDPA: partition, attention with a mask, gate, reverse. flash_attn: the tokens of the frame in the order of their windows, as
sequences of different lengths, which needs neither padding nor a mask. Both have the same signature. Fused: everything in
place in one kernel (vfi/ops/attention/window_attention_kernels.py).
Source: Swin Transformer (windows, shift, mask), Gated Attention for Large Language Models (gate after SDPA, position G1).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.errors import JobError
from vfi.ops.triton.availability import UnavailableReason, may_be_tried, select_backend, why_unavailable

FUSED_WIDTHS = (16, 32, 64)  # of a head
FusedWindowAttention = Callable[[Tensor, int, int, int, int], Tensor]
WindowAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int], Tensor]
BACKENDS = ("auto", "sdpa", "flash_attn", "fused")


def gated_window_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, window: int, shift: int) -> Tensor:
    """Attend among the tokens of each `window` x `window` square and multiply by the sigmoid of the gate.

    Args:
        q, k, v: `[B, H, W, heads, d]`, any H and W: windows that extend beyond the edge attend to the tokens inside the frame.
        gate: logits, `[B, H, W, heads, 1]` (headwise) or `[B, H, W, heads, d]` (elementwise), or None for no gate.
        shift: the grid of windows starts this many tokens above and left of the frame, 0 … window - 1. Nothing wraps around.

    Returns:
        `[B, H, W, heads, d]`.
    """
    B, H, W = q.shape[:3]
    # padding instead of rolling: it creates the shifted grid and completes the windows at every edge
    after_h, after_w = -(H + shift) % window, -(W + shift) % window
    padding = (0, 0, 0, 0, shift, after_w, shift, after_h)
    q, k, v = (_partition(F.pad(t, padding), window) for t in (q, k, v))  # [B * windows, heads, window^2, d]
    mask = None
    if shift or after_h or after_w:
        inside = F.pad(q.new_ones(1, H, W, 1, 1), padding)
        # [windows, 1, 1, window^2]: one column for each token; every window contains at least one token of the frame
        mask = (_partition(inside, window)[..., 0] > 0).unsqueeze(1).repeat(B, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = _reverse(y, window, B, H + shift + after_h)[:, shift : shift + H, shift : shift + W]
    return y if gate is None else y * gate.sigmoid()


def _partition(x: Tensor, window: int) -> Tensor:
    """Reshape [B, H, W, heads, d] to [B * windows, heads, window^2, d]; H and W are multiples of the window."""
    B, H, W, heads, d = x.shape
    tiles = x.view(B, H // window, window, W // window, window, heads, d)
    return tiles.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, window * window, d)


def _reverse(y: Tensor, window: int, B: int, H: int) -> Tensor:
    """Invert `_partition`."""
    heads, d = y.shape[1], y.shape[3]
    tiles = y.view(B, H // window, -1, heads, window, window, d)
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, -1, heads, d)


def gated_window_attention_open(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, window: int, shift: int) -> Tensor:
    """Compute `gated_window_attention` with a mask for any size, for a traced network in which H and W are symbolic."""
    B, H, W, heads, d = q.shape
    down, across = (H + shift + window - 1) // window, (W + shift + window - 1) // window
    padding = (0, 0, 0, 0, shift, across * window - shift - W, shift, down * window - shift - H)
    tiles = (F.pad(t, padding).view(B, down, window, across, window, heads, d) for t in (q, k, v))
    q, k, v = (t.permute(0, 1, 3, 5, 2, 4, 6).reshape(B * down * across, heads, window * window, d) for t in tiles)
    row = torch.arange(down * window, device=q.device).view(down, 1, window, 1)
    column = torch.arange(across * window, device=q.device).view(1, across, 1, window)
    inside = (row >= shift) & (row < shift + H) & (column >= shift) & (column < shift + W)
    mask = inside.reshape(down * across, 1, 1, window * window).repeat(B, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = y.reshape(B, down, across, heads, window, window, d).permute(0, 1, 4, 2, 5, 3, 6)
    y = y.reshape(B, down * window, across * window, heads, d).narrow(1, shift, H).narrow(2, shift, W)
    return y if gate is None else y * gate.sigmoid()


def gated_window_attention_flash(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, window: int, shift: int) -> Tensor:
    """Compute `gated_window_attention` with flash_attn's kernel for sequences of different lengths; fp16 or bf16 only."""
    from flash_attn import flash_attn_varlen_func

    if q.dtype not in (torch.float16, torch.bfloat16):
        raise JobError(
            f"--attention_backend flash_attn takes fp16 or bf16 and was given {q.dtype}: run under autocast "
            f"(mixed_precision of the accelerate config), or use --attention_backend sdpa"
        )
    B, H, W = q.shape[:3]
    order, place, bounds = _window_order(B, H, W, window, shift, q.device)
    q, k, v = (t.flatten(0, 2).index_select(0, order) for t in (q, k, v))  # [tokens, heads, d]
    longest = min(window, H) * min(window, W)
    y = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest)
    y = y.index_select(0, place).unflatten(0, (B, H, W))
    return y if gate is None else y * gate.sigmoid()


@functools.lru_cache(maxsize=32)  # a 4096x2304 pair at stride 8 takes 5 MiB
def _window_order(B: int, H: int, W: int, window: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens in window order, the position of each token in it, and (int32) the bounds of each window."""
    with torch.inference_mode(False):  # the cache also serves training, which can't save inference tensors
        rows, columns = ((torch.arange(size, device=device) + shift) // window for size in (H, W))
        across, down = int(columns[-1]) + 1, int(rows[-1]) + 1
        frames = torch.arange(B, device=device).view(B, 1, 1) * (down * across)
        number = (frames + rows.view(H, 1) * across + columns).flatten()
        order = number.argsort(stable=True)
        ends = number.bincount().cumsum(0)  # shift < window: every window contains tokens, so no empty one is counted
        return order, order.argsort(), F.pad(ends, (1, 0)).int()


def choose_window_attention(backend: str, device: torch.device, head_dim: int) -> tuple[WindowAttention | None, str]:
    """Return the function for a backend name, and a line that states the choice and the reason.

    The function is None for fused, which takes q, k, v and gate unsplit, as projected. A named backend that can't run raises.
    """
    kernels: dict[str, UnavailableReason] = {"fused": lambda device: attention_obstacle(device, head_dim)}
    if backend == "flash_attn":  # only by name
        kernels = {"flash_attn": _flash_obstacle}
    name, line = select_backend("attention", "attention_backend", backend, BACKENDS, device, kernels)
    functions = {"sdpa": gated_window_attention, "flash_attn": gated_window_attention_flash, "fused": None}
    return functions[name], line


@functools.cache
def import_fused() -> FusedWindowAttention:
    """Return the fused function, imported only when chosen because it needs Triton."""
    from vfi.ops.attention.window_attention_kernels import gated_window_attention_fused

    return gated_window_attention_fused


def attention_obstacle(device: torch.device, head_dim: int) -> str | None:
    """Return why the fused kernels can't run on `device` with heads of this width; None if they can."""
    obstacle = why_unavailable(device)
    if head_dim not in FUSED_WIDTHS and may_be_tried(obstacle):
        return f"the fused kernels take heads of {', '.join(map(str, FUSED_WIDTHS))} channels, not {head_dim}"
    return obstacle


def _flash_obstacle(device: torch.device) -> str | None:
    """Return why flash_attn can't run on `device`; None if it can."""
    if device.type != "cuda":
        return f"its kernels need a CUDA GPU and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0, which it needs"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed (pip install flash-attn compiles it)"
    return None
