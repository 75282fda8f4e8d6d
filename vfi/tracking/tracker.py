"""Record the metrics of a run in metrics.jsonl and TensorBoard, on the main process only.

metrics.jsonl   one JSON object a line: {"step": 100, "event": "train", "loss": …}; docs/training.md names the events
tensorboard/    the same as curves, and images of the validation
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vfi.io.dataclass_json import write_text
from vfi.tracking.environment import METRICS, TENSORBOARD

_CHARTS = {
    "at a glance": {
        "PSNR": ["Multiline", ["val/psnr", "val/average_psnr"]],
        "gain over the frame average": ["Multiline", ["val/gain"]],
        "loss": ["Multiline", ["train/loss"]],
        "gradient": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "samples a second": ["Multiline", ["train/samples_per_s"]],
    }
}
"""The charts of the tab Custom Scalars; the tab Scalars sorts all of them by name."""


class Tracker:
    """Writes metrics and images of one run; on processes other than the main one it does nothing."""

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
        self.board.add_custom_scalars(_CHARTS)

    def has(self, step: int, event: str) -> bool:
        """Return whether the run logged such a row before it was resumed; True on processes other than the main one."""
        return not self.is_main or (step, event) in self.kept

    def log(self, step: int, event: str, **values: float | list[str]) -> None:
        """Log a row of numbers and names; a non-finite number becomes null, which JSON can hold."""
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
        """Log images `[3, H, W]` in [0, 1], each of its own, in full size."""
        if not self.is_main:
            return
        for kind, picture in pictures.items():
            self.board.add_image(f"{name}/{kind}", picture.detach().float().clamp(0, 1).cpu(), step)

    def close(self) -> None:
        """Flush everything to disk."""
        if self.is_main:
            self.file.close()
            self.board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a truncated last line."""
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
