"""Mamba-1 recurrence: a reference in plain PyTorch, and mamba_ssm's CUDA kernel.

For every channel d with state [S], tokens i = 0 … L-1, dt = softplus(raw dt + dt_bias) and A < 0:

    state_i = exp(dt_i * A) * state_{i-1} + dt_i * x_i B_i          y_i = state_i . C_i + D * x_i

Source: Mamba (arXiv 2312.00752), section 3. Both backends have the signature of `selective_scan_reference`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vfi.ops.precision import fp32_island
from vfi.ops.ssm.ssd import BACKENDS, kernel_obstacle, mamba1_obstacle
from vfi.ops.triton.availability import select_backend

SelectiveScan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# States that the reference computes at once, N * L * D * S, in each of about eight tensors: what fits into a CPU's cache is
# twice as fast there; a GPU needs fewer and larger pieces (128 MiB per tensor in fp32).
_SLICE = {"cpu": 2**20, "cuda": 2**25}
# The kernel keeps the state of every channel at the end of each stretch of this length, and equally many decays.
_KERNEL_CHUNK = 2048


def selective_scan_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Return y `[N, L, D]` of the recurrence above, in the dtype of `x`, for any L.

    It is computed in fp32, or fp64 for fp64 inputs.

    Args:
        x: `[N, L, D]` input. dt: `[N, L, D]` raw step, before bias and softplus. A: `[D, S]`, negative.
        B, C: `[N, L, S]`. D, dt_bias: `[D]`.

    Nothing of size N * L * D * S is kept: rows and channels are processed in slices, and the backward pass recomputes them.
    """
    return fp32_island(_selective_scan_reference, x, dt, A, B, C, D, dt_bias).to(x.dtype)


def _selective_scan_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    N, L, channels = x.shape
    step = F.softplus(dt + dt_bias)
    xdt = x * step
    states = L * A.shape[1]  # of one channel
    at_once = _SLICE.get(x.device.type, _SLICE["cuda"]) // states
    width = max(1, min(channels, at_once))
    height = max(1, min(N, at_once // width))
    rows = []
    for n in range(0, N, height):
        row = slice(n, n + height)
        columns = (slice(d, d + width) for d in range(0, channels, width))
        rows.append(torch.cat([_slice(xdt[row, :, d], step[row, :, d], A[d], B[row], C[row]) for d in columns], dim=-1))
    return torch.cat(rows) + D * x


def _slice(xdt: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return the sum over S of the states times C, for some of the rows and channels: `[n, L, d]`."""
    return checkpoint(_read_states, xdt, step, A, B, C, use_reentrant=False, preserve_rng_state=False)


def _read_states(xdt: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    states = _Recurrence.apply(step.unsqueeze(-1) * A, xdt.unsqueeze(-1) * B.unsqueeze(2))
    return torch.einsum("nlds,nls->nld", states, C)


class _Recurrence(torch.autograd.Function):
    """Compute h_i = exp(log_decay_i) * h_{i-1} + added_i along dimension 1 of two `[n, L, d, S]` tensors, from h_{-1} = 0.

    The gradient is the same recurrence from the last token to the first: g_i = dh_i + exp(log_decay_{i+1}) * g_{i+1}.
    """

    @staticmethod
    def forward(ctx: Any, log_decay: Tensor, added: Tensor) -> Tensor:
        h = _recurrence(log_decay, added)
        ctx.save_for_backward(log_decay, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        log_decay, h = ctx.saved_tensors
        # decay_{i+1} belongs to token i; nothing follows the last token, so its decay is arbitrary
        following = log_decay.roll(-1, dims=1).flip(1)
        g = _recurrence(following, gradients[0].flip(1)).flip(1)
        d_log_decay = g * log_decay.exp()
        d_log_decay[:, 1:] *= h[:, :-1]
        d_log_decay[:, 0] = 0
        return d_log_decay, g


def _recurrence(log_decay: Tensor, added: Tensor) -> Tensor:
    """Compute chunks of about sqrt(L) tokens: position by position in all chunks at once, then from chunk to chunk."""
    L = added.shape[1]
    Q = math.isqrt(L - 1) + 1
    # padded tokens come last: nothing reads them
    log_decay, added = (F.pad(t, (0, 0, 0, 0, 0, -L % Q)).unflatten(1, (-1, Q)) for t in (log_decay, added))
    decay = log_decay.exp()
    h = added.clone()  # [n, K, Q, d, S]
    for i in range(1, Q):
        h[:, :, i].addcmul_(decay[:, :, i], h[:, :, i - 1])
    since_start = log_decay.cumsum(2).exp_()
    before = torch.zeros_like(h[:, :, 0])  # state before each chunk
    for k in range(1, h.shape[1]):
        torch.addcmul(h[:, k - 1, -1], since_start[:, k - 1, -1], before[:, k - 1], out=before[:, k])
    return h.addcmul_(since_start, before.unsqueeze(2)).flatten(1, 2)[:, :L]


def selective_scan_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute `selective_scan_reference` with mamba_ssm's CUDA kernel (states in fp32)."""
    kernel = _import_kernel()
    x, dt, B, C = (t.transpose(1, 2).contiguous() for t in (x, dt, B, C))  # the kernel takes channels before tokens
    return kernel(x, dt, A, B, C, D, delta_bias=dt_bias, delta_softplus=True).transpose(1, 2)


@functools.cache
def _import_kernel() -> Callable[..., Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


def selective_scan_elements(L: int, D: int, S: int) -> int:
    """Return the elements of the largest tensor that the kernel addresses for one sequence (with 32-bit indices)."""
    return max(L * D, math.ceil(L / _KERNEL_CHUNK) * D * 2 * S)


def choose_selective_scan(backend: str, device: torch.device) -> tuple[SelectiveScan, str]:
    """Return the function for a backend name, and a line that states the choice and the reason.

    A named backend that can't run raises.
    """
    functions = {"reference": selective_scan_reference, "mamba_ssm": selective_scan_mamba_ssm}
    kernels = {"mamba_ssm": _kernel_obstacle}
    name, choice = select_backend("selective_scan", "ssd_backend", backend, BACKENDS, device, kernels)
    return functions[name], choice


def _kernel_obstacle(device: torch.device) -> str | None:
    return kernel_obstacle(device) or mamba1_obstacle()
