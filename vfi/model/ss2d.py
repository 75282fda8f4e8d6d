"""Branch A of an LGS block: what do far-away pixels of both frames say? Mamba-2 over the interleaved scan.

The plain form runs one Mamba2 over four reordered copies of the tokens. `in_proj` and the gate act on each token alone and
`out_proj` is linear, so here the projection is computed once a pixel, its output is reordered, the gated norm is applied
back in place, and the four orders are summed before `out_proj`: the same numbers for a quarter of the projection work.
Parameters carry the names of `mamba_ssm.Mamba2`. Source: Mamba-2 (arXiv 2405.21060), VFIMamba (arXiv 2407.02315).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.config import ModelConfig
from vfi.ops.causal_conv1d import causal_conv1d
from vfi.ops.precision import fp32_island
from vfi.ops.scan_order import interleaved_scan, interleaved_unscan
from vfi.ops.ssd import choose_ssd

_DT_RANGE = (1e-3, 1e-1)  # the time steps that dt_bias starts with, log-uniform, as in Mamba
_CONV_KERNEL = 4


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)) * weight over the last dimension, in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return fp32_island(_gated_rms_norm, y, z, self.weight)


def _gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(y * F.silu(z), weight.shape, weight, eps=1e-5)


class SS2D(nn.Module):
    """[2B, H, W, C], frame 0 of all pairs first -> the same shape."""

    def __init__(self, dim: int, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        inner, state = config.expand * dim, config.d_state
        self.heads = inner // config.head_dim
        self.splits = (inner, inner + 2 * state, self.heads)  # z | x, B, C | dt
        self.inner_splits = (inner, state, state)
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False)
        channels = inner + 2 * state
        self.conv1d = nn.Conv1d(channels, channels, _CONV_KERNEL, groups=channels, padding=_CONV_KERNEL - 1)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.ssd, self.choice = choose_ssd(config.ssd_backend, device)
        self.island = {"fp32": fp32_island, "input": _call}[config.ssd_precision]

    def forward(self, x: Tensor) -> Tensor:
        frames, H, W, _ = x.shape
        z, xbc, dt = self.in_proj(x).split(self.splits, dim=-1)
        xbc = causal_conv1d(interleaved_scan(xbc), self.conv1d.weight.squeeze(1), self.conv1d.bias)
        tokens, B, C = F.silu(xbc).split(self.inner_splits, dim=-1)
        y = self.island(
            self.ssd,
            tokens.unflatten(-1, (self.heads, -1)),
            interleaved_scan(dt),
            -self.A_log.float().exp(),
            B.unsqueeze(2),
            C.unsqueeze(2),
            self.D,
            self.dt_bias,
        )
        y = interleaved_unscan(y.flatten(-2).to(z.dtype), frames // 2, H, W)
        return self.out_proj(self.norm(y, z).sum(0).to(z.dtype))


def _call(function, *args):
    return function(*args)


def _initial_dt_bias(heads: int) -> Tensor:
    """The inverse of softplus at time steps drawn log-uniformly from `_DT_RANGE`."""
    low, high = map(math.log, _DT_RANGE)
    dt = torch.empty(heads).uniform_(low, high).exp()
    return dt + torch.log(-torch.expm1(-dt))
