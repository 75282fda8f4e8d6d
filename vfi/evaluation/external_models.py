"""Adapters for models of other repositories: about ten lines of the user's own code, named MODULE:FACTORY.

    # rife_adapter.py, in the folder that `vfi benchmark --model rife_adapter:rife` is started in (or on PYTHONPATH)
    def rife(device):
        from model.RIFE import Model
        model = Model(); model.load_model("train_log"); model.eval(); model.device()
        def interpolate(img0, img1, timestep, scale):   # [B, 3, H, W] RGB in [0, 1], float, scale or None -> the same
            return model.inference(img0, img1)
        interpolate.parameters = sum(p.numel() for p in model.flownet.parameters())   # optional
        return interpolate

The frames are padded as the protocol says; any further padding is up to the adapter, as is the precision that it runs in.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shards.factories import call_factory, is_factory
from shards.schema import ShardError
from vfi.errors import JobError
from vfi.inference.loading import LoadedModel, load

Interpolate = Callable[[Tensor, Tensor, float, float | None], Tensor]


class Adapter(NamedTuple):
    """A model that an adapter of the user provides."""

    name: str
    """MODULE:FACTORY, as it was given."""
    interpolate: Interpolate
    parameters: int | None

    def fingerprint(self) -> str:
        """Return the sha256 of the adapter's file and the number of parameters, which is all that is visible from outside."""
        file = importlib.import_module(self.name.partition(":")[0]).__file__
        content = Path(file).read_bytes() if file else b""
        return hashlib.sha256(content + str(self.parameters).encode()).hexdigest()

    def ask(self, img0: Tensor, img1: Tensor, timestep: float, scale: float | None) -> Tensor:
        """Return the in-between frame, float32, clamped to [0, 1]; JobError for a result that is not such a frame."""
        with torch.inference_mode():
            found: Any = self.interpolate(img0, img1, timestep, scale)
        if not isinstance(found, Tensor) or found.shape != img0.shape or not found.is_floating_point():
            kind = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise JobError(f"--model {self.name} gave {kind} for frames {list(img0.shape)}: expected floats of the same shape")
        return found.float().clamp(0, 1).to(img0.device)


Model = LoadedModel | Adapter


def load_any(model: str, device: torch.device) -> Model:
    """Load a run of this project, or the model of an adapter. Raises CheckpointError or JobError."""
    return load_adapter(model, device) if is_factory(model) else load(model, device)


def distinct_names(models: Sequence[Model], taken: Sequence[str] = ()) -> list[str]:
    """Return names for rows: the run's, with step or path where that is ambiguous. JobError for the same model twice."""
    for name in (lambda m: m.name, lambda m: f"{m.name}@{m.step}", lambda m: str(m.path)):
        names = [model.name if isinstance(model, Adapter) else name(model) for model in models]
        if len(set(names)) == len(names) and not set(taken) & set(names):
            return names
    raise JobError(f"--model was given the same model twice: {', '.join(names)}")


def load_adapter(model: str, device: torch.device) -> Adapter:
    """Call the factory. Raises JobError for a missing module or factory, and for a result that is not callable."""
    try:
        interpolate = call_factory(model, "--model", device)
    except ShardError as error:
        raise JobError(str(error)) from error
    parameters = getattr(interpolate, "parameters", None)
    return Adapter(model, interpolate, parameters if isinstance(parameters, int) else None)
