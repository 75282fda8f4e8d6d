"""Core of an SS2D in plain PyTorch, block by block in the processor's cache: the same as vfi/ops/ssm/fused_ss2d.py on a CPU.

    sum over directions of RMSNorm(unscan(ssd(silu(conv(scan(x, B, C))), scan(dt))) * silu(z)) * weight

Everything between the projections is computed for a block of tokens before the next block, so that its intermediate tensors
stay in the cache, and only the states pass from block to block. B and C serve all heads: their products are computed once, and
the states of all heads are one matrix. A reversed direction reads its tokens in their forward order, from the last block to the
first, with the causal mask transposed: nothing is reversed in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.precision import fp32_island
from vfi.ops.ssm.fused_ss2d import Parameters, Shape, check_pixels
from vfi.ops.ssm.scan_order import SCANS

_CHUNK = 32  # tokens whose products with each other are computed; longer chunks cost more products, shorter ones more states
_BLOCK = 512  # tokens: with 128 to 512 channels, the tensors of a block take 0.3 to 1 MB each
_EPS = 1e-5  # of the norm


def blocked_ss2d(projected: Tensor, parameters: Parameters, shape: Shape) -> Tensor:
    """Compute `[2B, H, W, inner]` from projected pixels `[2B, H, W, z | x, B, C | dt]`, frame 0 of all pairs first, same dtype.

    Any H and W. It is computed in fp32, or fp64 for fp64 inputs. With gradients, a whole direction is one block.
    """
    check_pixels("blocked_ss2d", projected, shape)
    return fp32_island(_blocked_ss2d, projected, *parameters, shape=shape).to(projected.dtype)


def blocked_obstacle(device: torch.device, groups: int) -> str | None:
    """Return why `blocked_ss2d` can't or should not run; None if it serves."""
    if device.type != "cpu":
        return f"the blocked form is made for a CPU's cache and the device is {device.type}"
    return "the blocked form has one B and C for all heads (--ssd_groups shared)" if groups != 1 else None


def _blocked_ss2d(projected: Tensor, *tensors: Tensor, shape: Shape) -> Tensor:
    parameters = Parameters(*tensors)
    frames, H, W, _ = projected.shape
    orders = SCANS["interleaved" if shape.together == 2 else "flip"]
    total = None
    for order in (range(1), range(1, 2)):  # rows, then columns
        tokens = orders.scan(projected, order)
        z, features, dt = tokens.split((shape.inner, shape.channels, shape.heads), dim=-1)
        gate, steps = F.silu(z), F.softplus(dt + parameters.dt_bias)
        out = torch.zeros_like(gate)
        for reverse in (False, True):
            _add_direction(out, features, steps, gate, parameters, shape, reverse)
        pixels = orders.unscan(out, frames // 2, H, W, order)[0]
        total = pixels if total is None else total + pixels
    assert total is not None
    return total * parameters.norm_weight


def _add_direction(
    out: Tensor, features: Tensor, steps: Tensor, gate: Tensor, parameters: Parameters, shape: Shape, reverse: bool
) -> None:
    """Add one direction's gated and normalised output to `out` `[n, L, inner]`.

    features `[n, L, x | B | C]` before the convolution, steps `[n, L, heads]`, gate `[n, L, inner]`.
    """
    n, L, _ = features.shape
    block = L if torch.is_grad_enabled() else _BLOCK
    state = features.new_zeros(n, shape.state, shape.inner)
    starts = range(0, L, block)
    for start in reversed(starts) if reverse else starts:
        stop = min(start + block, L)
        convolved = F.silu(_convolve(features, parameters, start, stop, reverse))
        y, state = _scan_block(convolved, steps[:, start:stop], state, parameters, shape, reverse)
        y = y * gate[:, start:stop]
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        out[:, start:stop].addcmul_(y, (norm.square() / shape.inner + _EPS).rsqrt())


def _convolve(tokens: Tensor, parameters: Parameters, start: int, stop: int, reverse: bool) -> Tensor:
    """Convolve the tokens from `start` to `stop` causally: with those before them, or with those behind them in reverse."""
    weights, reach = parameters.conv_weight, parameters.conv_weight.shape[1] - 1
    first, last = (start, stop + reach) if reverse else (start - reach, stop)
    outside = (max(-first, 0), max(last - tokens.shape[1], 0))
    window = tokens[:, max(first, 0) : last]
    if any(outside):
        window = F.pad(window, (0, 0, *outside))
    # as an image of one row, channels last: this form of it is the fastest of those that a CPU has
    pixels, kernel = window.unsqueeze(1).permute(0, 3, 1, 2), (weights.flip(1) if reverse else weights)[:, None, None]
    return F.conv2d(pixels, kernel, parameters.conv_bias, groups=len(weights)).permute(0, 2, 3, 1).squeeze(1)


def _scan_block(
    features: Tensor, steps: Tensor, state: Tensor, parameters: Parameters, shape: Shape, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the outputs `[n, length, inner]` of a block, and the state `[n, state, inner]` after it.

    features `[n, length, x | B | C]` after the convolution, steps `[n, length, heads]`, state `[n, state, inner]` before it.
    """
    length = features.shape[1]
    if pad := -length % _CHUNK:  # padded tokens have a step of 0: they neither change the state nor are read
        features, steps = F.pad(features, (0, 0, 0, pad)), F.pad(steps, (0, 0, 0, pad))
    features, steps = features.unflatten(1, (-1, _CHUNK)), steps.unflatten(1, (-1, _CHUNK))  # [n, K, Q, …]
    x, B, C = features.split((shape.inner, shape.state, shape.state), dim=-1)
    x = x.unflatten(-1, (shape.heads, -1))  # [n, K, Q, heads, head_dim]
    logs = steps * parameters.A  # of the decay at each token
    decays = logs.flip(2).cumsum(2).flip(2) if reverse else logs.cumsum(2)  # since the start of the chunk
    whole = decays[:, :, 0] if reverse else decays[:, :, -1]  # [n, K, heads]

    # inside a chunk: y_i = sum_{j before or at i} (C_i . B_j) exp(decay_i - decay_j) dt_j x_j
    inputs = x * steps.unsqueeze(-1)
    by_head = decays.transpose(2, 3)
    pairs = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=x.device)
    hidden = pairs.tril(-1) if reverse else pairs.triu(1)
    between = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).masked_fill_(hidden, -torch.inf).exp_()
    scores = between * (C @ B.transpose(-1, -2)).unsqueeze(2)  # [n, K, heads, Q, Q]
    inside = (scores @ inputs.transpose(2, 3)).transpose(2, 3)

    # across chunks: the states of all heads, concatenated to one matrix, are propagated from chunk to chunk
    to_end = (whole.unsqueeze(2) - decays).exp()
    added = B.transpose(-1, -2) @ (inputs * to_end.unsqueeze(-1)).flatten(-2)  # [n, K, state, inner]
    kept = whole.exp().repeat_interleave(x.shape[-1], dim=-1).unsqueeze(2)  # [n, K, 1, inner]
    before, state = _carry(state, added, kept, reverse)
    across = (C @ before).unflatten(-1, (shape.heads, -1))

    y = torch.addcmul(inside, across, decays.exp().unsqueeze(-1))
    y = torch.addcmul(y, x, parameters.D.unsqueeze(-1))
    return y.flatten(-2).flatten(1, 2)[:, :length], state


def _carry(state: Tensor, added: Tensor, kept: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the states before each chunk, `[n, K, state, inner]` as `added` by each, and the state after all of them."""
    K = added.shape[1]
    order = range(K - 1, -1, -1) if reverse else range(K)
    if torch.is_grad_enabled():
        each = [state] * K
        for chunk in order:
            each[chunk] = state
            state = torch.addcmul(added[:, chunk], state, kept[:, chunk])
        return torch.stack(each, dim=1), state
    states = added.new_empty(added.shape[0], K + 1, *added.shape[2:])
    before, after = (states[:, 1:], states[:, :-1]) if reverse else (states[:, :-1], states[:, 1:])
    before[:, order[0]] = state
    for chunk in order:
        torch.addcmul(added[:, chunk], before[:, chunk], kept[:, chunk], out=after[:, chunk])
    return before, after[:, order[-1]]
