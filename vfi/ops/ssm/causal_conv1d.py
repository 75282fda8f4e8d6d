"""Short causal convolution before the scan, as K shifted products in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve tokens depthwise and causally: x `[N, L, D]`, weight `[D, K]`, bias `[D]` or None.

    y[l] = bias + sum_k weight[:, k] * x[l - (K - 1) + k], with zeros before the first token; in the dtype of x.
    """
    K = weight.shape[1]
    weight = weight.to(x.dtype)  # fp32 weights would promote half-precision tokens and double their memory
    length = x.shape[1]
    padded = F.pad(x, (0, 0, K - 1, 0))
    y = padded[:, :length] * weight[:, 0]
    if bias is not None:
        y = y + bias.to(x.dtype)
    for k in range(1, K):
        y = y + padded[:, k : k + length] * weight[:, k]
    return y
