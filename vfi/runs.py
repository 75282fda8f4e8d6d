"""List all runs and their progress (`vfi runs`).

    vfi runs
    vfi runs --output_dir /data/runs --json

The state of a run is what its main process recorded in status.json, and whether that process still exists. Step, epoch and
PSNR come from metrics.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from shards.cli import parse_flags
from vfi.checkpoint.store import CONFIG, latest
from vfi.config.configs import ConfigError
from vfi.errors import JobError, clear_errors
from vfi.io.dataclass_json import config_from_json
from vfi.io.text_table import aligned
from vfi.tracking.environment import METRICS
from vfi.tracking.run_status import STATES, age, read_status
from vfi.tracking.tracker import read_rows


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the command."""

    output_dir: Path = Path("runs")
    """Folder of all runs."""
    json: bool = False
    """Print a JSON list in place of the table."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Numbers of a run folder; None if unknown."""

    name: str
    preset: str | None
    phase: int | None
    state: str
    why: str
    step: int
    total: int | None
    checkpoint: int | None
    """Step of the newest checkpoint."""
    epoch: float | None
    best_psnr: float | None
    gain: float | None
    """Of the best PSNR over the frame average, in dB."""
    last_activity: float
    """Seconds since 1970."""


@clear_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: print a line for each run, the most recently active first."""
    options = parse_flags(Options, "vfi runs", __doc__, argv)
    if not options.output_dir.is_dir():
        raise JobError(f"--output_dir {options.output_dir} is not a folder: give the folder that the runs lie in")
    runs = sorted(map(describe, run_folders(options.output_dir)), key=lambda run: run.last_activity, reverse=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], indent=1))
        return
    print(table(runs) if runs else f"no run in {options.output_dir}")


def run_folders(output_dir: Path) -> list[Path]:
    """Return the folders in `output_dir` that a training run wrote."""
    return [path for path in output_dir.iterdir() if (path / CONFIG).is_file() or (path / "checkpoints").is_dir()]


def describe(folder: Path) -> Run:
    """Return what a run folder holds about its run."""
    status, newest = read_status(folder), latest(folder)
    why = status.why
    try:
        config = config_from_json((folder / CONFIG).read_text(), CONFIG, quiet=True)
        preset, phase, planned = config.run.preset, int(config.model.phase), config.run.steps
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        preset, phase, planned, why = None, None, None, why or f"{CONFIG} cannot be read: {error}"
    rows = read_rows(folder / METRICS)
    scores = [row for row in rows if row.get("event") == "val" and row.get("psnr") is not None]
    best = max(scores, key=lambda row: row["psnr"], default=None)
    epochs = [row["epoch"] for row in rows if "epoch" in row]
    files = [path for path in (folder / METRICS, newest.path if newest else folder, folder) if path.exists()]
    return Run(
        name=folder.name,
        preset=preset,
        phase=phase,
        state=status.state,
        why=why,
        step=max([row["step"] for row in rows] + [newest.step if newest else 0]),
        total=status.total or planned,
        checkpoint=newest.step if newest else None,
        epoch=epochs[-1] if epochs else None,
        best_psnr=best["psnr"] if best else None,
        gain=best["psnr"] - best["average_psnr"] if best else None,
        last_activity=max(path.stat().st_mtime for path in files),
    )


def table(runs: Sequence[Run]) -> str:
    """Return runs as aligned text, followed by the reasons of those that did not finish."""
    head = ("run", "preset", "phase", "state", "step", "saved", "epoch", "best PSNR", "gain", "last activity")
    rows = [head] + [
        (
            run.name,
            run.preset or "?",
            str(run.phase or "?"),
            run.state,
            f"{run.step}/{run.total or '?'}",
            "-" if run.checkpoint is None else str(run.checkpoint),
            "-" if run.epoch is None else f"{run.epoch:.1f}",
            "-" if run.best_psnr is None else f"{run.best_psnr:.2f} dB",
            "-" if run.gain is None else f"{run.gain:+.2f} dB",
            f"{age(run.last_activity)} ago",
        )
        for run in runs
    ]
    lines = [aligned(rows, left=range(len(head)))]
    states = sorted({run.state for run in runs}, key=list(STATES).index)
    lines += ["", *(f"{state}: {STATES[state]}" for state in states)]
    return "\n".join(lines + [f"{run.name}: {run.why}" for run in runs if run.why])


if __name__ == "__main__":
    main()
