"""Where do weights, gradients and the optimizer's state lie: whole on every process, or a shard of them on each?

| kind  | asked for by                | weights     | gradients   | optimizer's state |
| ----- | --------------------------- | ----------- | ----------- | ----------------- |
| Whole | one process, or ddp.yaml    | whole       | whole       | whole             |
| Fsdp2 | fsdp2.yaml                  | in shards   | in shards   | in shards         |
| Zero  | deepspeed_zero1, 2, 3.yaml  | whole; 3: in shards | 1: whole until the step; in shards | in shards |

Saved is always the whole: a checkpoint goes on under any of them, on any number of processes. Weights are fp32 in all of them
and the forward pass runs under autocast, so that the fp32 parts of the network are that everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from vfi.checkpoint.weights import load_optimizer
from vfi.config.configs import Config, ConfigError
from vfi.distributed.gradients import LayerGroups, gradient_norms
from vfi.distributed.launcher_checks import asked_precision
from vfi.model.interpolator import FrameInterpolator

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Whole:
    """One process, or several that average their gradients (DDP): each has everything."""

    name = "none"
    """What is in shards, for messages."""
    in_step = False
    """Can a forward pass only be done by all processes together?"""
    measures_updates = True
    """Can the weights be compared with what they were before a step?"""
    tries_steps = True
    """Is `try_step` for it?"""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def settle(self, config: Config, frozen: bool) -> None:
        """Take what this kind has to know of a run; ConfigError for settings that can't be had under it."""

    def prepare(self, network: FrameInterpolator, make: MakeOptimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        """What trains in place of `network`, and the optimizer that `make` makes for it."""
        self.network = network
        self.model, self.optimizer = self.accelerator.prepare(network, make(network))
        return self.model, self.optimizer

    def renew(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Train by another optimizer from now on, also parameters that were frozen before."""
        if self.model is network:  # to prepare a model twice would leave it without autocast
            self.optimizer = self.accelerator.prepare(optimizer)
        else:  # DistributedDataParallel only averages gradients of what trained when it was made
            plain = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
            self.model, self.optimizer = self.accelerator.prepare(plain, optimizer)
        return self.model, self.optimizer

    def accumulate(self) -> AbstractContextManager[None]:
        """Around each forward and backward pass: gradients are averaged over processes in the last one of a step."""
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a mean loss / number of passes of a step."""
        self.accelerator.backward(loss)

    def gradient_norms(self, groups: LayerGroups) -> Tensor:
        """`[groups]`: norm of each group's gradient, the same on all processes; to be called once a step."""
        self.accelerator.unscale_gradients()
        return gradient_norms(groups)

    def step(self, norm: Tensor, largest: float) -> None:
        """Change the weights by the gradient, whose norm is `norm`, shortened to `largest`."""
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), largest, norm)
        self.optimizer.step()
        self.forget()

    @property
    def can_try(self) -> bool:
        """Can the optimizer be told on the device, which the program runs ahead of, whether a step counts?"""
        groups = self.optimizer.param_groups
        return self.tries_steps and self.accelerator.scaler is None and all(group.get("fused") for group in groups)

    def try_step(self, norm: Tensor, largest: float, doubts: Tensor) -> None:
        """As `step` where `doubts`, on the device, is 0; where it is 1, nothing changes. The gradient stays until `forget`."""
        kept = torch.where(doubts > 0, 0, norm)  # one that is too short to be shortened
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), largest, kept)
        fused = self.optimizer.optimizer
        fused.found_inf = doubts  # what a loss scaler would say
        self.optimizer.step()
        del fused.found_inf

    def forget(self) -> None:
        """Forget the gradient of a step that was taken."""
        self.optimizer.zero_grad()

    def drop(self) -> None:
        """Forget the gradient; weights and optimizer stay as they are."""
        if self.accelerator.scaler:
            self.accelerator.scaler.update()  # it wants to be told, or refuses the next gradient
        self.optimizer.zero_grad()

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of a state dict in shards; only those of the main process are of use."""
        return tensors

    def weights(self) -> dict[str, Tensor]:
        """Whole weights; only those of the main process are of use."""
        return self.gathered(self.network.state_dict())

    def optimizer_state(self) -> dict[str, Any]:
        """Whole state of AdamW, as its `state_dict` has it; only that of the main process is of use."""
        return self.optimizer.state_dict()

    def load_optimizer(self, state: dict[str, Any], place: str) -> None:
        """Put back what `optimizer_state` gave and `place` kept; CheckpointError where it does not fit."""
        load_optimizer(self.optimizer, state, place)


def _make_ready(network: nn.Module, device: torch.device) -> None:
    """For shards: weights laid out plainly, for channels-last ones can't be cut, and forward passes in the asked precision."""
    network.to(memory_format=torch.contiguous_format)
    if asked_precision() == "bf16":
        network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)


def _refuse_frozen(frozen: bool, name: str) -> None:
    if frozen:
        raise ConfigError(
            f"--freeze_backbone is not supported with {name}: train the frozen epochs with ddp.yaml, then go on with {name} by "
            f"--resume auto"
        )


def _refuse_muon(config: Config, name: str) -> None:
    if config.optim.optimizer == "muon":
        raise ConfigError(
            f"--optimizer muon is not supported with {name}, under which no process has a whole matrix: use ddp.yaml, or "
            f"--optimizer adamw"
        )
