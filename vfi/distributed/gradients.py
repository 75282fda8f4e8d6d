"""Norms of gradients and of updates by layer group, also of sharded tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfi.ops.dtensor import is_in_shards

LayerGroups = dict[str, list[nn.Parameter]]


def layer_groups(network: nn.Module) -> LayerGroups:
    """Return the parameters by group; each is in exactly one of them."""
    groups: LayerGroups = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(group_of(name), []).append(parameter)
    return groups


def group_of(name: str) -> str:
    """Return a parameter's group: stem, down, stage0, stage1, mixing, flow, teacher or refine; else the name's first word.

    stage1 includes the norm at its end.
    """
    words = [word for word in name.split(".") if not word.startswith("_")]  # wrappers begin with an underscore
    if "coefficients" in words:
        return "mixing"
    if words[0] == "backbone":
        return f"stage{words[2]}" if words[1] in ("stages", "norms") else words[1]
    return "teacher" if words[:2] == ["flow", "teacher"] else words[0]


def gradient_norms(groups: LayerGroups) -> Tensor:
    """Return `[groups]` fp32 on the device: the norm of each group's gradient; 0 where it has none."""
    return group_norms([[p.grad for p in parameters if p.grad is not None] for parameters in groups.values()])


def copies(groups: LayerGroups) -> list[list[Tensor]]:
    """Return copies of the present weights."""
    return [[parameter.detach().clone() for parameter in parameters] for parameters in groups.values()]


def update_ratios(groups: LayerGroups, before: list[list[Tensor]]) -> Tensor:
    """Return `[groups]`: norm of the change since `before` / norm of the weights then; 0 where all of them were zero."""
    moved = [
        [new.detach() - old for new, old in zip(parameters, olds, strict=True)]
        for parameters, olds in zip(groups.values(), before, strict=True)
    ]
    change, size = group_norms(moved), group_norms(before)
    return torch.where(size > 0, change / size, 0)


def group_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return `[groups]` fp32: the norm of all tensors of a group together; of sharded tensors, over all processes."""
    tensors = list(itertools.chain(*groups))
    if not tensors:
        return torch.zeros(len(groups))
    local = [tensor.to_local() if is_in_shards(tensor) else tensor for tensor in tensors]
    each = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32))
    norms = torch.stack(torch._foreach_norm(each.split([len(group) for group in groups])))
    return _over_shards(norms, tensors)


def _over_shards(norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the norms of whole tensors from those of this process's shards.

    All tensors must be unsharded, or all sharded in the same way; else ValueError.
    """
    sharded = [tensor for tensor in tensors if is_in_shards(tensor)]
    if not sharded:
        return norms
    if len(sharded) < len(tensors) or len({(tensor.device_mesh, tensor.placements) for tensor in sharded}) > 1:
        raise ValueError("gradients are sharded in different ways: their norms can't be added up")
    squares = norms.double().square()
    for dim, placement in enumerate(sharded[0].placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(squares, group=sharded[0].device_mesh.get_group(dim))
    return squares.sqrt().to(norms.dtype)
