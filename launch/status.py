"""Show the state and progress of submitted runs.

    python -m launch.status                       all runs in runs/
    python -m launch.status first phase1_Exp-1a_seed0 --output_dir /data/runs

Prints one line per run: the state of its job from Slurm (or, without Slurm, whether its process is alive), steps, PSNR, and the
remaining time at the rate of the last steps, excluding validations.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro

from launch import slurm
from launch.node.rendezvous_files import last_outcome
from launch.slurm import JobState
from launch.submission import QUEUED, SUBMISSION, Submission, read_queued, read_submission, submissions
from shards.cli import parse_flags
from vfi.errors import JobError, clear_errors
from vfi.io.dataclass_json import config_from_json
from vfi.io.text_table import aligned
from vfi.runtime.logging import logger
from vfi.tracking.run_status import read_status

WAITING = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "SIGNALING")
"""States of a job that is still in the queue or running and needs no resubmission."""
_LAST = 5  # rows of metrics over which the rate is averaged


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command, one per field."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of the runs to show; default: all."""
    output_dir: Path = Path("runs")
    """Folder that holds all runs."""


@dataclasses.dataclass(frozen=True)
class SubmittedRun:
    """A run, its newest submission, and its progress; None stands for unknown values."""

    name: str
    folder: Path
    submission: Submission
    job_id: str
    state: str
    """State of the job, as Slurm names it."""
    why: str
    attempts: int
    step: int = 0
    total: int | None = None
    psnr: float | None = None
    """PSNR of the last validation, in dB."""
    eta: float | None = None
    """Estimated seconds until the last step."""

    @property
    def goes_on(self) -> bool:
        """Whether the run is in the queue or running."""
        return self.state in WAITING

    @property
    def finished(self) -> bool:
        """Whether the run has completed."""
        return self.state == "COMPLETED"


@clear_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: print one line per run, sorted by name unless names are given."""
    options = parse_flags(Options, "python -m launch.status", __doc__, argv)
    print(table(look(options.output_dir, options.names)))


def look(output_dir: Path, names: Sequence[str] = ()) -> list[SubmittedRun]:
    """Return the submitted runs in a folder, all or those named; raise JobError for a name that was never submitted."""
    if not output_dir.is_dir():
        raise JobError(f"--output_dir {output_dir} is not a folder: give the folder that the runs lie in")
    folders = {path.name: path.absolute() for path in output_dir.iterdir() if _newest(path)}
    if unknown := [name for name in names if name not in folders]:
        raise JobError(f"{', '.join(unknown)}: no such run was submitted in {output_dir}")
    return query_runs([folders[name] for name in (names or sorted(folders))])


def query_runs(folders: Sequence[Path]) -> list[SubmittedRun]:
    """Return the runs in those of the folders that were submitted; unreadable submissions are left out with a note."""
    found: dict[Path, tuple[Submission, str]] = {}
    for folder in folders:
        if newest := _newest(folder):
            try:
                found[folder] = read_submission(newest / SUBMISSION), read_queued(newest).job_id
            except JobError as error:  # written by another version: show the other runs nevertheless
                logger.warning(f"{folder.name} is left out: {error}")
    states = slurm.states(job_id for submission, job_id in found.values() if submission.cluster == "slurm")
    return [_launched(folder, submission, job_id, states) for folder, (submission, job_id) in found.items()]


def _newest(folder: Path) -> Path | None:
    """Return the folder of the run's newest submission that was queued; None when there is none."""
    queued = [path for path in submissions(folder) if (path / SUBMISSION).is_file() and (path / QUEUED).is_file()]
    return queued[-1] if queued else None


def _launched(folder: Path, submission: Submission, job_id: str, states: dict[str, JobState]) -> SubmittedRun:
    state = states.get(job_id, JobState("UNKNOWN", ""))
    if state.state == "UNKNOWN":
        state = _without_slurm(folder, submission, job_id) or state
    attempts = len(list(folder.glob("launch/attempts/*/begin.json")))
    plain = SubmittedRun(folder.name, folder, submission, job_id, *state, attempts=attempts)
    if submission.job != "train":
        return plain
    rows = list(_rows(folder / "metrics.jsonl"))
    step = max((row["step"] for row in rows), default=0)
    scores = [row["psnr"] for row in rows if row.get("event") == "val" and row.get("psnr") is not None]
    total = read_status(folder).total or None
    eta = _seconds_left(folder, submission, rows, total - step) if total and state.state == "RUNNING" else None
    return dataclasses.replace(plain, step=step, total=total, psnr=scores[-1] if scores else None, eta=eta)


def _without_slurm(folder: Path, submission: Submission, job_id: str) -> JobState | None:
    """Return the state of a local job, or of one unknown to Slurm, from its process and the outcome of its last attempt."""
    if submission.cluster == "local" and is_controller(job_id, submission):
        return JobState("RUNNING", "")
    outcome = last_outcome(folder, submission.nodes)
    if outcome is None:
        return None if submission.cluster == "slurm" else JobState("FAILED", "it exited without reporting a status")
    return JobState({"done": "COMPLETED", "stopped": "CANCELLED"}.get(outcome.kind, "FAILED"), outcome.why)


def is_controller(job_id: str, submission: Submission) -> bool:
    """Return whether the process that submitit's local executor started for this submission is still alive."""
    try:
        return submission.logs.encode() in Path(f"/proc/{int(job_id)}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False


def _seconds_left(folder: Path, submission: Submission, rows: list[dict[str, Any]], steps: int) -> float | None:
    rates = [row["samples_per_s"] for row in rows if row.get("samples_per_s")][-_LAST:]
    if not rates:
        return None
    data = config_from_json((folder / "config.json").read_text(), "config.json", quiet=True).data
    batch = data.global_batch or data.batch_size * submission.nodes * submission.processes
    return steps * batch * len(rates) / sum(rates)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the rows of metrics.jsonl; stop at a line that is not complete yet."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def table(runs: Sequence[SubmittedRun]) -> str:
    """Return an aligned text table with one line per run, followed by the reasons for their states where known."""
    if not runs:
        return "no run was submitted here"
    rows = [("run", "job", "state", "attempts", "step", "PSNR", "left")]
    for run in runs:
        steps = f"{run.step}" + f" of {run.total}" * bool(run.total)
        psnr = "-" if run.psnr is None else f"{run.psnr:.2f} dB"
        rows.append(
            (run.name, run.job_id, run.state, str(run.attempts), steps, psnr, "-" if run.eta is None else _time(run.eta))
        )
    lines = [aligned(rows, left=range(len(rows[0])))]
    return "\n".join(lines + [f"{run.name}: {run.why}" for run in runs if run.why])


def _time(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    return f"{days}-" * bool(days) + f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


if __name__ == "__main__":
    main()
