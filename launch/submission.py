"""Description of a run for its queued job: submission.json, written before queueing and read on every node."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from vfi.errors import JobError
from vfi.io.dataclass_json import RecordError, from_object, to_json, write_text

LAUNCH, SUBMISSION, QUEUED = "launch", "submission.json", "queued.json"


@dataclasses.dataclass(frozen=True)
class Submission:
    """One run and the nodes that it requests; all paths are absolute."""

    name: str
    job: Literal["train", "benchmark"]
    arguments: tuple[str, ...]
    """Command-line arguments of vfi.train or vfi.benchmark."""
    run_folder: str
    code: str
    """Folder with a copy of the packages as submitted."""
    logs: str
    """Folder of Slurm's (or submitit's) own logs and of the batch script."""
    nodes: int
    processes: int
    """Processes on each node: one per GPU."""
    gpus: bool
    python: str
    """Interpreter of the training processes, optionally preceded by a container command."""
    accelerate_config: str
    """Config file of `accelerate launch`, which sets parallelism and precision."""
    precision: str
    """Mixed precision: bf16, fp16 or fp32."""
    requeues: int
    """Number of times that the run may be restarted without having made progress."""
    cluster: Literal["slurm", "local", "debug"]
    parameters: dict[str, Any]
    """Parameters of submitit's Slurm executor."""
    after: str = ""
    """Folder of the run that must finish first; empty when there is none."""


@dataclasses.dataclass(frozen=True)
class Queued:
    """Content of queued.json: the job that a submission became."""

    job_id: str
    submitted: float
    """Seconds since 1970."""


def read_submission(path: Path) -> Submission:
    """Read the submission at `path`; raise JobError when it is not usable."""
    found: Submission = _read(Submission, path)
    return found


def read_queued(folder: Path) -> Queued:
    """Read the job of the submission in `folder`; raise JobError when it is not known."""
    found: Queued = _read(Queued, folder / QUEUED)
    return found


def _read(kind: type, path: Path) -> Any:
    try:
        return from_object(kind, json.loads(path.read_bytes()), str(path), defaulted=[])
    except (OSError, ValueError, RecordError) as error:
        raise JobError(f"{path} is not usable: {error}") from error


def write_submission(folder: Path, submission: Submission) -> Path:
    """Write submission.json into `folder` and return its path."""
    path = folder / SUBMISSION
    write_text(path, to_json(submission))
    return path


def new_folder(run_folder: Path) -> Path:
    """Create the folder of the next submission of a run: launch/1, launch/2 …"""
    folder = next_folder(run_folder)
    folder.mkdir(parents=True)
    return folder


def next_folder(run_folder: Path) -> Path:
    """Return the folder that `new_folder` would create."""
    numbers = submissions(run_folder)
    return run_folder / LAUNCH / str(int(numbers[-1].name) + 1 if numbers else 1)


def submissions(run_folder: Path) -> list[Path]:
    """Return the folders of all submissions of a run, in numerical order."""
    found = (path for path in (run_folder / LAUNCH).glob("*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))
