"""Read weights that others publish as a pickle of tensors, such as torchvision's."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shards.torch_files import explain_load_error
from vfi.errors import JobError

# all exceptions that torch.load was observed to raise for truncated or modified files
_DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, struct.error),
)


def read_published(path: Path, expected: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return the tensors of `path` that `expected` names; they have its shapes. No code of the file is executed.

    Raises JobError for a file that is missing, damaged or of something else; it says that the file is published as `origin`.
    """
    if not path.is_file():
        raise JobError(f"{path} is missing: it is published as {origin}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise JobError(f"{path} cannot be loaded: {explain_load_error(error)}. Fetch it again from {origin}") from error
    tensors = content if isinstance(content, dict) else {}
    missing = [name for name in expected if not isinstance(tensors.get(name), Tensor)]
    others = [
        f"{name} {list(tensors[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name not in missing and tensors[name].shape != tensor.shape
    ]
    parts = [f"{kind}: {', '.join(names)}" for kind, names in (("missing", missing), ("of another shape", others)) if names]
    if parts:
        raise JobError(f"{path} is of something else: {'; '.join(parts)}. The file is published as {origin}")
    return {name: tensors[name] for name in expected}
