"""Branch A of an LGS block: global context from both frames, by Mamba-2 (or Mamba-1) over four scan directions.

The reference runs one Mamba over four reordered copies of the tokens. `in_proj` and the gate act on each token alone and
`out_proj` is linear, so here the projection is computed once for each pixel, its output is reordered, the gate is applied
after the inverse reordering, and the four directions are summed before `out_proj`: the same results for a quarter of the
projection work. Everything between the two projections is one operator, on a GPU (vfi/ops/ssm/fused_ss2d.py) and on a CPU
(vfi/ops/ssm/blocked_ss2d.py).
Parameters have the names of `mamba_ssm.Mamba2` and `mamba_ssm.Mamba`, which differ in nothing else here.
Sources: Mamba-2 (arXiv 2405.21060), Mamba (arXiv 2312.00752), VFIMamba (arXiv 2407.02315).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.config.configs import ModelConfig
from vfi.ops.precision import fp32_island
from vfi.ops.ssm.blocked_ss2d import blocked_obstacle, blocked_ss2d
from vfi.ops.ssm.causal_conv1d import causal_conv1d
from vfi.ops.ssm.fused_ss2d import Parameters, Shape, fused_ss2d, ss2d_obstacle
from vfi.ops.ssm.scan_order import ALL, SCANS
from vfi.ops.ssm.selective_scan import choose_selective_scan, selective_scan_elements
from vfi.ops.ssm.ssd import choose_ssd, ssd_elements

# The kernels index the elements of a tensor by int32: the four directions are processed in one call if they fit.
MAX_ELEMENTS = 2**31
# Without gradients nothing is kept between the directions, so processing fewer at a time saves memory: 1 GiB of fp32 for the
# largest tensor.
LEAN_ELEMENTS = 2**28
_DT_RANGE = (1e-3, 1e-1)  # range of the initial time steps, log-uniform, as in Mamba
_CONV_KERNEL = 4


def pairs_at_once(one: int, pairs: int) -> int:
    """Return how many pairs fit into one call, if one scan direction of one pair has `one` elements.

    Raises ValueError if a single pair does not fit.
    """
    if one > MAX_ELEMENTS:
        raise ValueError(
            f"the scan of one pair in one order has a tensor of {one} elements, more than the kernels can address "
            f"({MAX_ELEMENTS}): use smaller frames, --ssd_groups shared, or a smaller --expand or --d_state"
        )
    return min(pairs, MAX_ELEMENTS // one)


def orders_at_once(one: int, gradients: bool) -> int:
    """Return how many directions (4, 2 or 1) go into one call, if one direction of all pairs has `one` elements."""
    limit = MAX_ELEMENTS if gradients else LEAN_ELEMENTS
    return next((orders for orders in (4, 2) if orders * one <= limit), 1)


class SS2D(nn.Module):
    """Scan [2B, H, W, C], frame 0 of all pairs first -> the same shape. Base of both kinds; build one with `ss2d`."""

    splits: tuple[int, ...]
    """Widths of the parts into which the output of `in_proj` is split; the parts are the arguments of `_scan_orders`."""
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    out_proj: nn.Linear

    def __init__(self, dim: int, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.scan = SCANS[config.scan]
        self.island = _call if config.ssd_precision == "input" else fp32_island

    def forward(self, x: Tensor) -> Tensor:
        frames, H, W, _ = x.shape
        pairs = frames // 2
        one = self.scan.sequences * self.elements(2 * H * W // self.scan.sequences)
        step = pairs_at_once(one, pairs)
        gradients = torch.is_grad_enabled()
        parts = [
            self.some_pairs(part.flatten(0, 1), orders_at_once(one * part.shape[1], gradients)).unflatten(0, (2, -1))
            for part in x.unflatten(0, (2, pairs)).split(step, dim=1)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1) if len(parts) > 1 else parts[0].flatten(0, 1)

    def elements(self, tokens: int) -> int:
        """Return the elements of the largest tensor that a sequence of `tokens` tokens needs in one direction."""
        raise NotImplementedError

    def some_pairs(self, x: Tensor, orders: int) -> Tensor:
        """Apply the layer to as many pairs as fit into one call, `orders` directions at once."""
        pixels = self.in_proj(x).split(self.splits, dim=-1)
        sums = (self._scan_orders(*pixels, orders=ALL[k : k + orders]) for k in range(0, len(ALL), orders))
        return self.out_proj(functools.reduce(torch.add, sums).to(pixels[0].dtype))

    def _scan_orders(self, *pixels: Tensor, orders: range) -> Tensor:
        """Scan parts of projected pixels `[2B, H, W, …]`: gated output `[2B, H, W, inner]`, summed over these directions."""
        raise NotImplementedError

    def _unscan(self, y: Tensor, like: Tensor, orders: range) -> Tensor:
        """Reorder [sequences, L, inner] back to [orders, 2B, H, W, inner] in the dtype of `like [2B, H, W, …]`."""
        frames, H, W, _ = like.shape
        return self.scan.unscan(y.to(like.dtype), frames // 2, H, W, orders)

    def _convolved(self, x: Tensor, orders: range) -> Tensor:
        """Reorder x and apply the short causal convolution and SiLU: [sequences, L, channels]."""
        return F.silu(causal_conv1d(self.scan.scan(x, orders), self.conv1d.weight.squeeze(1), self.conv1d.bias))


class Mamba2SS2D(SS2D):
    """SSD: heads of `head_dim` channels with one decay each; B and C are shared by all heads, or one for each (per_head).

    With xb_share k > 1, x and B are computed for heads / k, and each serves k heads (d_xb of MaTVLM plan C).
    """

    def __init__(self, dim: int, config: ModelConfig, device: torch.device) -> None:
        super().__init__(dim, config, device)
        inner = config.expand * dim
        self.head_dim, self.state, self.share = config.head_dim, config.d_state, config.xb_share
        self.heads = inner // config.head_dim
        self.groups = {"shared": 1, "per_head": self.heads}[config.ssd_groups]
        self.inner_splits = (inner // self.share, self.groups // self.share * self.state, self.groups * self.state)  # x, B, C
        channels = sum(self.inner_splits)
        self.splits = (inner, channels, self.heads)  # z | x, B, C | dt
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False)
        self.conv1d = _conv1d(channels)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.heads))
        self.norm = GatedRMSNorm(inner, self.groups)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        cores = {
            "fused": lambda device: ss2d_obstacle(device, self.head_dim, self.state, self.groups),
            "blocked": lambda device: blocked_obstacle(device, self.groups),
        }
        name, self.ssd, self.choice = choose_ssd(config.ssd_backend, device, cores)
        self.core = blocked_ss2d if name == "blocked" else fused_ss2d
        together = 2 // self.scan.sequences
        self.shape = Shape(self.heads, config.head_dim, config.d_state, together, config.ssd_precision)

    def forward(self, x: Tensor) -> Tensor:
        if self.ssd is not None:
            return super().forward(x)
        A = -self.A_log.float().exp()
        conv_weight, conv_bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        assert conv_bias is not None
        parameters = Parameters(conv_weight, conv_bias, A, self.D, self.dt_bias, self.norm.weight)
        y: Tensor = self.out_proj(self.core(self.in_proj(x), parameters, self.shape))
        return y

    def elements(self, tokens: int) -> int:
        inside = ssd_elements(tokens, self.heads, self.head_dim, self.groups, self.state)
        return max(inside, tokens * sum(self.inner_splits))

    def _scan_orders(self, *pixels: Tensor, orders: range) -> Tensor:
        assert self.ssd is not None, "the fused and the blocked form take whole pixels"
        z, xbc, dt = pixels
        x, B, C = self._convolved(xbc, orders).split(self.inner_splits, dim=-1)
        y = self.island(
            self.ssd,
            _repeat(x.unflatten(-1, (-1, self.head_dim)), self.share),
            self.scan.scan(dt, orders),
            -self.A_log.float().exp(),
            _repeat(B.unflatten(-1, (-1, self.state)), self.share),
            C.unflatten(-1, (-1, self.state)),
            self.D,
            self.dt_bias,
        )
        return self.norm(self._unscan(y.flatten(-2), z, orders), z).sum(0)


class Mamba1SS2D(SS2D):
    """Selective scan: every channel has its own time step and decays.

    It has no norm, so the gate multiplies the sum over the directions.
    """

    def __init__(self, dim: int, config: ModelConfig, device: torch.device) -> None:
        super().__init__(dim, config, device)
        inner, self.state = config.expand * dim, config.d_state
        rank = math.ceil(dim / 16)
        self.splits = (inner, inner)  # x | z
        self.inner_splits = (rank, self.state, self.state)  # dt, B, C
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False)
        self.conv1d = _conv1d(inner)
        self.x_proj = nn.Linear(inner, sum(self.inner_splits), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias = nn.Parameter(_initial_dt_bias(inner))
        self.A_log = nn.Parameter(torch.arange(1.0, self.state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.selective_scan, self.choice = choose_selective_scan(config.ssd_backend, device)

    def elements(self, tokens: int) -> int:
        inner = self.splits[0]
        return max(selective_scan_elements(tokens, inner, self.state), tokens * sum(self.inner_splits))

    def _scan_orders(self, *pixels: Tensor, orders: range) -> Tensor:
        x, z = pixels
        x = self._convolved(x, orders)
        dt, B, C = self.x_proj(x).split(self.inner_splits, dim=-1)
        y = self.island(
            self.selective_scan,
            x,
            F.linear(dt, self.dt_proj.weight),  # the scan adds the bias in its own precision
            -self.A_log.float().exp(),
            B,
            C,
            self.D,
            self.dt_proj.bias,
        )
        return self._unscan(y, z, orders).sum(0) * F.silu(z)


def ss2d(dim: int, config: ModelConfig, device: torch.device) -> SS2D:
    """Return the SS2D of config.ssm for `dim` channels."""
    kinds: dict[str, type[SS2D]] = {"mamba2": Mamba2SS2D, "mamba1": Mamba1SS2D}
    return kinds[config.ssm](dim, config, device)


class GatedRMSNorm(nn.Module):
    """Compute RMSNorm(y * silu(z)) * weight over each of `groups` equal parts of the last dimension, in fp32."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.groups = groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return fp32_island(_gated_rms_norm, y, z, self.weight, self.groups)


def _gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int) -> Tensor:
    y = y * F.silu(z)
    if groups == 1:
        return F.rms_norm(y, weight.shape, weight, eps=1e-5)  # one fused kernel
    parts = y.unflatten(-1, (groups, -1))
    return F.rms_norm(parts, parts.shape[-1:], eps=1e-5).flatten(-2) * weight


def _call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _repeat(t: Tensor, times: int) -> Tensor:
    """Repeat every head of [N, L, heads, width] `times` times in a row; a view if times is 1."""
    return t.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


def _conv1d(channels: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, _CONV_KERNEL, groups=channels, padding=_CONV_KERNEL - 1)


def _initial_dt_bias(size: int) -> Tensor:
    """Return the inverse of softplus of time steps drawn log-uniformly from `_DT_RANGE`."""
    low, high = map(math.log, _DT_RANGE)
    dt = torch.empty(size).uniform_(low, high).exp()
    return dt + torch.log(-torch.expm1(-dt))
