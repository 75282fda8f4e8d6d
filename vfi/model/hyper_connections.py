"""Residual connections of a block: a plain sum, or n residual streams with learned mixing.

    X [2B, H, W, n, C]   ->   X' = H_res X + sum over branches b of H_post[b]^T F_b(H_pre X)

| mixing   | H_pre   | H_post    | H_res                                                                        |
| -------- | ------- | --------- | ---------------------------------------------------------------------------- |
| none     | one stream: x + sum of F_b(x)                                                                      |
| hc       | free    | free      | free; Hyper-Connections, arXiv 2409.19606                                    |
| mhc      | sigmoid | 2 sigmoid | Sinkhorn: approximately doubly stochastic; mHC, arXiv 2512.24880             |
| mhc_lite | sigmoid | 2 sigmoid | weighted mean of all n! permutations: exactly so; mHC-lite, arXiv 2601.05732 |

Every mixing starts close to the plain block. A stage begins with n copies of its input and ends with the mean of the
streams. The first H_res of a stage (its input is copies) and the last one (only the mean follows) therefore change nothing
while they are doubly stochastic: H_res has an effect only with two or more blocks in a stage.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vfi.config.configs import ModelConfig
from vfi.ops.precision import fp32_island

Sublayer = Callable[[Tensor], Iterable[Tensor]]  # [2B, H, W, C] -> the output of each branch, of the same shape

_GATE = 0.01  # initial gate of the dynamic part
_SKIP_LEAK = 0.01  # initially no element of H_res differs from the identity's by more than this
_READ_LEAK = 0.03  # initial weight of H_pre for all the other streams together
_EPS = 1e-6


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Normalise the columns and rows of exp(logits [..., n, n]) `iterations` times: close to doubly stochastic.

    Rows are normalised last and sum to 1 up to rounding, so that equal streams stay equal. Columns sum to 1 in the limit, which
    wide logits approach slowly: after 20 iterations on normal logits, the worst of 2000 4x4 matrices is off by 2e-7 at spread
    0.5, 1e-5 at 1 and 3e-2 at 2. The computation is in logarithms, so values and gradients stay finite for logits of any width.
    """
    for _ in range(iterations):
        logits = logits.log_softmax(-2).log_softmax(-1)
    return logits.exp()


def permutation_mixture(logits: Tensor, permutations: Tensor) -> Tensor:
    """Return sum_k softmax(logits [..., n!])_k P_k over `permutations` [n!, n, n]: doubly stochastic up to rounding."""
    return (logits.softmax(-1) @ permutations.flatten(1).to(logits.dtype)).unflatten(-1, permutations.shape[1:])


class FreeMatrices(nn.Module):
    """hc: every coefficient is static + gate * tanh(dynamic). It starts at a one-hot H_pre, H_post = 1 and H_res = I."""

    def __init__(self, streams: int, sinkhorn_iterations: int) -> None:
        super().__init__()
        self.streams = streams
        self.width = streams**2  # logits of H_res

    def bounded(self, dynamic: Tensor) -> Tensor:
        return dynamic.tanh()

    def read(self, logits: Tensor) -> Tensor:
        return logits

    def write(self, logits: Tensor) -> Tensor:
        return logits

    def skip(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.streams, self.streams))

    def start(self, reads: int, branches: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return static logits of H_pre [n] (which reads stream `reads`), H_post [branches * n] and H_res [width]."""
        identity = torch.eye(self.streams)
        return identity[reads], torch.ones(branches * self.streams), identity.flatten()


class SinkhornMatrices(FreeMatrices):
    """mhc: H_pre = sigmoid, H_post = 2 sigmoid, H_res = Sinkhorn. H_res starts with 1 - _SKIP_LEAK on its diagonal."""

    def __init__(self, streams: int, sinkhorn_iterations: int) -> None:
        super().__init__(streams, sinkhorn_iterations)
        self.iterations = sinkhorn_iterations

    def bounded(self, dynamic: Tensor) -> Tensor:
        return dynamic

    def read(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def write(self, logits: Tensor) -> Tensor:
        return 2 * logits.sigmoid()

    def skip(self, logits: Tensor) -> Tensor:
        return sinkhorn(logits.unflatten(-1, (self.streams, self.streams)), self.iterations)

    def start(self, reads: int, branches: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return static logits of H_pre [n] (which mostly reads stream `reads`), H_post [branches * n] and H_res [width]."""
        read = torch.full((self.streams,), _READ_LEAK / (self.streams - 1))
        read[reads] = 1 - _READ_LEAK
        return read.logit(), torch.zeros(branches * self.streams), self._start_skip()

    def _start_skip(self) -> Tensor:
        return _dominant_logit(self.streams) * torch.eye(self.streams).flatten()


class PermutationMatrices(SinkhornMatrices):
    """mhc_lite: as mhc, but H_res is a weighted mean of all permutations; the identity's weight starts at 1 - _SKIP_LEAK."""

    permutations: Tensor

    def __init__(self, streams: int, sinkhorn_iterations: int) -> None:
        super().__init__(streams, sinkhorn_iterations)
        orders = torch.tensor(list(itertools.permutations(range(streams))))  # the identity comes first
        self.register_buffer("permutations", torch.eye(streams)[orders], persistent=False)
        self.width = len(orders)

    def skip(self, logits: Tensor) -> Tensor:
        return permutation_mixture(logits, self.permutations)

    def _start_skip(self) -> Tensor:
        logits = torch.zeros(self.width)
        logits[0] = _dominant_logit(self.width)
        return logits


def _dominant_logit(count: int) -> float:
    """Return the logit whose softmax among `count` - 1 zeros is 1 - _SKIP_LEAK."""
    return math.log((count - 1) * (1 - _SKIP_LEAK) / _SKIP_LEAK)


def _every_token(x: Tensor) -> Tensor:
    return x


def _frame_mean(x: Tensor) -> Tensor:
    return x.mean((1, 2), keepdim=True)


class MixingCoefficients(nn.Module):
    """Compute H_pre [..., n], H_post [..., branches, n] and H_res [..., n, n] from streams [2B, H, W, n, C], always in fp32.

    ... is 2B, H, W, or 2B, 1, 1 with pooled coefficients. A linear map of the RMS-normalised state (all streams of a token, or
    of the mean token) gives the dynamic part; each of the three groups has a gate for it, and a static part. Autocast has no
    influence on the precision.
    """

    annealing: Tensor

    def __init__(self, dim: int, branches: int, index: int, config: ModelConfig) -> None:
        super().__init__()
        streams = config.mixing_streams
        self.index = index
        self.state = {"token": _every_token, "pooled": _frame_mean}[config.mixing_coefficients]
        kinds: dict[str, type[FreeMatrices]] = {"hc": FreeMatrices, "mhc": SinkhornMatrices, "mhc_lite": PermutationMatrices}
        self.kind = kinds[config.mixing](streams, config.sinkhorn_iterations)
        self.shapes: tuple[tuple[int, ...], ...] = ((streams,), (branches, streams), (self.kind.width,))
        self.sizes = [math.prod(shape) for shape in self.shapes]
        # The mixings of a stage read different streams. With equal reads and writes, the streams, which are equal at the start
        # of a stage, would get equal gradients and, apart from rounding, stay equal for ever.
        self.static = nn.Parameter(torch.cat(self.kind.start(index % streams, branches)))
        self.gates = nn.Parameter(torch.full((3,), _GATE))
        # zeros: initially only the static part counts (and no random number is drawn, so that the rest of the network is
        # initialised as it is without mixing)
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes), streams * dim))
        # saved with the weights, because they are trained with this factor
        self.register_buffer("annealing", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return fp32_island(self._coefficients, x, self.weight, self.static, self.gates, self.annealing)

    def _coefficients(
        self, x: Tensor, weight: Tensor, static: Tensor, gates: Tensor, annealing: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state(x).flatten(-2)
        dynamic = self.kind.bounded(F.linear(F.rms_norm(state, state.shape[-1:], eps=_EPS), weight))
        read, write, skip = (
            (part + gate * change).unflatten(-1, shape)
            for part, gate, change, shape in zip(
                static.split(self.sizes), gates, dynamic.split(self.sizes, dim=-1), self.shapes, strict=True
            )
        )
        mixing = self.kind.skip(skip)
        identity = torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
        # exact at both ends: the learned matrix at 0, the identity at 1
        return self.kind.read(read), self.kind.write(write), (1 - annealing) * mixing + annealing * identity


class PlainResidual(nn.Module):
    """none: x + the sum of the branch outputs."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        for output in sublayer(x):
            x = x + output
        return x


class HyperConnections(nn.Module):
    """Update streams [2B, H, W, n, C]: one read, then the mixed streams plus one weighted write for each branch."""

    def __init__(self, dim: int, branches: int, index: int, config: ModelConfig) -> None:
        super().__init__()
        self.coefficients = MixingCoefficients(dim, branches, index, config)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        # Recomputed in the backward pass: the intermediate results of forty normalisations take several times the memory of the
        # streams.
        read, write, skip = checkpoint(self.coefficients, x, use_reentrant=False, preserve_rng_state=False)
        outputs = tuple(sublayer(_weighted_sum(read, x).to(x.dtype)))
        # Products of fp32 coefficients and half-precision streams are summed in fp32 without keeping an fp32 copy of the
        # streams for the backward pass; and as they are not matrix products, they are exact where H_res is the identity, even
        # with TF32 allowed.
        rows = []
        for stream in range(x.shape[-2]):
            row = _weighted_sum(skip[..., stream, :], x)
            for branch, output in enumerate(outputs):
                row = row + write[..., branch, stream, None] * output
            rows.append(row.to(x.dtype))
        return torch.stack(rows, dim=-2)


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Sum x [..., n, C] over n with weights [..., n]: [..., C]."""
    return (weights.unsqueeze(-1) * x).sum(-2)


def residual_mixing(dim: int, branches: int, index: int, config: ModelConfig) -> nn.Module:
    """Return the mixing of a sub-layer with `branches` branches, the `index`-th mixing of its stage (from 0)."""
    if config.mixing == "none":
        return PlainResidual()
    return HyperConnections(dim, branches, index, config)


def stage_ends(config: ModelConfig) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the functions that open a stage's streams from its input and close them to its output, both [2B, H, W, C]."""
    if config.mixing == "none":
        return _every_token, _every_token
    return functools.partial(_copies, streams=config.mixing_streams), _stream_mean


def _copies(x: Tensor, streams: int) -> Tensor:
    return x.unsqueeze(-2).expand(*x.shape[:-1], streams, x.shape[-1])  # a view: copies take no memory


def _stream_mean(x: Tensor) -> Tensor:
    return x.mean(-2)


def set_annealing(model: nn.Module, value: float) -> None:
    """Set every H_res of `model` to (1 - value) * H_res + value * I; 0: as learned, 1: the identity.

    Call it between two steps only: a backward pass recomputes its coefficients, with the factor at that moment. Raises
    ValueError outside 0 … 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"the annealing factor is {value}; it must be between 0 and 1")
    for module in model.modules():
        if isinstance(module, MixingCoefficients):
            module.annealing.fill_(value)


def annealing_factor(model: nn.Module) -> float:
    """Return the largest annealing factor of `model`; 0 without mixing."""
    factors = [module.annealing.item() for module in model.modules() if isinstance(module, MixingCoefficients)]
    return max(factors, default=0.0)


class MixingRecord(NamedTuple):
    """State of one mixing in the last forward pass."""

    place: int
    """Position among the mixings of its stage; 0 begins a stage."""
    mean: Tensor
    """[n, n] H_res, averaged over tokens and frames."""
    row_error: Tensor
    """[] largest |row sum - 1| of H_res over all tokens."""
    column_error: Tensor
    """[] largest |column sum - 1|, likewise."""
    annealing: Tensor
    """[] the annealing factor."""


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, MixingRecord]]:
    """While active, store a MixingRecord of every mixing at each forward pass of `model`, by name, in order of use.

    with recording(model) as records:
        model(img0, img1, timestep)
    mixing_report(records)
    """
    records: dict[str, MixingRecord] = {}
    handles = [
        module.register_forward_hook(functools.partial(_record, records, name))
        for name, module in model.named_modules()
        if isinstance(module, MixingCoefficients)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _record(records: dict[str, MixingRecord], name: str, module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
    assert isinstance(module, MixingCoefficients)
    skip = output[2].detach().flatten(0, -3)
    row_error, column_error = ((skip.sum(dim) - 1).abs().max() for dim in (-1, -2))
    records[name] = MixingRecord(module.index, skip.mean(0), row_error, column_error, module.annealing.clone())


def mixing_report(records: dict[str, MixingRecord]) -> dict[str, float]:
    """Return the worst row- and column-sum error, the largest composite gain of a stage and the annealing factor.

    Empty without mixing. Composite gain: the largest absolute row or column sum of the product of all H_res (their means over
    tokens) from the start of a stage up to any of its mixings; it bounds how much the skip path amplifies signals and
    gradients.
    """
    if not records:
        return {}
    gain, product = 0.0, torch.empty(0)
    for record in records.values():
        matrix = record.mean.double().cpu()
        product = matrix if record.place == 0 else matrix @ product
        gain = max(gain, *(product.abs().sum(dim).max().item() for dim in (0, 1)))
    return {
        "row_error": max(record.row_error.item() for record in records.values()),
        "column_error": max(record.column_error.item() for record in records.values()),
        "gain": gain,
        "annealing": max(record.annealing.item() for record in records.values()),
    }
