"""How do submissions get into the queue? Written down first, with the code; and nothing stays behind when they are refused.

    folders = enqueue(drafts, shared, command)      one job, or one array of several
    folders = enqueue_each(drafts, command)         a job each, and each after the one that it waits for

A draft is a Submission that does not know its code and logs yet. Each gets a folder launch/N of its run, with submission.json
and queued.json; what an array shares (code, environment, logs) lies in launch/N of `shared`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import shutil
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import slurm, snapshot
from launch.submission import QUEUED, SUBMISSION, Queued, Submission, new_folder, read_queued, write_submission
from vfi.errors import JobError
from vfi.io.dataclass_json import to_json, write_text


def cluster() -> types.ModuleType:
    """launch.executors, which needs submitit."""
    try:
        return importlib.import_module("launch.executors")
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise JobError("submitit is not installed: pip install -e '.[slurm]' in this project's folder") from error


def waiting_for(job_id: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The same for a job that begins when another one has ended well, and is removed from the queue when it has not."""
    further = parameters["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
    return parameters | {"dependency": f"afterok:{job_id}", "additional_parameters": further}


def enqueue(drafts: Sequence[Submission], shared: Path, command: Sequence[str]) -> list[Path]:
    """Queue them as one array, or the only one as a job -> the folder of each; JobError when it is refused."""
    with contextlib.ExitStack() as undo:
        common, folders = write(drafts, shared, command, undo)
        queue = cluster().submit
        paths = [folder / SUBMISSION for folder in folders]
        ids = queue(drafts[0].cluster, common / "slurm", common / snapshot.CODE, drafts[0].parameters, paths)
        undo.pop_all()
    for folder, job_id in zip(folders, ids, strict=True):
        write_text(folder / QUEUED, to_json(Queued(job_id, time.time())))
    return folders


def write(
    drafts: Sequence[Submission], shared: Path, command: Sequence[str], undo: contextlib.ExitStack
) -> tuple[Path, list[Path]]:
    """Write everything down -> the folder of what is shared, and that of each; `undo` removes them."""
    common = _removed_by(undo, new_folder(shared))
    snapshot.describe(common, list(command))
    code = snapshot.copy_code(common)
    config = shutil.copy(drafts[0].accelerate_config, common / "accelerate.yaml")
    folders = []
    for draft in drafts:
        own = common if Path(draft.run_folder) == shared else _removed_by(undo, new_folder(Path(draft.run_folder)))
        whole = dataclasses.replace(draft, code=str(code), logs=str(common / "slurm"), accelerate_config=str(config))
        write_submission(own, whole)
        folders.append(own)
    return common, folders


def enqueue_each(drafts: Sequence[Submission], command: Sequence[str]) -> list[Path]:
    """A job each, which waits for that of the run it comes after; when one is refused, those before leave the queue."""
    jobs: dict[str, str] = {}
    folders: list[Path] = []
    for draft in drafts:
        if draft.after in jobs:
            draft = dataclasses.replace(draft, parameters=waiting_for(jobs[draft.after], draft.parameters))
        try:
            folders += enqueue([draft], Path(draft.run_folder), command)
        except BaseException:
            if draft.cluster == "slurm":
                slurm.cancel(list(jobs.values()))
                for folder in folders:
                    _remove(folder)
            raise
        jobs[draft.run_folder] = read_queued(folders[-1]).job_id
    return folders


def run_here(drafts: Sequence[Submission], command: Sequence[str]) -> None:
    """Run one after the other in this process; exits with the code of the first one that fails, and runs no further."""
    for draft in drafts:
        with contextlib.ExitStack() as undo:
            common, (folder,) = write([draft], Path(draft.run_folder), command, undo)
            undo.pop_all()
        write_text(folder / QUEUED, to_json(Queued("debug", time.time())))
        cluster().submit("debug", common / "slurm", common / snapshot.CODE, draft.parameters, [folder / SUBMISSION])
        sys.stdout.flush()


def _removed_by(undo: contextlib.ExitStack, folder: Path) -> Path:
    undo.callback(_remove, folder)
    return folder


def _remove(folder: Path) -> None:
    """A folder launch/N, and the run's if nothing else is in it."""
    shutil.rmtree(folder)
    for empty in (folder.parent, folder.parents[1]):
        with contextlib.suppress(OSError):
            empty.rmdir()
