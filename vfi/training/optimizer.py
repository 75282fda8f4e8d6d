"""AdamW and Muon, their parameter groups, and the schedule of the learning rate: linear warm-up, then cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfi.config.configs import OptimConfig
from vfi.runtime.cuda_graphs import CapturedCall

_NO_DECAY = ("A_log", "D", "dt_bias")
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, chosen for the steepest slope at zero
_ITERATIONS = 5
_GRID = (128, 512)  # rows and columns of a matrix are padded to multiples of these
_CAPTURE_MEMORY = 8  # times the bytes of the gradients: copies, updates, padded matrices and their products
_RMS = 0.2  # root mean square of a Muon update per unit of the learning rate, about that of AdamW


class Muon(torch.optim.AdamW):
    """Muon for groups with `orthogonal=True`, AdamW for the others: one optimizer, one state dict.

    The momentum of a weight `[out, …]`, seen as a matrix `[out, rest]`, is replaced by the nearest semi-orthogonal matrix, so
    that an update changes no direction of the input by more than any other. It is scaled to a root mean square of 0.2 · lr, so
    that learning rates and weight decay are those of AdamW. Sources: K. Jordan, "Muon: An optimizer for hidden layers in neural
    networks" (2024); scale: "Muon is Scalable for LLM Training" (arXiv 2502.16982).

    `found_inf`, a tensor on the device as fused AdamW takes it from a loss scaler: where it is 1, nothing changes.
    """

    captures = False
    """Whether the update of matrices, a thousand small kernels, is captured as a CUDA graph: weights must stay in place."""
    _captured: tuple[Hashable, CapturedCall | None] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights by their gradients. A closure is not supported and raises ValueError."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients first, then call step()")
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                self._orthogonal_step(group)
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:  # "step" is not used here, but AdamW's load_state_dict needs it
                self.state[parameter].update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter))
        averages, decay = [self.state[parameter]["exp_avg"] for parameter in parameters], group["weight_decay"]

        def update(lr: Tensor, kept: Tensor, *gradients: Tensor) -> Tensor:
            _orthogonal_update(parameters, gradients, averages, lr, decay, kept)
            return lr

        found_inf: Tensor | None = getattr(self, "found_inf", None)
        lr = parameters[0].new_full((), group["lr"])
        kept = torch.ones_like(lr) if found_inf is None else (found_inf == 0).to(lr).reshape(())
        inputs = (lr, kept, *(parameter.grad for parameter in parameters if parameter.grad is not None))
        key = (decay, *(tensor.data_ptr() for tensor in (*parameters, *averages)))
        if not self.captures:
            update(*inputs)
        elif self._captured is None or self._captured[0] != key:  # the first call selects kernels and settles memory use
            self._captured = key, None
            update(*inputs)
        elif captured := self._captured[1] or _capture(update, inputs):
            self._captured = key, captured
            captured(inputs)
        else:
            update(*inputs)


def _capture(update: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> CapturedCall | None:
    """Capture an update, or return None where memory is short: CUDA does not recover when it runs out during a capture."""
    torch.cuda.empty_cache()
    needed = _CAPTURE_MEMORY * sum(tensor.nbytes for tensor in inputs)
    return CapturedCall(update, inputs) if torch.cuda.mem_get_info(inputs[0].device)[0] > needed else None


def _orthogonal_update(
    parameters: list[Tensor],
    gradients: Sequence[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    weight_decay: float,
    kept: Tensor,
) -> None:
    """Update parameters `[out, …]` and the averages of their gradients; with `kept` 0 instead of 1, change nothing.

    `lr` and `kept` are scalars on the device, so that each replay of a CUDA graph reads them.
    """
    # a gradient with non-finite numbers must not touch anything, not even multiplied by zero
    finite = [torch.where(kept > 0, gradient, average) for gradient, average in zip(gradients, averages, strict=True)]
    torch._foreach_lerp_(averages, finite, 1 - _MOMENTUM)
    torch._foreach_mul_(parameters, 1 - kept * lr * weight_decay)
    updates = torch._foreach_lerp(finite, averages, _MOMENTUM)
    torch._foreach_mul_(updates, kept)  # zeros stay zeros when they are orthogonalised
    for parameter, update in zip(parameters, orthogonalized(updates), strict=True):
        scale = _RMS * math.sqrt(max(parameter.shape[0], parameter[0].numel()))
        parameter.addcmul_(update, lr, value=-scale)


def orthogonalized(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return for each weight `[out, …]` a nearly orthogonal `[out, rest]` with its singular vectors, in the weight's shape.

    Singular values come out between about 0.7 and 1.2; zeros stay zeros. Newton-Schulz iterations, in bf16 on a GPU and in fp32
    elsewhere, which is also the dtype of the results. The matrices are padded with zeros until many have the same size: that
    does not change the results, fewer and larger products are faster, and sides that are not multiples of 8 take slow kernels.
    """
    matrices = [_wide(weight) for weight in weights]
    batches: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        rows, columns = (math.ceil(side / unit) * unit for side, unit in zip(matrix.shape, _GRID, strict=True))
        batches.setdefault((rows, columns), []).append(i)
    results = list(weights)
    for size, indices in batches.items():
        first = matrices[indices[0]]
        x = first.new_zeros((len(indices), *size), dtype=torch.bfloat16 if first.is_cuda else torch.float32)
        for padded, i in zip(x, indices, strict=True):
            padded[: matrices[i].shape[0], : matrices[i].shape[1]].copy_(matrices[i])
        for padded, i in zip(_newton_schulz(x), indices, strict=True):
            results[i] = _shaped(padded[: matrices[i].shape[0], : matrices[i].shape[1]], weights[i].shape)
    return results


def _wide(weight: Tensor) -> Tensor:
    """Return `[out, …]` as a matrix with at least as many columns as rows.

    A convolution's columns are taken in the order in which channels-last weights lie in memory: that does not change the
    result, and saves a copy.
    """
    matrix = weight.movedim(1, -1).flatten(1) if weight.dim() == 4 else weight
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _shaped(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Return the result of `_wide` in the shape of its weight."""
    matrix = matrix if shape[0] <= shape.numel() // shape[0] else matrix.mT
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if len(shape) == 4 else matrix


def _newton_schulz(x: Tensor) -> Tensor:
    """Return `[N, rows, columns]`, rows ≤ columns, with singular values near 1."""
    a, b, c = _COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=1e-7).to(x.dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: not to norms, biases and other vectors, nor to the scan's A_log, D and dt_bias."""
    return parameter.dim() > 1 and name.rpartition(".")[2] not in _NO_DECAY


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether a parameter maps several inputs to several outputs; a depthwise convolution does not."""
    return parameter.dim() > 1 and parameter.shape[0] > 1 and parameter.shape[1] > 1


def build_optimizer(model: nn.Module, config: OptimConfig, cuda_graphs: bool = False) -> torch.optim.AdamW:
    """Build the optimizer of `config` over all trainable parameters, in groups with and without weight decay.

    With --optimizer muon a third group, the first, holds the matrices that Muon updates, with `cuda_graphs` by a CUDA graph:
    for parameters on a GPU that are updated in place.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    fused = all(p.is_cuda for _, p in named)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    matrices = [p for name, p in named if decays(name, p) and is_matrix(p)]
    chosen = set(map(id, matrices))
    groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, *groups]
    muon = Muon([group | {"orthogonal": i == 0} for i, group in enumerate(groups)], lr=config.lr, fused=fused)
    muon.captures = cuda_graphs
    return muon


def carry_over(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Copy to `new` the state that `old` has of the parameters in both."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def freeze(module: nn.Module, frozen: bool = True) -> None:
    """Freeze or unfreeze a module: frozen, it has no gradients, and its norms are in eval mode.

    Build the optimizer afterwards, without the frozen parameters.
    """
    module.requires_grad_(not frozen)
    module.train(not frozen)


def annealing(step: int, total: int, config: OptimConfig) -> float:
    """Return the annealing factor of the residual mixing: 0, then linear to 1 over the last `mhc_anneal` of the steps."""
    start = total * (1 - config.mhc_anneal)
    return max(0.0, (step + 1 - start) / (total - start)) if total > start else 0.0


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Return the rate of step 0 … total-1: linear warm-up over `warmup_steps`, then half a cosine down to lr_min."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps)
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
