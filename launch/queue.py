"""Write submissions and a copy of the code to disk, then queue them. When they are refused, the files are removed again.

    folders = enqueue(drafts, shared, command)      one job, or one array of several
    folders = enqueue_each(drafts, command)         one job per draft, each after the one that it waits for

A draft is a Submission whose code and log folders are still unset. Each gets a folder launch/N of its run, with submission.json
and queued.json; what the tasks of an array share (code, environment, logs) lies in launch/N of `shared`.
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
from vfi.runtime.logging import logger

_NAMED = 5  # of the files that are left out


def cluster() -> types.ModuleType:
    """Import launch.executors; raise JobError when submitit, which it needs, is not installed."""
    try:
        return importlib.import_module("launch.executors")
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise JobError("submitit is not installed: pip install -e '.[slurm]' in this project's folder") from error


def waiting_for(job_id: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a job that begins once `job_id` has succeeded, and leaves the queue if `job_id` fails."""
    further = parameters["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
    return parameters | {"dependency": f"afterok:{job_id}", "additional_parameters": further}


def enqueue(drafts: Sequence[Submission], shared: Path, command: Sequence[str]) -> list[Path]:
    """Queue the drafts as one array, or a single one as a job; return the folder of each. Raises JobError when refused."""
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
    """Write all files of the drafts; return the shared folder and the folder of each. Closing `undo` removes them again."""
    common = _removed_by(undo, new_folder(shared))
    code, left_out = snapshot.copy_code(common)
    if left_out:
        further = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        names = ", ".join(left_out[:_NAMED])
        logger.warning(f"the copy of the code leaves out what is neither in git nor a source file: {names}{further}")
    snapshot.describe(common, list(command), left_out)
    config = shutil.copy(drafts[0].accelerate_config, common / "accelerate.yaml")
    folders = []
    for draft in drafts:
        own = common if Path(draft.run_folder) == shared else _removed_by(undo, new_folder(Path(draft.run_folder)))
        whole = dataclasses.replace(draft, code=str(code), logs=str(common / "slurm"), accelerate_config=str(config))
        write_submission(own, whole)
        folders.append(own)
    return common, folders


def enqueue_each(drafts: Sequence[Submission], command: Sequence[str]) -> list[Path]:
    """Queue one job per draft, each waiting for the job of the run in its `after`; return their folders.

    When one is refused, the jobs queued before it are cancelled and the error is raised.
    """
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
    """Run the drafts one after the other in this process; exit with the code of the first one that fails."""
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
    """Remove a folder launch/N, and those above it in the run if they are empty."""
    shutil.rmtree(folder)
    for empty in (folder.parent, folder.parents[1]):
        with contextlib.suppress(OSError):
            empty.rmdir()
