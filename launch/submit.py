"""How is a run submitted to a cluster? JOB.

    python -m launch.submit --preset small --phase 1 --nodes 2 --gpus_per_node 8 --gpu a100 --time 24:00:00 \\
        -- --data_path SHARDS/train --val_path SHARDS/val --global_batch 256
    python -m launch.submit … --dry_run -- …            the batch script, nothing queued
    python -m launch.submit … --cluster local -- …      on this machine, without Slurm

What follows the -- are flags of vfi.train. They are checked first; then code, parameters, git state and environment are written
into the run folder (launch/1/), and the job is queued. It goes on by itself after preemption, time limits and lost nodes; a run
that stopped otherwise goes on by the same command with `--resume auto` after the --.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import shlex
import shutil
import sys
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from launch import experiment, snapshot
from launch.submission import LAUNCH, Queued, Submission, new_folder, next_folder, write_submission
from shards.schema import ShardError
from vfi import presets
from vfi.config import Config, ConfigError
from vfi.errors import JobError, clear_errors
from vfi.records import to_json, write_text

_PYTHON_LINES = ("export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1")


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job; those of vfi.train follow after --."""

    preset: str = "small"
    """Named set of defaults of vfi.train, or an ablation."""
    phase: Literal[1, 2, 3] | None = None
    """Phase of the training; default: the preset's."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """GPUs of each, one process each; 0: train on CPUs, with --processes_per_node."""
    processes_per_node: int | None = None
    """Processes of each machine without GPUs."""
    gpu: str = ""
    """Type of GPU as this cluster names it (a100, h100 …; `sinfo -o %G` lists them); default: any."""
    time: str = "24:00:00"
    """Time limit of one stretch, after which the job is requeued and goes on: minutes, hours:minutes:seconds, days-hours."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_node: int | None = None
    """CPU cores of each machine; default: for each process, one and one for each of its loader workers (--num_workers)."""
    mem: str | None = None
    """Memory of each machine, such as 200G; default: the cluster's."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch as NAME=VALUE, such as exclude=n7 or exclusive=user."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything starts, such as "module load cuda"."""
    signal_seconds: int = 180
    """Seconds before the time limit in which training saves and the job is requeued."""
    requeues: int = 3
    """Times that the job may begin anew without having got any further."""
    python: str = sys.executable
    """Interpreter of the training processes; a container's command may stand before it (docs/cluster.md)."""
    accelerate_config: Path | None = None
    """File for `accelerate launch` with precision and sharding; default: ddp, single_gpu or cpu.yaml of accelerate_configs/."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """Where to: Slurm; processes of this machine in the background; or here and now."""
    dry_run: bool = False
    """Check, print the batch script, and queue nothing."""

    @property
    def processes(self) -> int:
        """Of each node."""
        return self.gpus_per_node or self.processes_per_node or 1


@clear_errors(ConfigError, ShardError)
def main(argv: Sequence[str] | None = None) -> None:
    """The job: check, write down, queue, and say how to follow."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    options = tyro.cli(Options, prog="python -m launch.submit", description=__doc__, args=argv[:end])
    check_options(options)
    config = training_config(options, argv[end + 1 :])
    for note in experiment.check(config, options.nodes * options.processes):
        print(f"note: {note}")
    config = experiment.safe_to_repeat(config)
    if options.dry_run:
        print_script(options, config)
        return
    submit(options, config, ["python", "-m", "launch.submit", *argv])


def check_options(options: Options) -> None:
    """Refuse what no cluster can do; JobError says what to do."""
    for flag, value, least in (("--nodes", options.nodes, 1), ("--gpus_per_node", options.gpus_per_node, 0),
                               ("--processes_per_node", options.processes_per_node, 1), ("--requeues", options.requeues, 0),
                               ("--cpus_per_node", options.cpus_per_node, 1),
                               ("--signal_seconds", options.signal_seconds, 10)):  # fmt: skip
        if value is not None and value < least:
            raise JobError(f"{flag} is {value}; it must be at least {least}")
    if options.gpus_per_node and options.processes_per_node is not None:
        raise JobError("--processes_per_node is for --gpus_per_node 0: with GPUs there is one process on each")
    if options.gpu and not options.gpus_per_node:
        raise JobError(f"--gpu {options.gpu} with --gpus_per_node 0: drop one of them")
    if options.cluster != "slurm":
        if options.nodes > 1:
            raise JobError(f"--cluster {options.cluster} has one machine, --nodes is {options.nodes}")
        given = {"--" + name: getattr(options, name) for name in ("partition", "account", "qos", "constraint", "gpu", "sbatch")}
        if ignored := [flag for flag, value in given.items() if value]:
            raise JobError(f"{', '.join(ignored)}: has no effect with --cluster {options.cluster}, drop it")
    if options.accelerate_config and not options.accelerate_config.is_file():
        raise JobError(f"--accelerate_config {options.accelerate_config} is no file")


def training_config(options: Options, arguments: Sequence[str]) -> Config:
    """Settings of the training, checked as vfi.train checks them."""
    for argument in arguments:
        if argument.partition("=")[0].replace("-", "_") in ("__preset", "__phase"):
            raise JobError(f"{argument} stands after the --: give it before")
    phase = [] if options.phase is None else ["--phase", str(options.phase)]
    return presets.from_command_line(["--preset", options.preset, *phase, *arguments], prog="vfi.train")


def parameters(options: Options, name: str, code: Path, workers: int) -> dict[str, Any]:
    """What submitit's Slurm executor is told."""
    further: dict[str, Any] = {"chdir": os.getcwd(), "requeue": True}
    for entry in options.sbatch:
        key, separator, value = entry.partition("=")
        if not key or key.startswith("-"):
            raise JobError(f"--sbatch {entry!r}: give NAME=VALUE without dashes, such as exclude=n7")
        further[key] = value if separator else True
    limit = cluster().minutes(options.time)
    if limit * 60 <= options.signal_seconds:
        raise JobError(f"--time {options.time} must be longer than --signal_seconds {options.signal_seconds}")
    gres = ":".join(filter(None, ("gpu", options.gpu, str(options.gpus_per_node)))) if options.gpus_per_node else None
    lines = [line.format(code=shlex.quote(str(code))) for line in _PYTHON_LINES]
    return {
        "job_name": name, "time": limit, "nodes": options.nodes, "ntasks_per_node": 1, "partition": options.partition,
        "account": options.account, "qos": options.qos, "constraint": options.constraint, "gres": gres, "mem": options.mem,
        "cpus_per_task": options.cpus_per_node or options.processes * (1 + workers), "signal_delay_s": options.signal_seconds,
        "setup": [*options.setup, *lines], "srun_args": ["--kill-on-bad-exit=1"], "stderr_to_stdout": True, "wckey": None,
        "additional_parameters": further,
    }  # fmt: skip


def accelerate_config(options: Options, code: Path, folder: Path) -> Path:
    """The file for accelerate launch: ours in the snapshot, or a copy of the user's."""
    if options.accelerate_config:
        return Path(shutil.copy(options.accelerate_config, folder / "accelerate.yaml"))
    single = options.nodes * options.processes == 1
    name = "ddp" if not single else "single_gpu" if options.gpus_per_node else "cpu"
    return code / "accelerate_configs" / f"{name}.yaml"


def cluster() -> types.ModuleType:
    """launch.cluster, which needs submitit."""
    try:
        return importlib.import_module("launch.cluster")
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise JobError("submitit is not installed: pip install -e '.[slurm]' in this project's folder") from error


def print_script(options: Options, config: Config) -> None:
    """What sbatch would get."""
    folder = next_folder(experiment.run_folder(config).absolute())
    asked = parameters(options, config.run.exp_name, folder / snapshot.CODE, config.data.num_workers)
    print(cluster().script(folder / "slurm", asked))


def submit(options: Options, config: Config, command: list[str]) -> None:
    """Write down what is submitted, queue it, and say how to follow it."""
    run_folder = experiment.run_folder(config).absolute()
    with kept_if_queued(run_folder) as folder:
        snapshot.describe(folder, command)
        code = snapshot.copy_code(folder)
        asked = parameters(options, config.run.exp_name, code, config.data.num_workers)
        submission = Submission(
            name=config.run.exp_name, job="train", arguments=tuple(experiment.flags(config)), run_folder=str(run_folder),
            code=str(code), logs=str(folder / "slurm"), nodes=options.nodes, processes=options.processes,
            gpus=options.gpus_per_node > 0, python=options.python, requeues=options.requeues, cluster=options.cluster,
            accelerate_config=str(accelerate_config(options, code, folder)), parameters=asked,
        )  # fmt: skip
        path = write_submission(folder, submission)
        (job_id,) = cluster().submit(options.cluster, folder / "slurm", asked, [path])
        write_text(folder / "queued.json", to_json(Queued(job_id, time.time())))
    say_how_to_follow(submission, job_id)


@contextlib.contextmanager
def kept_if_queued(run_folder: Path) -> Iterator[Path]:
    """A new folder launch/N of the run, which is removed when nothing gets queued."""
    folder = new_folder(run_folder)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        for empty in (folder.parent, run_folder):
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise


def say_how_to_follow(submission: Submission, job_id: str) -> None:
    """The job's id, where its logs will be, and what to type."""
    attempts = Path(submission.run_folder) / LAUNCH / "attempts"
    print(f"job {job_id}: {submission.name}, {submission.nodes} x {submission.processes} processes ({submission.cluster})")
    print(f"the job's log:      {Path(submission.logs) / f'{job_id}_0_log.out'}")
    print(f"the training's log: {attempts / f'{job_id}_0000' / 'rank_0.log'}  (follow it with tail -F)")
    if submission.cluster == "slurm":
        print(f"its state:          squeue -j {job_id}; sacct -j {job_id} --duplicates; vfi runs")


if __name__ == "__main__":
    main()
