"""How is a run stopped? JOB: takes its job out of the queue; training that runs saves first.

    python -m launch.cancel first phase1_Exp-1a_seed0
    python -m launch.cancel --all --output_dir /data/runs

It goes on by `python -m launch.resubmit NAME`.
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
from vfi.errors import JobError, clear_errors


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Runs."""
    all: bool = False
    """All runs of --output_dir that wait or run."""
    output_dir: Path = Path("runs")
    """Folder of all runs."""


@clear_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """The job: cancel what waits or runs, and say so."""
    options = tyro.cli(Options, prog="python -m launch.cancel", description=__doc__, args=argv)
    if bool(options.names) == options.all:
        raise JobError("name the runs to cancel, or give --all")
    runs = [run for run in look(options.output_dir, options.names) if run.goes_on]
    slurm.cancel([run.job_id for run in runs if run.submission.cluster == "slurm"])
    for run in runs:
        if run.submission.cluster == "local" and is_controller(run.job_id, run.submission):
            os.kill(int(run.job_id), signal.SIGTERM)  # it passes it on, and training saves
        print(f"cancelled: {run.name} (job {run.job_id}, {run.state})")
    if not runs:
        print("none of them waits or runs")


if __name__ == "__main__":
    main()
