"""Selection of the sharding strategy that the launcher requests."""

from __future__ import annotations

from accelerate import Accelerator

from vfi.distributed.deepspeed_zero import Zero
from vfi.distributed.fsdp import Fsdp2
from vfi.distributed.launcher_checks import asked_sharding
from vfi.distributed.strategy import Whole


def sharding(accelerator: Accelerator) -> Whole:
    """Return the sharding strategy that the launcher requests."""
    return {"none": Whole, "fsdp2": Fsdp2, "zero": Zero}[asked_sharding()](accelerator)
