"""Placement of weights, gradients and optimizer state: whole on every process, or a shard on each.

| kind  | requested by                | weights                  | gradients                       | optimizer state |
| ----- | --------------------------- | ------------------------ | ------------------------------- | --------------- |
| Whole | one process, or ddp.yaml    | whole                    | whole                           | whole           |
| Fsdp2 | fsdp2.yaml                  | sharded                  | sharded                         | sharded         |
| Zero  | deepspeed_zero1, 2, 3.yaml  | whole; stage 3: sharded  | sharded; stage 1: at the step   | sharded         |

Checkpoints hold whole tensors: a run resumes from one under any of these, on any number of processes. Weights are always fp32
and the forward pass runs under autocast, so that the fp32 parts of the network are fp32 everywhere.
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


class DDPStrategy:
    """One process, or several that average their gradients (DDP): each holds everything."""

    name = "none"
    """What is sharded, for messages."""
    forward_is_collective = False
    """Whether a forward pass needs all processes together."""
    measures_updates = True
    """Whether the weights can be compared with those before a step."""
    supports_speculative_step = True
    """Whether it supports `speculative_step`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def configure(self, config: Config, frozen: bool) -> None:
        """Set what this strategy needs to know of a run; ConfigError for settings that it does not support."""

    def prepare(self, network: FrameInterpolator, make: MakeOptimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return the model to train in place of `network`, and the optimizer that `make` builds for it."""
        self.network = network
        self.model, self.optimizer = self.accelerator.prepare(network, make(network))
        return self.model, self.optimizer

    def rebuild_optimizer(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Train with another optimizer from now on, also parameters that were frozen before."""
        if self.model is network:  # preparing a model twice would leave it without autocast
            self.optimizer = self.accelerator.prepare(optimizer)
        else:  # DistributedDataParallel only averages gradients of parameters that were trainable when it was built
            plain = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
            self.model, self.optimizer = self.accelerator.prepare(plain, optimizer)
        return self.model, self.optimizer

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context for each forward and backward pass: gradients are averaged over ranks in the last one of a step."""
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a mean loss, divided by the number of passes of a step."""
        self.accelerator.backward(loss)

    def gradient_norms(self, groups: LayerGroups) -> Tensor:
        """Return `[groups]`: the norm of each group's gradient, the same on all processes; to be called once a step."""
        self.accelerator.unscale_gradients()
        return gradient_norms(groups)

    def step(self, norm: Tensor, largest: float) -> None:
        """Update the weights by the gradient, whose norm is `norm`, clipped to `largest`."""
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), largest, norm)
        self.optimizer.step()
        self.zero_grad()

    @property
    def can_try(self) -> bool:
        """Whether a flag on the device, which the program need not wait for, can make the optimizer skip a step."""
        groups = self.optimizer.param_groups
        return (
            self.supports_speculative_step and self.accelerator.scaler is None and all(group.get("fused") for group in groups)
        )

    def speculative_step(self, norm: Tensor, largest: float, needs_review: Tensor) -> None:
        """Take a step where `needs_review`, on the device, is 0; where it is 1, change nothing.

        The gradient stays until `zero_grad`.
        """
        kept = torch.where(needs_review > 0, 0, norm)  # a norm of 0 is never clipped
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), largest, kept)
        fused = self.optimizer.optimizer
        fused.found_inf = needs_review  # as a loss scaler would set it
        self.optimizer.step()
        del fused.found_inf

    def zero_grad(self) -> None:
        """Discard the gradient of a step that was taken."""
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        """Discard the gradient; weights and optimizer stay as they are."""
        if self.accelerator.scaler:
            self.accelerator.scaler.update()  # without an update it refuses the next gradient
        self.optimizer.zero_grad()

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of a sharded state dict; they are valid on the main process only."""
        return tensors

    def weights(self) -> dict[str, Tensor]:
        """Return the whole weights; they are valid on the main process only."""
        return self.gathered(self.network.state_dict())

    def optimizer_state(self) -> dict[str, Any]:
        """Return AdamW's whole state in the form of its `state_dict`; it is valid on the main process only."""
        return self.optimizer.state_dict()

    def load_optimizer(self, state: dict[str, Any], place: str) -> None:
        """Restore an optimizer state that was saved at `place`; CheckpointError where it does not fit."""
        load_optimizer(self.optimizer, state, place)


def make_ready(network: nn.Module, device: torch.device) -> None:
    """Prepare a network for sharding: contiguous weights, as channels-last ones can't be cut, and the requested precision."""
    network.to(memory_format=torch.contiguous_format)
    if asked_precision() == "bf16":
        network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)


def refuse_frozen(frozen: bool, name: str) -> None:
    if frozen:
        raise ConfigError(
            f"--freeze_backbone is not supported with {name}: train the frozen epochs with ddp.yaml, then go on with {name} by "
            f"--resume auto"
        )


def refuse_muon(config: Config, name: str) -> None:
    if config.optim.optimizer == "muon":
        raise ConfigError(
            f"--optimizer muon is not supported with {name}, under which no process has a whole matrix: use ddp.yaml, or "
            f"--optimizer adamw"
        )
