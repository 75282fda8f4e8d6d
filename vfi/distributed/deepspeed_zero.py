"""Sharding of optimizer, gradients and weights by DeepSpeed's ZeRO."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from vfi.config.configs import Config, ConfigError
from vfi.distributed.gradients import LayerGroups, group_norms
from vfi.distributed.strategy import DDPStrategy, MakeOptimizer, make_ready, refuse_frozen, refuse_muon
from vfi.errors import CheckpointError
from vfi.model.interpolator import FrameInterpolator

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroStrategy(DDPStrategy):
    """DeepSpeed's ZeRO, stage 1, 2 or 3, through accelerate.

    Its optimizer holds, for each of AdamW's groups, one flat tensor that concatenates this process's shards of all parameters.
    """

    supports_speculative_step = False

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.settings: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
        self.stage: int = self.settings["zero_optimization"]["stage"]
        self.name, self.forward_is_collective, self.measures_updates = f"zero{self.stage}", self.stage == 3, self.stage < 3

    def configure(self, config: Config, frozen: bool) -> None:
        refuse_frozen(frozen, "ZeRO")
        refuse_muon(config, "ZeRO")
        for flag, given in (("--ema", config.optim.ema), ("--compile", config.compute.compile)):
            if self.stage == 3 and given:
                raise ConfigError(
                    f"{flag} is not supported with ZeRO-3, which takes the weights apart: use ZeRO-2 or leave it out"
                )
        # DeepSpeed requires these settings, but the loader makes the batches and the trainer clips the gradient
        self.settings["train_micro_batch_size_per_gpu"] = config.data.batch_size
        self.settings["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps
        self.settings["gradient_clipping"] = 0.0
        self.settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = self.stage == 3

    def prepare(self, network: FrameInterpolator, make: MakeOptimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        make_ready(network, self.accelerator.device)
        plain = make(network)
        self.groups = plain.state_dict()["param_groups"]
        self.parameters: list[Any] = [parameter for group in plain.param_groups for parameter in group["params"]]
        self.model, self.optimizer = self.accelerator.prepare(network, plain)
        self.zero = self.model.optimizer
        self.flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        return self.model, self.optimizer

    def accumulate(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate()  # `backward` passes it on to the engine

    def backward(self, loss: Tensor) -> None:
        # accelerate's own backward would take the step at once
        self.model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.model.backward(loss)

    def gradient_norms(self, groups: LayerGroups) -> Tensor:
        squares = group_norms([self._gradients(parameters) for parameters in groups.values()]).double().square()
        torch.distributed.all_reduce(squares)
        return squares.sqrt().float()

    def _gradients(self, parameters: Iterable[Any]) -> list[Tensor]:
        """Return this process's shards of the gradients."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if self.stage == 3:
            return [self.zero.get_local_fp32_grad_for_param(parameter) for parameter in trained]
        own = [(parameter, parameter._hp_mapping) for parameter in trained if parameter._hp_mapping is not None]
        return [mapping.get_lp_grad_fragment(parameter._index_in_param_group) for parameter, mapping in own]

    def step(self, norm: Tensor, largest: float) -> None:
        self.zero.clip_grad = largest if math.isfinite(largest) else 0.0
        self.model.step()

    def skip_step(self) -> None:
        # DeepSpeed skips a step with a non-finite gradient, with all that belongs to it, on all processes
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
        # a copy of the step for each: one shared tensor stays shared when saved, and AdamW would increment it per parameter
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
        torch.distributed.all_reduce(flat)  # every element belongs to one process, and is zero on the others
        return flat.view_as(parameter)

    def _shard_of(self, parameter: Any, name: str) -> list[tuple[Tensor, slice]]:
        """Return this process's shard of a moment and the slice of the parameter it covers; empty if it has none (stages 1 and
        2).

        DeepSpeed's own functions for this find only the first of several groups.
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
        """Raise CheckpointError for the state of other parameters, or where some have had fewer steps than others."""
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
        shard = parameter.ds_tensor.numel()  # the last shard is padded with zeros
        start = shard * self.accelerator.process_index
        own = value.flatten()[start : start + shard]
        self.zero.set_local_hp_param(torch.nn.functional.pad(own, (0, shard - own.numel())), parameter, name)
