"""How does attention inside (shifted) windows with a gate on its output run? Partition, SDPA, gate, reverse, in plain torch.

Source: Swin Transformer (windows, shift, mask), Gated Attention for Large Language Models (gate after SDPA, position G1).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_window_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, window: int, shift: int) -> Tensor:
    """Attention among the tokens of each `window` x `window` square, times the sigmoid of the gate.

    Args:
        q, k, v: `[B, H, W, heads, d]`, any H and W: windows that reach over the edge attend to what lies inside the frame.
        gate: logits, `[B, H, W, heads, 1]` (headwise) or `[B, H, W, heads, d]` (elementwise), or None for no gate.
        shift: the grid of windows starts this many tokens above and left of the frame, 0 … window - 1. Nothing wraps around.

    Returns:
        `[B, H, W, heads, d]`.
    """
    B, H, W = q.shape[:3]
    # padding, not rolling: it makes the shifted grid and completes the windows at every edge
    after_h, after_w = -(H + shift) % window, -(W + shift) % window
    padding = (0, 0, 0, 0, shift, after_w, shift, after_h)
    q, k, v = (_partition(F.pad(t, padding), window) for t in (q, k, v))  # [B * windows, heads, window^2, d]
    mask = None
    if shift or after_h or after_w:
        inside = F.pad(q.new_ones(1, H, W, 1, 1), padding)
        # [windows, 1, 1, window^2]: a column a token; every window holds at least one token of the frame
        mask = (_partition(inside, window)[..., 0] > 0).unsqueeze(1).repeat(B, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = _reverse(y, window, B, H + shift + after_h)[:, shift : shift + H, shift : shift + W]
    return y if gate is None else y * gate.sigmoid()


def _partition(x: Tensor, window: int) -> Tensor:
    """[B, H, W, heads, d] -> [B * windows, heads, window^2, d], H and W multiples of the window."""
    B, H, W, heads, d = x.shape
    tiles = x.view(B, H // window, window, W // window, window, heads, d)
    return tiles.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, window * window, d)


def _reverse(y: Tensor, window: int, B: int, H: int) -> Tensor:
    """The inverse of `_partition`."""
    heads, d = y.shape[1], y.shape[3]
    tiles = y.view(B, H // window, -1, heads, window, window, d)
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, -1, heads, d)
