"""Table of an ablation: validation PSNR of its experiments in Markdown, as means over their seeds.

    print(ablation_table(Path("runs"), "phase1"))
    mean_psnr(Path("runs"), "phase1")["Exp-1c"]

Runs are identified by the preset in their config.json; only finished ones count.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vfi.checkpoint.store import CONFIG
from vfi.config.configs import Config, ConfigError
from vfi.config.presets import ABLATIONS, AblationName, experiments
from vfi.errors import JobError
from vfi.io.dataclass_json import config_from_json
from vfi.tracking.environment import METRICS
from vfi.tracking.run_status import read_status
from vfi.tracking.tracker import read_rows

_COMPARED_WITH = {"phase1": "Exp-1c", "phase2": "Exp-2c", "phase3": "Exp-3a"}
_OF_EACH_RUN = {"preset", "exp_name", "seed", "resume", "start_from", "output_dir", "batch_size", "num_workers"}


class _Run(NamedTuple):
    """One run of an experiment."""

    config: Config
    finished: bool
    psnr: float | None
    """PSNR of the last validation, in dB."""
    average: float | None
    """PSNR of the frame average on the same samples, in dB."""


def ablation_table(output_dir: Path, ablation: AblationName) -> str:
    """Return the table of the runs in `output_dir`; JobError when none of them belongs to this ablation."""
    rows = experiments(ablation)
    found = _runs_of(output_dir, ablation)
    if not any(found.values()):
        raise JobError(f"--output_dir {output_dir} has no run of --ablation {ablation}: its presets are {', '.join(rows)}")
    reference = _COMPARED_WITH[ablation]
    scores = {row: _scores(found[row]) for row in rows}
    means = _means(found)
    head = ("experiment", "what is different", "finished", "PSNR dB", "± over seeds", f"gain over {reference} dB")
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        psnr = scores[row]
        mean = f"{means[row]:.2f}" if psnr else "-"
        spread = f"{statistics.stdev(psnr):.2f}" if len(psnr) > 1 else "-"
        compared = psnr and reference in means and row != reference
        gain = f"{means[row] - means[reference]:+.2f}" if compared else "-"
        different = ", ".join(f"{name} {value}" for name, value in ABLATIONS[row].items()) or "nothing"
        lines.append(f"| {row} | {different} | {len(psnr)} of {len(found[row])} | {mean} | {spread} | {gain} |")
    counted = [run for row in rows for run in found[row] if run.finished and run.psnr is not None]
    return "\n".join([*lines, "", *_notes(counted, {name for row in rows for name in ABLATIONS[row]})])


def mean_psnr(output_dir: Path, ablation: AblationName) -> dict[str, float]:
    """Return the PSNR in dB, as the mean over seeds, of each experiment that has a finished run in `output_dir`."""
    return _means(_runs_of(output_dir, ablation))


def _runs_of(output_dir: Path, ablation: AblationName) -> dict[str, list[_Run]]:
    """Return the runs of every experiment, in the order of the table."""
    runs = _read_runs(output_dir)
    return {row: [run for run in runs if run.config.run.preset == row] for row in experiments(ablation)}


def _scores(runs: Sequence[_Run]) -> list[float]:
    """Return the PSNR of the runs that count."""
    return [run.psnr for run in runs if run.finished and run.psnr is not None]


def _means(found: dict[str, list[_Run]]) -> dict[str, float]:
    return {row: statistics.mean(psnr) for row, runs in found.items() if (psnr := _scores(runs))}


def _read_runs(output_dir: Path) -> list[_Run]:
    runs = []
    for folder in sorted(path.parent for path in output_dir.glob(f"*/{CONFIG}")):
        try:
            config = config_from_json((folder / CONFIG).read_text(), str(folder / CONFIG), quiet=True)
        except (OSError, ConfigError) as error:
            raise JobError(f"{folder} is not a usable run: {error}") from error
        last: dict[str, Any] = next((row for row in reversed(read_rows(folder / METRICS)) if row.get("event") == "val"), {})
        runs.append(_Run(config, read_status(folder).state == "finished", last.get("psnr"), last.get("average_psnr")))
    return runs


def _notes(runs: Sequence[_Run], varied: set[str]) -> list[str]:
    """Describe what was measured, and settings in which the runs differ but should not."""
    if not runs:
        return ["No run has finished yet."]
    averages = sorted({f"{run.average:.2f} dB" for run in runs if run.average is not None})
    notes = [f"PSNR of the last validation; the frame average has {', '.join(averages)}."]
    for group in ("run", "data", "optim", "model"):
        for field in dataclasses.fields(getattr(runs[0].config, group)):
            values: set[Any] = {getattr(getattr(run.config, group), field.name) for run in runs}
            if len(values) > 1 and field.name not in varied | _OF_EACH_RUN:
                notes.append(f"The runs differ in --{field.name}, too: {', '.join(sorted(map(str, values)))}.")
    return notes
