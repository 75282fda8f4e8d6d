"""Sharding of weights, gradients and optimizer by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from vfi.checkpoint.weights import load_optimizer
from vfi.config.configs import Config
from vfi.distributed.strategy import DDPStrategy, MakeOptimizer, make_ready, refuse_frozen, refuse_muon
from vfi.model.backbone import LGSBlock
from vfi.model.flow import FlowStage
from vfi.model.interpolator import FrameInterpolator
from vfi.model.refinement import RefineNet
from vfi.ops.dtensor import is_in_shards


class FSDPStrategy(DDPStrategy):
    """Weights, gradients and optimizer in shards; the weights of a unit are gathered while it computes.

    torch's `fully_shard` makes the shards here: accelerate would do so only on GPUs, and on a CPU silently train each process
    independently.
    """

    name, forward_is_collective, supports_speculative_step = "fsdp2", True, False

    def configure(self, config: Config, frozen: bool) -> None:
        refuse_frozen(frozen, "FSDP2")
        refuse_muon(config, "FSDP2")

    def prepare(self, network: FrameInterpolator, make: MakeOptimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        from torch.distributed.device_mesh import init_device_mesh  # imported only here: it takes a second
        from torch.distributed.fsdp import fully_shard

        device = self.accelerator.device
        make_ready(network, device)
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        for module in list(network.modules()):
            if isinstance(module, LGSBlock | FlowStage | RefineNet):
                fully_shard(module, mesh=mesh)
        # by default parameters outside of the units would stay unsharded after a validation
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
