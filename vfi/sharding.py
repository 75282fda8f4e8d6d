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

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from vfi.checkpoint.weights import load_optimizer
from vfi.config.configs import Config, ConfigError
from vfi.errors import CheckpointError
from vfi.guard import LayerGroups, gradient_norms, group_norms
from vfi.model.backbone import LGSBlock
from vfi.model.flow import FlowStage
from vfi.model.interpolator import FrameInterpolator
from vfi.model.refine import RefineNet
from vfi.ops.dtensor import is_in_shards
from vfi.processes import asked_precision, asked_sharding

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_MOMENTS = ("exp_avg", "exp_avg_sq")


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


class Fsdp2(Whole):
    """Weights, gradients and optimizer in shards; a part of the network is put together while it is at work.

    The shards are cut here by torch's `fully_shard`: accelerate would do it on GPUs only, and on a CPU train without a word
    each process by itself.
    """

    name, in_step, tries_steps = "fsdp2", True, False

    def settle(self, config: Config, frozen: bool) -> None:
        _refuse_frozen(frozen, "FSDP2")
        _refuse_muon(config, "FSDP2")

    def prepare(self, network: FrameInterpolator, make: MakeOptimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        from torch.distributed.device_mesh import init_device_mesh  # what other kinds don't need, for it takes a second
        from torch.distributed.fsdp import fully_shard

        device = self.accelerator.device
        _make_ready(network, device)
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        for module in list(network.modules()):
            if isinstance(module, LGSBlock | FlowStage | RefineNet):
                fully_shard(module, mesh=mesh)
        # by default what lies outside of the units would stay whole after a validation
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        self.network = self.model = network
        self.optimizer = AcceleratedOptimizer(make(network), device_placement=False)
        return self.model, self.optimizer

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with self.accelerator.accumulate():
            self.model.set_requires_gradient_sync(self.accelerator.sync_gradients)
            yield

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._whole(tensor) for name, tensor in tensors.items()}

    def _whole(self, value: Any) -> Any:
        if not is_in_shards(value):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.accelerator.is_main_process else whole.new_empty(0)

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        whole = {i: {name: self._whole(value) for name, value in values.items()} for i, values in state["state"].items()}
        return state | {"state": whole}

    def load_optimizer(self, state: dict[str, Any], place: str) -> None:
        from torch.distributed.tensor import distribute_tensor

        load_optimizer(self.optimizer, state, place)
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim():
                    values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


class Zero(Whole):
    """DeepSpeed's ZeRO, stage 1, 2 or 3, through accelerate.

    Its optimizer holds, for each of AdamW's groups, one flat tensor with this process's shards of all parameters in a row.
    """

    tries_steps = False

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.settings: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
        self.stage: int = self.settings["zero_optimization"]["stage"]
        self.name, self.in_step, self.measures_updates = f"zero{self.stage}", self.stage == 3, self.stage < 3

    def settle(self, config: Config, frozen: bool) -> None:
        _refuse_frozen(frozen, "ZeRO")
        _refuse_muon(config, "ZeRO")
        for flag, given in (("--ema", config.optim.ema), ("--compile", config.compute.compile)):
            if self.stage == 3 and given:
                raise ConfigError(
                    f"{flag} is not supported with ZeRO-3, which takes the weights apart: use ZeRO-2 or leave it out"
                )
        # DeepSpeed wants to know them, but the loader deals batches and the trainer clips
        self.settings["train_micro_batch_size_per_gpu"] = config.data.batch_size
        self.settings["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps
        self.settings["gradient_clipping"] = 0.0
        self.settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = self.stage == 3

    def prepare(self, network: FrameInterpolator, make: MakeOptimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        _make_ready(network, self.accelerator.device)
        plain = make(network)
        self.groups = plain.state_dict()["param_groups"]
        self.parameters: list[Any] = [parameter for group in plain.param_groups for parameter in group["params"]]
        self.model, self.optimizer = self.accelerator.prepare(network, plain)
        self.zero = self.model.optimizer
        self.flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        return self.model, self.optimizer

    def accumulate(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate()  # the engine is told in `backward`

    def backward(self, loss: Tensor) -> None:
        # accelerate's own would take the step at once
        self.model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.model.backward(loss)

    def gradient_norms(self, groups: LayerGroups) -> Tensor:
        squares = group_norms([self._gradients(parameters) for parameters in groups.values()]).double().square()
        torch.distributed.all_reduce(squares)
        return squares.sqrt().float()

    def _gradients(self, parameters: Iterable[Any]) -> list[Tensor]:
        """This process's shards of the gradients."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if self.stage == 3:
            return [self.zero.get_local_fp32_grad_for_param(parameter) for parameter in trained]
        own = [(parameter, parameter._hp_mapping) for parameter in trained if parameter._hp_mapping is not None]
        return [mapping.get_lp_grad_fragment(parameter._index_in_param_group) for parameter, mapping in own]

    def step(self, norm: Tensor, largest: float) -> None:
        self.zero.clip_grad = largest if math.isfinite(largest) else 0.0
        self.model.step()

    def drop(self) -> None:
        # a step whose gradient is no number is dropped by DeepSpeed on all processes, and everything that belongs to it
        self._gradients(self.parameters)[0].fill_(math.nan)
        self.model.step()

    def weights(self) -> dict[str, Tensor]:
        return self.accelerator.get_state_dict(self.model) or {}

    def optimizer_state(self) -> dict[str, Any]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        groups = [group | {"lr": rate} for group, rate in zip(self.groups, rates, strict=True)]
        known = self.zero.optimizer.state
        if self.flat[0] not in known:  # no step yet
            return {"state": {}, "param_groups": groups}
        step = known[self.flat[0]]["step"]
        # to each its own step: saved together one tensor would stay one, and AdamW count it up for every parameter
        state = {i: {"step": step.clone()} | self._moments(parameter) for i, parameter in enumerate(self.parameters)}
        return {"state": state, "param_groups": groups}

    def _moments(self, parameter: Any) -> dict[str, Tensor]:
        whole = {name: self._whole_moment(parameter, name) for name in _MOMENTS}
        return {name: value.cpu() for name, value in whole.items()} if self.accelerator.is_main_process else {}

    def _whole_moment(self, parameter: Any, name: str) -> Tensor:
        if self.stage == 3:
            whole: Tensor = self.zero.get_full_hp_param(parameter, name)
            return whole
        flat = torch.zeros(parameter.numel(), device=parameter.device)
        for shard, part in self._shard_of(parameter, name):
            flat[part] = shard
        torch.distributed.all_reduce(flat)  # every element is one process's, and zero on the others
        return flat.view_as(parameter)

    def _shard_of(self, parameter: Any, name: str) -> list[tuple[Tensor, slice]]:
        """Stages 1 and 2: this process's shard of a moment, if it has one, and which elements of the parameter it is of.

        DeepSpeed's own functions for this find the first of several groups only.
        """
        if (mapping := parameter._hp_mapping) is None:
            return []
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        moment: Tensor = self.zero.optimizer.state[self.flat[mapping.param_group_index]][name]
        return [(moment[here.start : here.start + here.numel], slice(there.start, there.start + there.numel))]

    def load_optimizer(self, state: dict[str, Any], place: str) -> None:
        of_parameters: dict[int, dict[str, Tensor]] = state["state"]
        if not of_parameters:
            return
        self._refuse_state(of_parameters, place)
        for flat in self.flat:
            step = of_parameters[0]["step"].to(flat.device if self.groups[0]["fused"] else "cpu")
            moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
            self.zero.optimizer.state[flat] = {"step": step.clone()} | moments
        for i, parameter in enumerate(self.parameters):
            for name in _MOMENTS:
                self._set_moment(parameter, name, of_parameters[i][name])

    def _refuse_state(self, state: dict[int, dict[str, Tensor]], place: str) -> None:
        """CheckpointError for the state of other parameters, or of some that are younger than others."""
        shapes = [list(getattr(parameter, "ds_shape", parameter.shape)) for parameter in self.parameters]
        if sorted(state) != list(range(len(shapes))) or any(list(state[i]["exp_avg"].shape) != s for i, s in enumerate(shapes)):
            raise CheckpointError(f"the optimizer's state in {place} is of other parameters than those that train here")
        if len({values["step"].item() for values in state.values()}) > 1:
            raise CheckpointError(
                f"in {place} some parameters have trained for more steps than others, as after a frozen backbone, which "
                f"ZeRO can't tell apart: go on with ddp.yaml or fsdp2.yaml, or start from its weights (--start_from)"
            )

    def _set_moment(self, parameter: Any, name: str, value: Tensor) -> None:
        if self.stage < 3:
            for own, part in self._shard_of(parameter, name):
                own.copy_(value.flatten()[part])
            return
        shard = parameter.ds_tensor.numel()  # the last one is filled up with zeros
        start = shard * self.accelerator.process_index
        own = value.flatten()[start : start + shard]
        self.zero.set_local_hp_param(torch.nn.functional.pad(own, (0, shard - own.numel())), parameter, name)


def sharding(accelerator: Accelerator) -> Whole:
    """The kind that the launcher was asked for."""
    return {"none": Whole, "fsdp2": Fsdp2, "zero": Zero}[asked_sharding()](accelerator)


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
