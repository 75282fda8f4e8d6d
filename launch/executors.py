"""Queue jobs through submitit, or print the batch script that it writes (--dry_run).

slurm    sbatch, from a login node
local    background processes on this machine
debug    immediately, in this process
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launch.node import agent
from vfi.errors import JobError

ClusterName = Literal["slurm", "local", "debug"]
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_PACKAGE_PATH = "submitit.core._submit"
# what a job or launcher sets for its own processes; SBATCH_ACCOUNT and its like are the user's
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
_OF_A_RANK = ("SUBMITIT_", "PMI_", "PMI2_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "TORCHELASTIC_", "MASTER_ADDR",
              "MASTER_PORT")  # fmt: skip
_RANK = re.compile(r"((LOCAL|GROUP|ROLE|NODE)_)?(RANK|WORLD_SIZE)")
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
_PYTHON_LINES = ("export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1")


def minutes(time: str) -> int:
    """Convert a time limit in Slurm's notation (90, 90:00, 24:00:00, 2-12, 2-12:30, 2-12:30:00) to minutes, rounded up.

    Raises JobError for any other notation and for less than a minute.
    """
    found = _TIME.fullmatch(time)
    if not found:
        raise JobError(
            f"--time {time!r} is not a time limit: give minutes (90), hours (24:00:00) or days and hours (2-12:00:00)"
        )
    days, *parts = (int(part) if part else None for part in found.group("days", "first", "second", "third"))
    first, second, third = parts
    if days is not None or third is not None:
        seconds = (days or 0) * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    else:
        seconds = (first or 0) * 60 + (second or 0)
    if seconds < 60:
        raise JobError(f"--time {time!r} is less than a minute")
    return -(-seconds // 60)


def script(folder: Path, code: Path, parameters: dict[str, Any], tasks: int = 1) -> str:
    """Return the batch script that sbatch gets for a job, or for an array of `tasks` tasks."""
    command = f"{shlex.quote(sys.executable)} -u -m {_PACKAGE_PATH} {shlex.quote(str(folder))}"
    count: dict[str, Any] = {"map_count": tasks} if tasks > 1 else {}
    return str(_make_sbatch_string(command=command, folder=folder, **_running(code, parameters), **count))


def submit(
    cluster: ClusterName, folder: Path, code: Path, parameters: dict[str, Any], submissions: Sequence[Path]
) -> list[str]:
    """Queue one job, or an array, that executes submission.json files with the packages in `code`; return the job ids.

    Raises JobError when the cluster refuses the job. With `debug`, the jobs have run when this returns, and the exit code of
    one that fails is raised as SystemExit.
    """
    executor = _EXECUTORS[cluster](folder, _running(code, parameters))
    try:
        with outside_of_jobs(), _no_output() if cluster == "local" else contextlib.nullcontext():
            jobs = executor.map_array(agent.run, list(map(str, submissions)))
    except (FailedJobError, FailedSubmissionError) as error:
        raise JobError(f"the cluster refused the job, nothing was queued: {_refusal(error)}") from error
    if cluster == "debug":
        for one in jobs:
            one.result()  # with the variables of its submission
    return [str(one.job_id) for one in jobs]


def _running(code: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with set-up lines that make the job import from `code`."""
    lines = [line.format(code=shlex.quote(str(code))) for line in _PYTHON_LINES]
    return parameters | {"setup": [*parameters["setup"], *lines]}


def _slurm(folder: Path, parameters: dict[str, Any]) -> submitit.Executor:
    if not shutil.which("sbatch"):
        raise JobError("sbatch was not found, so this machine has no Slurm: submit from a login node, or use --cluster local")
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**parameters)
    return executor


def _local(folder: Path, parameters: dict[str, Any]) -> submitit.Executor:
    # with submitit's own set-up lines it depends on the shell whether the job, and with it the job's id, is the shell itself
    lines = " && ".join([*parameters["setup"], 'exec "$0" "$@"'])
    executor = submitit.LocalExecutor(folder, python=shlex.join(["bash", "-c", lines, sys.executable]))
    executor.update_parameters(
        timeout_min=parameters["time"], signal_delay_s=parameters["signal_delay_s"], stderr_to_stdout=True,
        gpus_per_node=int((parameters["gres"] or "0").rpartition(":")[2]),
    )  # fmt: skip
    return executor


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Remove the variables of the job that this process runs in, if any: sbatch and child processes would pass them on.

    With them srun refuses a second way to ask for memory, and a task looks for files of the outer array. Slurm's variables are
    kept outside of a job, where a user or a site has set them, and inside those that say which Slurm to ask.
    """
    job = _OF_A_JOB if "SLURM_JOB_ID" in os.environ else ()
    removed = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith((*job, *_OF_A_RANK)) or _RANK.fullmatch(name)) and name not in _OF_THE_SITE
    }
    for name in removed:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(removed)


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Detach child processes from our output: they outlive us, and a reader of our output would wait for them."""
    kept = [os.dup(number) for number in (0, 1, 2)]
    sys.stdout.flush()
    with open(os.devnull, "r+b") as nothing:
        for number in (0, 1, 2):
            os.dup2(nothing.fileno(), number)
    try:
        yield
    finally:
        for number, former in enumerate(kept):
            os.dup2(former, number)
            os.close(former)


def _debug(folder: Path, _: dict[str, Any]) -> submitit.Executor:
    return submitit.DebugExecutor(folder)


_EXECUTORS = {"slurm": _slurm, "local": _local, "debug": _debug}


def _refusal(error: Exception) -> str:
    """Return the message of sbatch without submitit's wrapping."""
    lines = [line.removeprefix("sbatch: ").strip() for line in str(error).splitlines()]
    return "; ".join(line for line in lines if line.startswith("error:")) or " ".join(filter(None, lines))
