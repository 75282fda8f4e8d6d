"""What does a queued job know of its run? submission.json, written before it is queued, read on every node."""

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
    """One run and the nodes that it asks for; paths are absolute."""

    name: str
    job: Literal["train", "benchmark"]
    arguments: tuple[str, ...]
    """Of vfi.train or vfi.benchmark."""
    run_folder: str
    code: str
    """Folder with the packages as they were submitted."""
    logs: str
    """Folder of Slurm's (or submitit's) own logs and of the batch script."""
    nodes: int
    processes: int
    """On each node: one a GPU."""
    gpus: bool
    python: str
    """Interpreter of the training processes, perhaps with a container's command before it."""
    accelerate_config: str
    """File for `accelerate launch`: how processes and precision are arranged."""
    precision: str
    """bf16, fp16 or fp32."""
    requeues: int
    """Times that the run may begin anew without having got any further."""
    cluster: Literal["slurm", "local", "debug"]
    parameters: dict[str, Any]
    """What Slurm was asked for."""
    after: str = ""
    """Folder of the run that must have finished before."""


@dataclasses.dataclass(frozen=True)
class Queued:
    """queued.json: the job that a submission became."""

    job_id: str
    submitted: float
    """Seconds since 1970."""


def read_submission(path: Path) -> Submission:
    """The submission at `path`; JobError when it is not usable."""
    found: Submission = _read(Submission, path)
    return found


def read_queued(folder: Path) -> Queued:
    """The job of the submission in `folder`; JobError when it is not known."""
    found: Queued = _read(Queued, folder / QUEUED)
    return found


def _read(kind: type, path: Path) -> Any:
    try:
        return from_object(kind, json.loads(path.read_bytes()), str(path), defaulted=[])
    except (OSError, ValueError, RecordError) as error:
        raise JobError(f"{path} is not usable: {error}") from error


def write_submission(folder: Path, submission: Submission) -> Path:
    """Write submission.json into `folder` -> its path."""
    path = folder / SUBMISSION
    write_text(path, to_json(submission))
    return path


def new_folder(run_folder: Path) -> Path:
    """A folder for one more submission of a run: launch/1, launch/2 …"""
    folder = next_folder(run_folder)
    folder.mkdir(parents=True)
    return folder


def next_folder(run_folder: Path) -> Path:
    """What `new_folder` would make."""
    numbers = submissions(run_folder)
    return run_folder / LAUNCH / str(int(numbers[-1].name) + 1 if numbers else 1)


def submissions(run_folder: Path) -> list[Path]:
    """The folders of all submissions of a run, in their order."""
    found = (path for path in (run_folder / LAUNCH).glob("*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))
