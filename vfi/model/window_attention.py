"""Branch B of an LGS block: local context from the same frame, by window attention with a gate on its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfi.config.configs import ModelConfig
from vfi.model.layers import zero
from vfi.ops.attention.window_attention import choose_window_attention, import_fused

# gate -> logits for each head and token
_GATE_WIDTH = {"headwise": lambda head_dim: 1, "elementwise": lambda head_dim: head_dim, "off": lambda head_dim: 0}


class GatedWindowAttention(nn.Module):
    """Attend within windows of each frame: [2B, H, W, C] -> the same shape. Odd blocks shift their windows by half a window.

    The gate is computed from the same normalised input as the query: Y' = sigmoid(X W_g) * Y before the output projection.
    """

    def __init__(self, dim: int, config: ModelConfig, shifted: bool, device: torch.device) -> None:
        super().__init__()
        self.window = config.window_size
        self.shift = config.window_size // 2 if shifted else 0
        self.heads = dim // config.head_dim
        gate_width = self.heads * _GATE_WIDTH[config.gate](config.head_dim)
        self.splits = (dim, dim, dim, gate_width)
        self.qkv_gate = nn.Linear(dim, sum(self.splits), bias=False)
        zero(self.qkv_gate.weight[3 * dim :])  # every gate starts half open: a zero logit for any input
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.attend, self.choice = choose_window_attention(config.attention_backend, device, config.head_dim)
        self.fused = import_fused() if self.attend is None else None

    def forward(self, x: Tensor) -> Tensor:
        projected = self.qkv_gate(x)
        if self.attend is None:
            assert self.fused is not None, "no way to attend was chosen"
            head_dim = self.splits[0] // self.heads
            return self.out_proj(self.fused(projected, self.heads, head_dim, self.window, self.shift))
        parts = projected.split(self.splits, dim=-1)
        q, k, v, gate = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        y = self.attend(q, k, v, gate if gate.numel() else None, self.window, self.shift)
        return self.out_proj(y.flatten(-2))
