"""Exponential moving average of the weights, in fp32, alongside the weights being trained.

    average <- decay * average + (1 - decay) * weight        after each step that changed the weights

decay is min(--ema, (1 + n) / (10 + n)) in the n-th step, n = 1, 2, …, so that the average soon forgets the initial weights. All
parameters are averaged, also those of a frozen part; buffers are taken as they are. torch.optim.swa_utils.AveragedModel would
copy the model, which FSDP2 refuses (findings/torch_average_of_fsdp2.sh), and would average weights of half precision in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vfi.ops.dtensor import is_in_shards


class Ema:
    """The average of a model's parameters, initialised with their present values."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self.average = {name: tensor.detach().float().clone() for name, tensor in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach().float() for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """Return a state dict for the model, with the average in place of its parameters."""
        return self.model.state_dict() | self.average

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Load a saved average and its number of updates."""
        for name, tensor in self.average.items():
            whole = weights[name].to(tensor.device)
            if is_in_shards(tensor):
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
            tensor.copy_(whole)
        self.updates = updates

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the average as the model's parameters within the context; afterwards restore the model's own, bit for bit."""
        own = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._fill(list(self.average.values()))
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.copy_(value)
