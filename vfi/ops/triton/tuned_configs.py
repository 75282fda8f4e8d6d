"""With which configuration does each kernel run? With the one that was fastest on such a card, so that none is searched for.

    count = fill(tuners(), entry(device))       # before the first call; what is not known there is searched for, as ever
    kernels = found(tuners())                   # after some calls: what was searched for, or filled in

A configuration (sizes of blocks, warps, stages) was measured with one compiler for one generation of cards, for a shape class:
the values that Triton's tuning goes by, such as the width of a head, and the types of all tensors. The file is made by
`vfi tune`, and has those of our own kernels, too (vfi/ops/triton/launch_config.py). It counts for the version of Triton that it
was made with: another one may need more memory for the same blocks.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tuned_kernels.json")
_PACKAGE = "mamba_ssm.ops.triton."

Kernels = dict[str, list[dict[str, Any]]]
"""Name of a kernel -> [{"key": shape class, "config": {"kwargs", "num_warps", "num_stages"}}]; of ours {"num_warps", …}."""


def tuners() -> Iterator[Any]:
    """All kernels with a choice of configurations, of the modules that are imported: triton.runtime.Autotuner."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith(_PACKAGE):
            for value in list(vars(module).values()):
                if type(value).__name__ == "Autotuner" and value.base_fn.__module__ == name:
                    yield value


def card(device: torch.device) -> str:
    """Generation and compiler, such as "sm_90, triton 3.6": what a configuration was measured for."""
    major, minor = torch.cuda.get_device_capability(device)
    triton = ".".join(importlib.metadata.version("triton").split(".")[:2])
    return f"sm_{major}{minor}, triton {triton}"


def entry(device: torch.device, path: Path = FILE, whose: str = "kernels") -> Kernels:
    """What is known for a GPU, of mamba-ssm's kernels or of "fused", our own; nothing for others."""
    known: Kernels = json.loads(path.read_text()).get(card(device), {}).get(whose, {})
    return known


def fill(found_tuners: Iterable[Any], kernels: Mapping[str, list[dict[str, Any]]]) -> int:
    """Tell the tuners what is known, and count it. Configurations that a kernel does not have are left out."""
    count = 0
    for tuner in found_tuners:
        for known in kernels.get(tuner.base_fn.__name__, ()):
            same = [config for config in tuner.configs if _written(config) == known["config"]]
            if same:
                tuner.cache[tuple(known["key"])] = same[0]
                count += 1
    return count


def found(found_tuners: Iterable[Any]) -> Kernels:
    """What the tuners have taken so far, by kernel and shape class."""
    return {
        tuner.base_fn.__name__: [
            {"key": list(key), "config": _written(config)} for key, config in sorted(tuner.cache.items(), key=str)
        ]
        for tuner in found_tuners
        if tuner.cache
    }


def _written(config: Any) -> dict[str, Any]:
    return {"kwargs": dict(config.kwargs), "num_warps": config.num_warps, "num_stages": config.num_stages}
