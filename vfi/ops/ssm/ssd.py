"""Mamba-2 recurrence as chunked SSD: a reference in plain PyTorch, and mamba_ssm's Triton kernels.

For every head h with state [P, S], tokens i = 0 … L-1, dt = softplus(raw dt + dt_bias) and A < 0:

    state_i = exp(dt_i * A) * state_{i-1} + dt_i * x_i B_i^T          y_i = state_i C_i + D * x_i

Source: Mamba-2 (arXiv 2405.21060), section 6. Both backends have the signature of `ssd_reference`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vfi.ops.precision import fp32_island
from vfi.ops.triton import tuned_configs
from vfi.ops.triton.availability import UnavailableReason, select_backend

SSD = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
BACKENDS = ("auto", "reference", "mamba_ssm", "fused", "blocked")
# The work inside a chunk grows with its length, and the number of states decreases. The kernels' own default is 256.
REFERENCE_CHUNK = 64
_KERNEL_CHUNK = 256


def ssd_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Return y `[N, L, H, P]` of the recurrence above, in the dtype of `x`, for any L.

    It is computed in fp32, or fp64 for fp64 inputs.

    Args:
        x: `[N, L, H, P]` input. dt: `[N, L, H]` raw step, before bias and softplus. A: `[H]`, negative.
        B, C: `[N, L, G, S]`, where G divides H. D, dt_bias: `[H]`.
    """
    return fp32_island(_ssd_reference, x, dt, A, B, C, D, dt_bias).to(x.dtype)


def _ssd_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    L, H = x.shape[1:3]
    Q = min(REFERENCE_CHUNK, L)
    step = F.softplus(dt + dt_bias)
    # padded tokens come last and have dt = 0: they neither change the state nor are read
    pad = -L % Q
    xdt = _chunks(x * step.unsqueeze(-1), Q, pad)  # [N, K, Q, H, P]
    decay = _chunks(step * A, Q, pad).transpose(2, 3).cumsum(-1)  # [N, K, H, Q]: log of the decay since the chunk's start
    keys, queries = (_chunks(t, Q, pad).repeat_interleave(H // t.shape[2], dim=3) for t in (B, C))  # [N, K, Q, H, S]

    # inside a chunk: y_i = sum_{j <= i} (C_i . B_j) exp(decay_i - decay_j) dt_j x_j
    causal = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~causal, -torch.inf).exp()  # [N, K, H, Q, Q]
    scores = torch.einsum("nkihs,nkjhs->nkhij", queries, keys) * between
    inside = torch.einsum("nkhij,nkjhp->nkihp", scores, xdt)

    # across chunks: the state at the end of each chunk, propagated from chunk to chunk
    to_end = (decay[..., -1:] - decay).exp()  # [N, K, H, Q]
    added = torch.einsum("nkjhs,nkhj,nkjhp->nkhps", keys, to_end, xdt)
    before = _carry(added, decay[..., -1])  # state at the start of each chunk
    across = torch.einsum("nkihs,nkhps,nkhi->nkihp", queries, before, decay.exp())

    y = (inside + across).flatten(1, 2)[:, :L]
    return y + D.unsqueeze(-1) * x


def _chunks(t: Tensor, Q: int, pad: int) -> Tensor:
    """Split [N, L, …] into chunks [N, K, Q, …], with zeros at the end."""
    padding = (0, 0) * (t.dim() - 2) + (0, pad)
    return F.pad(t, padding).unflatten(1, (-1, Q))


def _carry(added: Tensor, decay: Tensor) -> Tensor:
    """Return the state before each chunk from added `[N, K, H, P, S]` and the log decay `[N, K, H]` of each whole chunk."""
    state = torch.zeros_like(added[:, 0])
    before = []
    for new, keep in zip(added.unbind(1), decay.exp().unbind(1), strict=True):
        before.append(state)
        state = state * keep[..., None, None] + new
    return torch.stack(before, dim=1)


def ssd_open(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute `ssd_reference` without a loop over chunks, for a traced network in which the number of tokens is symbolic.

    It uses chunks of chunks: the states are propagated by products with the decays between all chunks of a group, and then
    between all groups, which are few: 18 for two frames of 4096x2304 at stride 8. Inputs and output are fp32.
    """
    L, H = x.shape[1:3]
    Q = REFERENCE_CHUNK
    K = _ceil_div(L, Q)
    step = F.softplus(dt + dt_bias)
    xdt = _open_chunks(x * step.unsqueeze(-1), K, Q)  # [N, K, Q, H, P]
    decay = _open_chunks(step * A, K, Q).cumsum(2)  # [N, K, Q, H]
    keys, queries = (_open_chunks(t, K, Q).repeat_interleave(H // t.shape[2], dim=3) for t in (B, C))  # [N, K, Q, H, S]

    scores = torch.einsum("nkihs,nkjhs->nkhij", queries, keys) * _decay_between(decay)
    inside = torch.einsum("nkhij,nkjhp->nkihp", scores, xdt)

    to_end = (decay[:, :, -1:] - decay).exp().unsqueeze(-1)
    added = torch.einsum("nkjhs,nkjhp->nkhps", keys * to_end, xdt)
    before = _open_carry(added, decay[:, :, -1])
    across = torch.einsum("nkihs,nkhps->nkihp", queries, before) * decay.exp().unsqueeze(-1)
    return (inside + across).flatten(1, 2).narrow(1, 0, L) + D.unsqueeze(-1) * x


def _open_carry(added: Tensor, decay: Tensor) -> Tensor:
    """Compute `_carry` by products."""
    K, Q = added.shape[1], REFERENCE_CHUNK
    groups = _ceil_div(K, Q) + 1  # never 1: tracing would specialise on that
    added = _open_chunks(added, groups, Q)  # [N, groups, Q, H, P, S]
    decay = _open_chunks(decay, groups, Q).cumsum(2)  # [N, groups, Q, H]
    inside = torch.einsum("nghij,ngjhps->ngihps", _decay_between(decay), added)  # after each chunk, from its own group
    between = _decay_between(decay[:, :, -1].cumsum(1).unsqueeze(1)).squeeze(1)  # [N, H, groups, groups]
    before = _one_later(torch.einsum("nhij,njhps->nihps", between, inside[:, :, -1]))  # of each group
    after = inside + before.unsqueeze(2) * decay.exp()[..., None, None]
    return _one_later(after.flatten(1, 2)).narrow(1, 0, K)


def _decay_between(decay: Tensor) -> Tensor:
    """Sum log decays over n positions from a start: [N, K, n, H] -> [N, K, H, n, n], the decay from position j to i >= j."""
    decay, n = decay.transpose(2, 3), decay.shape[2]
    causal = torch.ones(n, n, dtype=torch.bool, device=decay.device).tril()
    return torch.where(causal, decay.unsqueeze(-1) - decay.unsqueeze(-2), -torch.inf).exp()


def _one_later(t: Tensor) -> Tensor:
    """Shift [N, n, H, P, S] by one position: zeros come first, and the last one is dropped."""
    return F.pad(t, (0, 0, 0, 0, 0, 0, 1, 0)).narrow(1, 0, t.shape[1])


def _open_chunks(t: Tensor, K: int, Q: int) -> Tensor:
    """Split into chunks like `_chunks`, with a number of chunks that may be symbolic."""
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, K * Q - t.shape[1])).unflatten(1, (K, Q))


def _ceil_div(n: int, by: int) -> int:
    """Return n / by, rounded up; in this form a product with `by` cancels out if n is symbolic."""
    return (n + by - 1) // by


def ssd_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute `ssd_reference` with mamba_ssm's Triton kernels (states in fp32; a dot of fp32 inputs runs in TF32)."""
    kernel = import_kernel()
    return kernel(x, dt, A, B, C, chunk_size=_KERNEL_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True)


@functools.cache
def import_kernel() -> Callable[..., Tensor]:
    """Return mamba_ssm's function, whose kernels use the fastest configurations for this GPU if they were measured
    (vfi/ops/triton/tuned_configs.py).
    """
    # Read when the kernels are defined: the results of their tuning, which takes minutes, are kept with the compiled kernels.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    with _bare_package("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if torch.cuda.is_available():
        tuned_configs.fill(tuned_configs.tuners(), tuned_configs.entry(torch.device("cuda", torch.cuda.current_device())))
    return mamba_chunk_scan_combined


@contextlib.contextmanager
def _bare_package(name: str) -> Iterator[None]:
    """While active, import parts of a package without running the package's own __init__, unless it is already imported.

    mamba_ssm's __init__ imports transformers, which takes ten seconds, and needs Mamba-1's CUDA extension.
    """
    if name in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"the package {name} is not installed", name=name)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[name]


def ssd_elements(L: int, H: int, P: int, G: int, S: int) -> int:
    """Return the elements of the largest tensor that mamba_ssm's kernels address for one sequence, forward and backward.

    They multiply indices and strides as int32, so a call must stay below 2^31. Per chunk there are products C B^T of every
    group and states of every head; the backward pass has tensors of the same shapes, and splits its sums over heads only
    where there are too few chunks to fill the GPU, far below that limit.
    """
    chunks = math.ceil(L / _KERNEL_CHUNK)
    return max(L * H * P, L * G * S, chunks * G * _KERNEL_CHUNK**2, chunks * H * P * S)


def choose_ssd(backend: str, device: torch.device, cores: Mapping[str, UnavailableReason]) -> tuple[str, SSD | None, str]:
    """Return the name of the backend, its function, and a line that states the choice and the reason.

    `cores` maps the backends that cover more than this recurrence (vfi/ops/ssm/fused_ss2d.py, blocked_ss2d.py), for which the
    function is None, to functions that return why they can't run. A named backend that can't run raises.
    """
    functions: dict[str, SSD] = {"reference": ssd_reference, "mamba_ssm": ssd_mamba_ssm}
    kernels = {"fused": cores["fused"], "mamba_ssm": kernel_obstacle, "blocked": cores["blocked"]}
    name, choice = select_backend("ssd", "ssd_backend", backend, BACKENDS, device, kernels)
    if name == "mamba_ssm":
        known = (
            "kernels tuned"
            if tuned_configs.entry(device)
            else "the first step tunes kernels; `vfi tune-kernels` keeps what is found"
        )
        choice += f"; {tuned_configs.card(device)}: {known}"
    return name, functions.get(name), choice


def kernel_obstacle(device: torch.device) -> str | None:
    """Return why mamba_ssm's Triton kernels can't run on `device`; None if they can."""
    if device.type != "cuda":
        return f"mamba_ssm's kernels need a CUDA GPU and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 7.0, which Triton needs"
    for package in ("mamba_ssm", "triton", "einops"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed; docs/performance.md has the command"
    return None


def mamba1_obstacle() -> str | None:
    """Return why Mamba-1's CUDA extension can't be used, or None. Afterwards `import mamba_ssm` works in either case.

    A mamba_ssm that was built without CUDA lacks that extension, and the package imports it immediately. Mamba-2 does not use
    it, so an empty module replaces it.
    """
    try:
        import selective_scan_cuda
    except ImportError as error:
        selective_scan_cuda = types.ModuleType("selective_scan_cuda", doc=str(error))
        sys.modules["selective_scan_cuda"] = selective_scan_cuda
    if hasattr(selective_scan_cuda, "fwd"):
        return None
    return (
        f"Mamba-1 needs mamba_ssm's extension selective_scan_cuda, which a build with MAMBA_SKIP_CUDA_BUILD lacks "
        f"({selective_scan_cuda.__doc__}); build mamba_ssm with CUDA for it"
    )
