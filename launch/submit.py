"""Submit runs to a cluster.

    python -m launch.submit --preset small --phase 1 --nodes 2 --gpus_per_node 8 --gpu a100 --time 24:00:00 \\
        -- --data_path SHARDS/train --val_path SHARDS/val --global_batch 256
    python -m launch.submit … --dry_run -- …            print the batch script, queue nothing
    python -m launch.submit … --cluster local -- …      run on this machine, without Slurm
    python -m launch.submit … --chain 1,2 -- FLAGS OF ALL -- FLAGS OF PHASE 1 -- FLAGS OF PHASE 2
    python -m launch.submit … --ablation phase1 --seeds 3 -- …
    python -m launch.submit … --job benchmark -- --model runs/small_phase1 --data SHARDS/val --out results.json

The arguments after -- are flags of vfi.train. They are checked first; then code, parameters, git state and environment are
written into the run folder (launch/1/), and the job is queued. It resumes automatically after preemption, time limits and lost
nodes; `python -m launch.resubmit` requeues failed runs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import snapshot
from launch.options import Options, check_options
from launch.plan import Run, mixed_precision, plan
from launch.queue import cluster, enqueue, enqueue_each, run_here, waiting_for
from launch.status import query_runs
from launch.submission import LAUNCH, SUBMISSION, Submission, next_folder, read_queued, read_submission
from shards.cli import parse_flags
from shards.schema import ShardError
from vfi.config.configs import ConfigError
from vfi.credentials import refuse_secrets
from vfi.errors import JobError, clear_errors
from vfi.runtime.logging import logger

_SHOWN = 3  # jobs for which the commands to follow them are printed


@clear_errors(ConfigError, ShardError)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: check the runs, write and queue their submissions, and print how to follow them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    refuse_secrets(argv, "which the files of the job would keep")
    own, *groups = split(argv)
    options = parse_flags(Options, "python -m launch.submit", __doc__, own)
    check_options(options)
    snapshot.require_checkout()
    runs, notes = plan(options, groups, accelerate_config(options, snapshot.ROOT))
    for text in notes:
        logger.warning(text)
    command = ["python", "-m", "launch.submit", *argv]
    if options.dry_run:
        print_scripts(options, runs)
    elif options.cluster == "debug":
        run_here([draft(options, run, run.name) for run in runs], command)
    else:
        submit(options, runs, command)


def split(argv: Sequence[str]) -> list[list[str]]:
    """Split the arguments at each -- into groups: those before the first, between, and after the last one."""
    groups: list[list[str]] = [[]]
    for argument in argv:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    return groups


def parameters(options: Options, name: str, workers: int) -> dict[str, Any]:
    """Return the parameters of submitit's Slurm executor; raise JobError for unusable --sbatch, --srun or --time values."""
    further: dict[str, Any] = {"chdir": os.getcwd(), "requeue": True}
    for entry in (*options.sbatch, *options.srun):
        if not entry.strip("=") or entry.startswith(("-", "=")):
            raise JobError(
                f"--sbatch and --srun: {entry!r} is not an option: give NAME=VALUE without dashes, such as exclude=n7"
            )
    for key, separator, value in (entry.partition("=") for entry in options.sbatch):
        if key == "dependency" and options.chain:
            raise JobError(f"--sbatch {key}={value}: --chain sets the dependencies itself")
        further[key] = value if separator else True
    limit = cluster().minutes(options.time)
    if limit * 60 <= options.signal_seconds:
        raise JobError(f"--time {options.time} must be longer than --signal_seconds {options.signal_seconds}")
    gres = ":".join(filter(None, ("gpu", options.gpu, str(options.gpus_per_node)))) if options.gpus_per_node else None
    return {
        "job_name": name, "time": limit, "nodes": options.nodes, "ntasks_per_node": 1, "partition": options.partition,
        "account": options.account, "qos": options.qos, "constraint": options.constraint, "gres": gres, "mem": options.mem,
        "cpus_per_task": options.cpus_per_node or options.processes * (1 + workers), "signal_delay_s": options.signal_seconds,
        "setup": list(options.setup), "srun_args": ["--kill-on-bad-exit=1", *(f"--{entry}" for entry in options.srun)],
        "stderr_to_stdout": True, "wckey": None, "array_parallelism": options.concurrency, "additional_parameters": further,
    }  # fmt: skip


def accelerate_config(options: Options, code: Path) -> Path:
    """Return the config file of accelerate launch: the user's, or the default one in `code`."""
    if options.accelerate_config:
        return options.accelerate_config
    single = options.nodes * options.processes == 1
    name = "ddp" if not single else "single_gpu" if options.gpus_per_node else "cpu"
    return code / "accelerate_configs" / f"{name}.yaml"


def print_scripts(options: Options, runs: Sequence[Run]) -> None:
    """Print the batch scripts that sbatch would get."""
    if options.ablation:
        folder = next_folder(array_folder(runs))
        asked = parameters(options, array_folder(runs).name, runs[0].workers)
        print(cluster().script(folder / "slurm", folder / snapshot.CODE, asked, len(runs)))
        print("\n".join(f"# task {number}: {run.name}" for number, run in enumerate(runs)))
        return
    for run in runs:
        folder, asked = next_folder(run.folder), parameters(options, run.name, run.workers)
        if run.after:
            asked = waiting_for(f"JOB_OF_{Path(run.after).name}", asked)
        print(cluster().script(folder / "slurm", folder / snapshot.CODE, asked))


def array_folder(runs: Sequence[Run]) -> Path:
    """Return the folder for what the runs of an ablation share: phase1, next to phase1_Exp-1a_seed0."""
    return runs[0].folder.with_name(runs[0].name.rpartition("_Exp-")[0])


def draft(options: Options, run: Run, name: str) -> Submission:
    """Return the submission to be queued, with its code and log folders still unset."""
    config_file = accelerate_config(options, snapshot.ROOT)
    return Submission(
        name=run.name, job=run.job, arguments=run.arguments, run_folder=str(run.folder), code="", logs="", nodes=options.nodes,
        processes=options.processes, gpus=options.gpus_per_node > 0, python=options.python,
        accelerate_config=str(config_file.absolute()), precision=mixed_precision(options, config_file),
        requeues=options.requeues, cluster=options.cluster, parameters=parameters(options, name, run.workers), after=run.after,
    )  # fmt: skip


def submit(options: Options, runs: Sequence[Run], command: Sequence[str]) -> None:
    """Queue one job per run, each after the one that it waits for, or an ablation as one array of jobs.

    Raises JobError when a run is already in the queue or running, or when the cluster refuses a job.
    """
    if busy := [
        f"{run.name} (job {run.job_id}, {run.state})" for run in query_runs([run.folder for run in runs]) if run.goes_on
    ]:
        raise JobError(f"{', '.join(busy)}: already submitted; launch.cancel takes a run out of the queue")
    drafts = [draft(options, run, array_folder(runs).name if options.ablation else run.name) for run in runs]
    if options.ablation:
        folders = enqueue(drafts, array_folder(runs), command)
    else:
        folders = enqueue_each(drafts, command)
    for number, folder in enumerate(folders):
        if number < _SHOWN:
            say_how_to_follow(folder)
    if len(folders) > 1:
        print(f"{len(folders)} jobs; all runs: {status_command(runs[0].folder.parent)}")


def say_how_to_follow(folder: Path) -> None:
    """Print the job's id, the paths of its logs, and the command that shows its state."""
    submission, queued = read_submission(folder / SUBMISSION), read_queued(folder)
    print(
        f"job {queued.job_id}: {submission.name}, {submission.nodes} x {submission.processes} processes ({submission.cluster})"
    )
    print(f"  the job's log:      {Path(submission.logs) / f'{queued.job_id}_0_log.out'}")
    print(f"  the training's log: {Path(submission.run_folder) / LAUNCH / 'attempts'}/*/rank_0.log")
    print(f"  its state:          {status_command(Path(submission.run_folder).parent, submission.name)}")


def status_command(output_dir: Path, *names: str) -> str:
    """Return the command that shows the state of runs, as one would type it in a shell."""
    return shlex.join(["python", "-m", "launch.status", "--output_dir", str(output_dir), *names])


if __name__ == "__main__":
    main()
