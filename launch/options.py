"""Flags of `python -m launch.submit`, and the checks that they fit together."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from vfi.config.presets import AblationName
from vfi.errors import JobError


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command, one per field; those of vfi.train (or vfi.benchmark) follow after --."""

    preset: str = "small"
    """Preset of vfi.train, or an experiment of an ablation."""
    phase: Literal[1, 2, 3] | None = None
    """Training phase; default: the preset's."""
    chain: str = ""
    """Phases to train one after the other, such as 1,2,3: one job each, starting from the weights of the previous phase."""
    ablation: AblationName | None = None
    """Train all experiments Exp-1…, Exp-2… or Exp-3… of vfi/config/presets.py as one array of jobs."""
    only: tuple[str, ...] = ()
    """Experiments of --ablation to train, such as Exp-1a Exp-1c; default: all."""
    seeds: int = 1
    """Number of runs per experiment of --ablation, with --seed 0, 1, 2 …"""
    concurrency: int = 8
    """Maximum number of runs of --ablation at a time."""
    job: Literal["train", "benchmark"] = "train"
    """Command to run; with benchmark, the arguments after -- are flags of `vfi benchmark`."""
    nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 1
    """GPUs per machine, with one process each; 0 trains on CPUs, with --processes_per_node."""
    processes_per_node: int | None = None
    """Processes per machine without GPUs; default: 1."""
    gpu: str = ""
    """GPU type as this cluster names it (a100, h100 …; `sinfo -o %G` lists them); default: any. Without --batch_size after the
    --, it also selects the largest batch that fits."""
    gpu_gb: int | None = None
    """Memory of --gpu in GB, where its name is ambiguous: 80 for the larger a100, which is also sold with 40."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Mixed precision; auto is that of the accelerate config, but fp16 on GPUs without bf16, and fp32 on CPUs."""
    time: str = "24:00:00"
    """Time limit, after which the job is requeued and resumes: minutes, hours:minutes:seconds or days-hours."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_node: int | None = None
    """CPU cores per machine; default: one for each process plus one for each of its loader workers."""
    mem: str | None = None
    """Memory per machine, such as 200G; default: the cluster's."""
    sbatch: tuple[str, ...] = ()
    """Additional options of sbatch as NAME=VALUE, such as exclude=n7 or exclusive=user."""
    srun: tuple[str, ...] = ()
    """Additional options of srun as NAME=VALUE, such as container-image=IMAGE (Pyxis)."""
    setup: tuple[str, ...] = ()
    """Shell lines to run before anything else, such as "module load cuda"."""
    signal_seconds: int = 180
    """Seconds before the time limit at which training is told to save and the job is requeued."""
    requeues: int = 3
    """Number of times that the job may be restarted without having made progress."""
    python: str = sys.executable
    """Interpreter of the training processes, optionally preceded by a container command (docs/cluster.md)."""
    accelerate_config: Path | None = None
    """Config file of `accelerate launch` with precision and sharding; default: ddp, single_gpu or cpu.yaml in
    accelerate_configs/."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """Where to run: on Slurm, in background processes on this machine (local), or immediately in this process (debug)."""
    dry_run: bool = False
    """Check, print the batch script, and queue nothing."""

    @property
    def processes(self) -> int:
        """Number of processes per node."""
        return self.gpus_per_node or self.processes_per_node or 1

    @property
    def phases(self) -> tuple[Literal[1, 2, 3], ...]:
        """Phases of --chain, in order; raises JobError unless they are two or three ascending phases."""
        known: dict[str, Literal[1, 2, 3]] = {"1": 1, "2": 2, "3": 3}
        found = [known.get(part) for part in self.chain.split(",")] if self.chain else []
        phases = tuple(phase for phase in found if phase is not None)
        if self.chain and (len(phases) < 2 or len(phases) != len(found) or list(phases) != sorted(set(phases))):
            raise JobError(f"--chain {self.chain!r}: give two or three phases in their order, such as 1,2 or 1,2,3")
        return phases


def check_options(options: Options) -> None:
    """Raise JobError, which says what to do, for values that no cluster can fulfil and for flags without effect."""
    for flag, value, least in (("--nodes", options.nodes, 1), ("--gpus_per_node", options.gpus_per_node, 0),
                               ("--processes_per_node", options.processes_per_node, 1), ("--requeues", options.requeues, 0),
                               ("--cpus_per_node", options.cpus_per_node, 1), ("--seeds", options.seeds, 1),
                               ("--concurrency", options.concurrency, 1),
                               ("--signal_seconds", options.signal_seconds, 10)):  # fmt: skip
        if value is not None and value < least:
            raise JobError(f"{flag} is {value}; it must be at least {least}")
    if options.gpus_per_node and options.processes_per_node is not None:
        raise JobError("--processes_per_node is for --gpus_per_node 0: with GPUs there is one process on each")
    if options.gpu and not options.gpus_per_node:
        raise JobError(f"--gpu {options.gpu} with --gpus_per_node 0: drop one of them")
    if options.gpu_gb is not None and not options.gpu:
        raise JobError(f"--gpu_gb {options.gpu_gb} has no effect without --gpu: drop it")
    if options.precision == "fp16" and not options.gpus_per_node:
        raise JobError("--precision fp16 needs a GPU: use fp32 or bf16 with --gpus_per_node 0")
    if options.accelerate_config and not options.accelerate_config.is_file():
        raise JobError(f"--accelerate_config {options.accelerate_config} is not a file")
    _check_kind(options)
    _check_cluster(options)


def _check_kind(options: Options) -> None:
    """Raise JobError unless this is one training, chain, ablation or benchmark without flags of another kind."""
    kinds = [flag for flag, given in (("--chain", options.chain), ("--ablation", options.ablation),
                                      ("--job benchmark", options.job == "benchmark")) if given]  # fmt: skip
    if len(kinds) > 1:
        raise JobError(f"{' and '.join(kinds)}: give one of them")
    if options.ablation is None:
        _refuse(options, "only seeds concurrency", "without --ablation")
    if options.chain:
        _refuse(options, "phase", f"with --chain {options.chain}")
    if options.ablation:
        _refuse(options, "preset phase", f"with --ablation {options.ablation}, whose experiments are presets,")
    if options.job == "benchmark":
        _refuse(options, "preset phase accelerate_config precision processes_per_node", "with --job benchmark")
        if options.nodes > 1 or options.gpus_per_node > 1:
            raise JobError("--job benchmark is one process: use --nodes 1 and --gpus_per_node 1 or 0")


def _check_cluster(options: Options) -> None:
    if options.cluster == "slurm":
        return
    if options.dry_run:
        raise JobError(
            f"--dry_run shows the batch script for Slurm, and --cluster {options.cluster} has none: drop one of them"
        )
    if options.nodes > 1:
        raise JobError(f"--cluster {options.cluster} has one machine, --nodes is {options.nodes}")
    _refuse(
        options,
        "partition account qos constraint sbatch srun cpus_per_node mem concurrency",
        f"with --cluster {options.cluster}",
    )
    if options.cluster == "debug":
        _refuse(options, "setup time signal_seconds", "with --cluster debug")
    elif options.chain or options.ablation:
        flag = "--chain" if options.chain else "--ablation"
        raise JobError(f"{flag} with --cluster local would start all runs at once: --cluster debug runs one after the other")


def _refuse(options: Options, names: str, when: str) -> None:
    """Raise JobError when one of the flags in `names` is given, since it would have no effect."""
    default = Options()
    if given := ["--" + name for name in names.split() if getattr(options, name) != getattr(default, name)]:
        raise JobError(f"{', '.join(given)} {when} has no effect: drop it")
