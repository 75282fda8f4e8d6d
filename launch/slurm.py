"""Query and cancel jobs through Slurm's own commands, each under a timeout.

states(["4711", "4712_3"])     {"4711": JobState("RUNNING", ""), "4712_3": JobState("FAILED", "exit code 2")}
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vfi.errors import JobError

_PATIENCE = 60.0  # timeout of a command in seconds
_AT_ONCE = 200  # job ids per command line
_ARRAY = re.compile(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]")


class JobState(NamedTuple):
    """State of one job, or of one task of an array."""

    state: str
    """Slurm's name of the state: PENDING, RUNNING, COMPLETED, FAILED …; UNKNOWN when Slurm no longer knows the job."""
    why: str


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return the state of each job: from squeue if it is in the queue, otherwise from sacct.

    Raises JobError when squeue is not found, fails or times out; a failure of sacct becomes the reason of UNKNOWN jobs.
    """
    asked = set(job_ids)
    if not asked:
        return {}
    if not shutil.which("squeue"):
        raise JobError("squeue was not found, so this machine has no Slurm: ask on a login node")
    own = ["--user", name] if (name := user_name()) else []  # squeue refuses ids without a name
    queue = _call("squeue", "--noheader", "--array", *own, "--format", "%i|%T|%r")
    found = {job: JobState(state, _reason(why)) for job, state, why in _fields(queue, 3) if job in asked}
    ended = sorted({job.partition("_")[0] for job in asked - set(found)})
    why = "Slurm knows nothing of it any more"
    try:
        for start in range(0, len(ended), _AT_ONCE):
            found = _accounted(ended[start : start + _AT_ONCE], asked) | found
    except JobError as error:  # a cluster may not keep accounts; the run folders still hold some information
        why = str(error)
    return found | {job: JobState("UNKNOWN", why) for job in asked - set(found)}


def user_name() -> str | None:
    """Return the name of the user; None for an id without a name, as in containers that run under any user's."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None


def _accounted(job_ids: Sequence[str], asked: set[str]) -> dict[str, JobState]:
    rows = _call(
        "sacct", "--allocations", "--noheader", "--parsable2", "--format", "JobID,State,ExitCode", "--jobs", ",".join(job_ids)
    )
    found: dict[str, JobState] = {}
    for job, state, code in _fields(rows, 3):
        word = state.split()[0]  # "CANCELLED by 1000"
        status, _, number = code.partition(":")
        why = f"exit code {status}" if status != "0" else f"signal {number}" if number not in ("", "0") else ""
        found |= {one: JobState(word, why) for one in _single(job) if one in asked}
    return found


def _single(job: str) -> list[str]:
    """Expand an array's notation into its tasks: 4712_[3,5-7%2] -> 4712_3, 4712_5, 4712_6, 4712_7."""
    many = _ARRAY.fullmatch(job)
    if not many:
        return [job]
    ranges = [(part.partition("-")[0], part.rpartition("-")[2]) for part in many[2].split(",")]
    return [f"{many[1]}_{task}" for first, last in ranges for task in range(int(first), int(last) + 1)]


def cancel(job_ids: Sequence[str]) -> None:
    """Remove jobs from the queue; running ones are told to stop, save, and end."""
    for start in range(0, len(job_ids), _AT_ONCE):
        _call("scancel", *job_ids[start : start + _AT_ONCE])


def _reason(why: str) -> str:
    return "" if why == "None" else why


def _fields(text: str, number: int) -> list[list[str]]:
    rows = (line.split("|") for line in text.splitlines())
    return [row for row in rows if len(row) == number]


def _call(*command: str) -> str:
    """Return the output of a Slurm command; raise JobError with its message when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE)
    except FileNotFoundError as error:
        raise JobError(f"{command[0]} was not found, so this machine has no Slurm: use a login node") from error
    except subprocess.TimeoutExpired as error:
        raise JobError(
            f"{command[0]} has not answered within {_PATIENCE:.0f} s: is Slurm's controller up (scontrol ping)?"
        ) from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip()
        raise JobError(f"{command[0]} failed with exit code {error.returncode}: {said}") from error
    return done.stdout
