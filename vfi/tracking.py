"""Where do a run's numbers go? metrics.jsonl and TensorBoard, written by the main process only.

metrics.jsonl   one JSON object a line: {"step": 100, "event": "train", "loss": …}; events: train, val, fault, stop, batch
tensorboard/    the same as curves, and pictures of the validation
"""

from __future__ import annotations

import functools
import json
import math
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vfi.io.dataclass_json import write_text
from vfi.runtime.numerics import numerics
from vfi.runtime.versions import package_version, project_version

METRICS, TENSORBOARD, ENVIRONMENT = "metrics.jsonl", "tensorboard", "environment.json"
_PACKAGES = ("torch", "accelerate", "webdataset", "triton", "mamba-ssm", "numpy", "av", "simplejpeg", "safetensors")


class Tracker:
    """Writes numbers and pictures of one run; on every process but the main one it does nothing."""

    def __init__(self, run_folder: Path, resume_step: int, is_main: bool) -> None:
        self.is_main = is_main
        if not is_main:
            return
        run_folder.mkdir(parents=True, exist_ok=True)
        path = run_folder / METRICS
        kept = [line for line in read_rows(path) if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))  # whole or not at all: a kill must not cost rows
        self.kept = {(line["step"], line.get("event")) for line in kept}
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(run_folder / TENSORBOARD), purge_step=resume_step + 1)

    def has(self, step: int, event: str) -> bool:
        """Did the run log such a row before it was resumed? Known on the main process; the others say yes."""
        return not self.is_main or (step, event) in self.kept

    def log(self, step: int, event: str, **values: float | list[str]) -> None:
        """One row of numbers, and of names of what they count; a number that isn't finite is null, which JSON can hold."""
        if not self.is_main:
            return
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "event": event} | row) + "\n")
        for name, value in values.items():
            if isinstance(value, list):
                self.board.add_text(f"{event}/{name}", "\n".join(f"- {text}" for text in value), step)
            else:
                self.board.add_scalar(f"{event}/{name}", value, step)

    def pictures(self, step: int, name: str, pictures: dict[str, Tensor]) -> None:
        """Pictures `[3, H, W]` in [0, 1] side by side in one strip."""
        if not self.is_main:
            return
        strip = torch.cat([picture.detach().float().clamp(0, 1).cpu() for picture in pictures.values()], dim=2)
        self.board.add_image(f"{name} ({' | '.join(pictures)})", strip, step)

    def close(self) -> None:
        """Flush everything to disk."""
        if self.is_main:
            self.file.close()
            self.board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def environment(device: torch.device) -> dict[str, Any]:
    """What a run ran on: command, versions, hardware, state of the source."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        **_gpu_versions(device.type == "cuda"),
        **numerics(),
        "git": git_state(),
    }


def _gpu_versions(used: bool) -> dict[str, Any]:
    """Of what lies between torch and a GPU, where one is used."""
    driver = Path("/sys/module/nvidia/version")
    return {
        "cuda": torch.version.cuda if used else None,
        "cudnn": torch.backends.cudnn.version() if used else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if used and torch.distributed.is_nccl_available() else None,
        "driver": driver.read_text().strip() if used and driver.exists() else None,
    }


def write_environment(run_folder: Path, now: dict[str, Any]) -> None:
    """Write environment.json: what the run runs on now and, of its earlier starts, when they were and what was different."""
    path, always = run_folder / ENVIRONMENT, ("started", "from_step")
    now = {"started": datetime.now(UTC).isoformat(timespec="seconds"), **now}
    before = read_environment(path)
    starts = [before | start for start in before.pop("earlier", [])] + ([before] if before else [])
    earlier = [{name: value for name, value in start.items() if name in always or value != now.get(name)} for start in starts]
    write_text(path, json.dumps(now | {"earlier": earlier}, indent=1) + "\n")


def read_environment(path: Path) -> dict[str, Any]:
    """What an environment.json holds; nothing where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def versions() -> dict[str, str]:
    """Versions of what a checkpoint depends on."""
    return {"torch": torch.__version__, "project": project_version(), "git": git_state()}


@functools.cache
def git_state() -> str:
    """Commit of the source, with '+changes' when files differ from it; 'unknown' outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")
