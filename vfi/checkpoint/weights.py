"""Load saved weights into a model and report what does not fit. Nothing that is read here can execute code."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shards.torch_files import explain_load_error
from vfi.checkpoint.store import CONFIG, EMA, MODEL, OPTIMIZER, STATE, find, read_config, refuse_damage
from vfi.config.configs import Config
from vfi.errors import CheckpointError
from vfi.model.interpolator import FrameInterpolator
from vfi.runtime.logging import logger

PARTS = ("flow.teacher", "backbone", "flow", "refine")  # parts of the network, the longest name first


def load_model(path: str | Path, device: torch.device) -> tuple[FrameInterpolator, Config]:
    """Return a model in eval mode on `device` and its settings; `path` is a run (name or folder), checkpoint or weights file.

    Its files are verified first. EMA weights are preferred where there are any, which is logged; a weights file is used as
    given.
    """
    checkpoint = find(path)
    name = Path(path).name if Path(path).suffix == ".safetensors" else best_weights(checkpoint)
    refuse_damage(checkpoint, [name, STATE])
    if name == EMA and Path(path).name != EMA:
        logger.warning(f"{checkpoint}: the EMA weights are taken; those without averaging are in {MODEL} beside them")
    config = read_config(checkpoint)
    model = FrameInterpolator(config.model, device)
    load_weights(model, checkpoint, name)
    return model.eval(), config


def best_weights(checkpoint: Path) -> str:
    """Return the name of the file with the weights to use: the EMA weights where there are any."""
    return EMA if (checkpoint / EMA).is_file() else MODEL


def load_weights(model: nn.Module, checkpoint: Path, name: str = MODEL) -> None:
    """Load a checkpoint's weights into `model`; CheckpointError names the keys and shapes that differ, and changes nothing."""
    weights = read_weights(checkpoint, name)
    refuse_differences(model.state_dict(), weights, checkpoint, name)
    model.load_state_dict(weights)


def read_weights(checkpoint: Path, name: str = MODEL) -> dict[str, Tensor]:
    """Return the weights by name; CheckpointError where the file can't be read."""
    path = checkpoint / name
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_parts(model: nn.Module, checkpoint: Path) -> list[str]:
    """Load the weights of another phase into `model`; return lines on what was loaded, what is new and what was left out.

    Whole parts (`PARTS`) may be new or left over; inside a part that both have, every key and shape must agree. Otherwise
    CheckpointError names the differences, and nothing changes.
    """
    name = best_weights(checkpoint)
    weights = read_weights(checkpoint, name)
    own, theirs = _by_part(model.state_dict()), _by_part(weights)
    both = [part for part in own if part in theirs]
    refuse_differences(
        {k: v for part in both for k, v in own[part].items()},
        {k: v for part in both for k, v in theirs[part].items()},
        checkpoint,
        name,
    )
    model.load_state_dict({key: tensor for part in both for key, tensor in theirs[part].items()}, strict=False)
    groups = {
        "loaded": [f"{part} {_size(own[part])}" for part in both],
        "new": [f"{part} {_size(own[part])}" for part in own if part not in theirs],
        "left": [f"{part} {_size(theirs[part])}" for part in theirs if part not in own],
    }
    lines = [f"{kind}: {', '.join(parts)}" for kind, parts in groups.items() if parts]
    return [f"they are the EMA weights ({EMA})", *lines] if name == EMA else lines


def _by_part(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group weights by part: the longest entry of PARTS that a key begins with, or else its first word."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        part = next((part for part in PARTS if name.startswith(part + ".")), name.partition(".")[0])
        parts.setdefault(part, {})[name] = tensor
    return parts


def _size(weights: dict[str, Tensor]) -> str:
    return f"({sum(tensor.numel() for tensor in weights.values()) / 1e6:.2f} M)"


def read_optimizer(checkpoint: Path) -> dict[str, Any]:
    """Return an optimizer's saved state; CheckpointError for a file that is damaged or holds more than plain values."""
    path = checkpoint / OPTIMIZER
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {explain_load_error(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} cannot be loaded: it holds a {type(state).__name__}, no state of an optimizer")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], place: str | Path) -> None:
    """Load the state that was saved at `place` into the optimizer; settings such as the learning rate stay the present ones.

    The optimizer takes over the tensors of `state`. CheckpointError where it does not fit.
    """
    try:
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
            saved.update({name: value for name, value in own.items() if name != "params"})
        optimizer.load_state_dict(state)
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} is of shape {list(value.shape)} instead of {list(parameter.shape)}")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place}/{OPTIMIZER} cannot be loaded: {error}") from error


def compare_models(ours: Config, theirs: Config) -> str:
    """Return the model settings that differ, for messages; empty when none does."""
    mine, other = dataclasses.asdict(ours.model), dataclasses.asdict(theirs.model)
    return ", ".join(f"{name}: {mine[name]} here, {other[name]} there" for name in mine if mine[name] != other[name])


def refuse_differences(
    expected: dict[str, Tensor], found: dict[str, Tensor], checkpoint: Path, name: str = MODEL, limit: int = 6
) -> None:
    """Raise CheckpointError that names missing and unknown keys and differing shapes, if there are any."""
    groups = {
        "missing": [key for key in expected if key not in found],
        "unknown": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {list(found[key].shape)} instead of {list(expected[key].shape)}"
            for key in expected
            if key in found and found[key].shape != expected[key].shape
        ],
    }
    differences = "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:limit])}{', …' if len(keys) > limit else ''}"
        for kind, keys in groups.items()
        if keys
    )
    if differences:
        raise CheckpointError(
            f"{checkpoint / name} is of another architecture: {differences}. Give the model that run's settings "
            f"(see {checkpoint / CONFIG})"
        )
