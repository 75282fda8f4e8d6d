"""Tuned kernel configurations: the fastest ones measured on each GPU, so that none has to be searched for.

    count = fill(tuners(), entry(device))       # before the first call; kernels without an entry are tuned as usual
    kernels = found(tuners())                   # after some calls: the results of the tuning, or what was filled in

A configuration (block sizes, warps, stages) was measured with one compiler on one generation of GPUs, for a shape class: the
values in the key of Triton's tuning, such as the width of a head, and the dtypes of all tensors. The file is written by
`vfi tune-kernels`, and includes the fused Triton kernels of this project (vfi/ops/triton/launch_config.py). It is valid for the
version of Triton that measured it: another one may need more memory for the same blocks.
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
"""Kernel name -> [{"key": shape class, "config": {"kwargs", "num_warps", "num_stages"}}]; of fused kernels {"num_warps", …}."""


def tuners() -> Iterator[Any]:
    """Yield all kernels with several configurations in the imported modules: triton.runtime.Autotuner."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith(_PACKAGE):
            for value in list(vars(module).values()):
                if type(value).__name__ == "Autotuner" and value.base_fn.__module__ == name:
                    yield value


def card(device: torch.device) -> str:
    """Return generation and compiler, such as "sm_90, triton 3.6", which identify a measurement."""
    major, minor = torch.cuda.get_device_capability(device)
    triton = ".".join(importlib.metadata.version("triton").split(".")[:2])
    return f"sm_{major}{minor}, triton {triton}"


def entry(device: torch.device, path: Path = FILE, whose: str = "kernels") -> Kernels:
    """Return the configurations for a GPU, of mamba-ssm's kernels or of "fused" (this project's); empty for others."""
    known: Kernels = json.loads(path.read_text()).get(card(device), {}).get(whose, {})
    return known


def fill(found_tuners: Iterable[Any], kernels: Mapping[str, list[dict[str, Any]]]) -> int:
    """Fill in the tuners' known configurations, and return their number. Configurations that a kernel lacks are skipped."""
    count = 0
    for tuner in found_tuners:
        for known in kernels.get(tuner.base_fn.__name__, ()):
            same = [config for config in tuner.configs if _written(config) == known["config"]]
            if same:
                tuner.cache[tuple(known["key"])] = same[0]
                count += 1
    return count


def found(found_tuners: Iterable[Any]) -> Kernels:
    """Return the configurations that the tuners have chosen so far, by kernel and shape class."""
    return {
        tuner.base_fn.__name__: [
            {"key": list(key), "config": _written(config)} for key, config in sorted(tuner.cache.items(), key=str)
        ]
        for tuner in found_tuners
        if tuner.cache
    }


def _written(config: Any) -> dict[str, Any]:
    return {"kwargs": dict(config.kwargs), "num_warps": config.num_warps, "num_stages": config.num_stages}
