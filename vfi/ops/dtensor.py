"""Detection of tensors that are sharded over several processes (torch's DTensor)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_in_shards(tensor: Any) -> TypeGuard[DTensor]:
    """Return whether `tensor` is a DTensor.

    Importing the class takes a second, so it is only looked up if its module is already imported.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
