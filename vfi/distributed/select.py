"""Selection of the sharding strategy that the launcher requests."""

from __future__ import annotations

from accelerate import Accelerator

from vfi.distributed.deepspeed_zero import ZeroStrategy
from vfi.distributed.fsdp import FSDPStrategy
from vfi.distributed.launcher_checks import asked_sharding
from vfi.distributed.strategy import DDPStrategy


def sharding(accelerator: Accelerator) -> DDPStrategy:
    """Return the sharding strategy that the launcher requests."""
    return {"none": DDPStrategy, "fsdp2": FSDPStrategy, "zero": ZeroStrategy}[asked_sharding()](accelerator)
