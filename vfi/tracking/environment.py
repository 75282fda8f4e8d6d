"""The environment of a run: command, versions, hardware and state of the source."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vfi.credentials import redact_all
from vfi.io.dataclass_json import write_text
from vfi.runtime.device import describe_precision
from vfi.runtime.numerics import numerics
from vfi.runtime.versions import package_version, project_version

METRICS, TENSORBOARD, ENVIRONMENT = "metrics.jsonl", "tensorboard", "environment.json"
_PACKAGES = ("torch", "accelerate", "webdataset", "triton", "mamba-ssm", "numpy", "av", "simplejpeg", "safetensors")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the environment of a run: command, versions, hardware, state of the source."""
    return {
        "command": redact_all(sys.argv),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        **_gpu_versions(device.type == "cuda"),
        **numerics(),
        "git": git_state(),
    }


def _gpu_versions(used: bool) -> dict[str, Any]:
    """Return the versions of driver and libraries between torch and a GPU, where one is used."""
    driver = Path("/sys/module/nvidia/version")
    return {
        "cuda": torch.version.cuda if used else None,
        "cudnn": torch.backends.cudnn.version() if used else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if used and torch.distributed.is_nccl_available() else None,
        "driver": driver.read_text().strip() if used and driver.exists() else None,
    }


def write_environment(run_folder: Path, now: dict[str, Any]) -> None:
    """Write environment.json: the present environment and, for earlier starts, their time and what was different."""
    path, always = run_folder / ENVIRONMENT, ("started", "from_step")
    now = {"started": datetime.now(UTC).isoformat(timespec="seconds"), **now}
    before = read_environment(path)
    starts = [before | start for start in before.pop("earlier", [])] + ([before] if before else [])
    earlier = [{name: value for name, value in start.items() if name in always or value != now.get(name)} for start in starts]
    write_text(path, json.dumps(now | {"earlier": earlier}, indent=1) + "\n")


def read_environment(path: Path) -> dict[str, Any]:
    """Return the content of an environment.json; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def versions() -> dict[str, str]:
    """Return the versions of what a checkpoint depends on."""
    return {"torch": torch.__version__, "project": project_version(), "git": git_state()}


@functools.cache
def git_state() -> str:
    """Return the commit of the source, with '+changes' when files differ from it; 'unknown' outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def benchmark_environment(device: torch.device, precision: torch.dtype, world: int, command: str) -> dict[str, str]:
    """Return the environment of a measurement, in readable words."""
    return {
        "device": _hardware(device),
        "processes": str(world),
        "precision": describe_precision(precision),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": git_state(),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    names = [line.partition(":")[2].strip() for line in _cpu_facts() if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_facts() -> list[str]:
    facts = Path("/proc/cpuinfo")
    return facts.read_text().splitlines() if facts.is_file() else []
