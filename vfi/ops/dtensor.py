"""Is a tensor in shards on several processes (torch's DTensor)?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_in_shards(tensor: Any) -> TypeGuard[DTensor]:
    """The class takes a second to import, so it is left alone unless somebody has made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
