"""Select the sharding strategy that the launcher asks for."""

from __future__ import annotations

from accelerate import Accelerator

from vfi.distributed.deepspeed_zero import Zero
from vfi.distributed.fsdp import Fsdp2
from vfi.distributed.launcher_checks import asked_sharding
from vfi.distributed.strategy import Whole


def sharding(accelerator: Accelerator) -> Whole:
    """The kind that the launcher was asked for."""
    return {"none": Whole, "fsdp2": Fsdp2, "zero": Zero}[asked_sharding()](accelerator)
