"""Cancel the jobs of runs; a running training saves before it stops.

    python -m launch.cancel first phase1_Exp-1a_seed0
    python -m launch.cancel --all --output_dir /data/runs

`python -m launch.resubmit NAME` resumes a cancelled run.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import tyro

from launch import slurm
from launch.status import is_controller, look
from shards.cli import parse_flags
from vfi.errors import JobError, clear_errors


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command, one per field."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of the runs to cancel."""
    all: bool = False
    """Cancel all runs in --output_dir that are queued or running."""
    output_dir: Path = Path("runs")
    """Folder that holds all runs."""


@clear_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: cancel the runs that are queued or running, and print their names."""
    options = parse_flags(Options, "python -m launch.cancel", __doc__, argv)
    if bool(options.names) == options.all:
        raise JobError("name the runs to cancel, or give --all")
    runs = [run for run in look(options.output_dir, options.names) if run.goes_on]
    slurm.cancel([run.job_id for run in runs if run.submission.cluster == "slurm"])
    for run in runs:
        if run.submission.cluster == "local" and is_controller(run.job_id, run.submission):
            os.kill(int(run.job_id), signal.SIGTERM)  # submitit's controller forwards the signal, and training saves
        print(f"cancelled: {run.name} (job {run.job_id}, {run.state})")
    if not runs:
        print("none of them waits or runs")


if __name__ == "__main__":
    main()
