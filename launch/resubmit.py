"""Requeue the runs that ended before they finished, with the code as it is now.

    python -m launch.resubmit                                  all runs in runs/
    python -m launch.resubmit phase1_Exp-1a_seed0 --output_dir /data/runs
    python -m launch.resubmit --dry_run                        only list them

Each run resumes from its newest checkpoint, with the settings and resources of its last submission. Runs of one ablation become
one array again; a run of a chain that waits for an earlier one waits for that run's new job.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from launch.queue import enqueue, enqueue_each, waiting_for
from launch.status import SubmittedRun, look
from launch.submission import Submission, read_queued
from shards.cli import parse_flags
from vfi.errors import JobError, clear_errors


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command, one per field."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of the runs to requeue; default: all that ended before they finished."""
    output_dir: Path = Path("runs")
    """Folder that holds all runs."""
    dry_run: bool = False
    """Only list the runs, and queue nothing."""


@clear_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: find the runs, queue them, and print their new jobs."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_flags(Options, "python -m launch.resubmit", __doc__, argv)
    everything = look(options.output_dir)
    chosen = look(options.output_dir, options.names) if options.names else everything
    runs = [run for run in chosen if not run.goes_on and not run.finished]
    for run in runs:
        print(f"{run.name}: job {run.job_id} is {run.state}{', ' * bool(run.why)}{run.why}, at step {run.step}")
    if not runs or options.dry_run:
        print(f"{len(runs)} of {len(chosen)} runs ended without having finished")
        return
    for folder in resubmit(runs, everything, ["python", "-m", "launch.resubmit", *argv]):
        print(f"{folder.parents[1].name}: job {read_queued(folder).job_id}")


def resubmit(runs: Sequence[SubmittedRun], everything: Sequence[SubmittedRun], command: Sequence[str]) -> list[Path]:
    """Requeue `runs` and return the folders of their new submissions; `everything` holds all runs that they may wait for.

    Raises JobError for runs of --cluster debug.
    """
    if here := [run.name for run in runs if run.submission.cluster == "debug"]:
        raise JobError(f"{', '.join(here)} ran by --cluster debug: give its command again, with --resume auto")
    arrays: dict[tuple[Path, str, str], list[Submission]] = {}
    single: list[Submission] = []
    for run in runs:
        shared = Path(run.submission.logs).parents[2]
        if shared == run.folder:
            single.append(_waiting(run, everything))
        else:
            asked = json.dumps(run.submission.parameters, sort_keys=True)
            key = shared, asked, Path(run.submission.accelerate_config).read_text()
            arrays.setdefault(key, []).append(run.submission)
    folders = list[Path]()
    for cluster in ("slurm", "local"):
        drafts = [draft for draft in single if draft.cluster == cluster]
        folders += enqueue_each(sorted(drafts, key=lambda draft: draft.name), command)  # the phases of a chain in their order
    for (shared, *_), drafts in arrays.items():
        folders += enqueue(drafts, shared, command)
    return folders


def _waiting(run: SubmittedRun, everything: Sequence[SubmittedRun]) -> Submission:
    """Return the submission with its dependency removed, or replaced by the current job of the run that it waits for."""
    parameters = {name: value for name, value in run.submission.parameters.items() if name != "dependency"}
    before = next((other for other in everything if str(other.folder) == run.submission.after), None)
    if before and before.goes_on:
        parameters = waiting_for(before.job_id, parameters)
    return dataclasses.replace(run.submission, parameters=parameters)


if __name__ == "__main__":
    main()
