"""What can a submission be told? The flags of `python -m launch.submit`, and which of them fit together."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from vfi.config.presets import AblationName
from vfi.errors import JobError


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job; those of vfi.train (or vfi.benchmark) follow after --."""

    preset: str = "small"
    """Named set of defaults of vfi.train, or an ablation."""
    phase: Literal[1, 2, 3] | None = None
    """Phase of the training; default: the preset's."""
    chain: str = ""
    """Phases one after the other, such as 1,2,3: each a job that starts from the weights of the one before."""
    ablation: AblationName | None = None
    """All experiments Exp-1…, Exp-2… or Exp-3… of vfi/config/presets.py as one array of jobs."""
    only: tuple[str, ...] = ()
    """Of --ablation only these, such as Exp-1a Exp-1c."""
    seeds: int = 1
    """Of --ablation: runs of each experiment, with --seed 0, 1, 2 …"""
    concurrency: int = 8
    """Of --ablation: runs at a time."""
    job: Literal["train", "benchmark"] = "train"
    """benchmark: what follows the -- are flags of `vfi benchmark`."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """GPUs of each, one process each; 0: train on CPUs, with --processes_per_node."""
    processes_per_node: int | None = None
    """Processes of each machine without GPUs."""
    gpu: str = ""
    """Type of GPU as this cluster names it (a100, h100 …; `sinfo -o %G` lists them), and without --batch_size after the --, the
    largest batch that fits it; default: any."""
    gpu_gb: int | None = None
    """Memory of --gpu in GB, where its name leaves that open: 80 for an a100 that is not the one of 40."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Mixed precision; auto: that of the accelerate config, fp16 on cards without bf16, fp32 on CPUs."""
    time: str = "24:00:00"
    """Time limit of one stretch, after which the job is requeued and goes on: minutes, hours:minutes:seconds, days-hours."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_node: int | None = None
    """CPU cores of each machine; default: for each process, one and one for each of its loader workers."""
    mem: str | None = None
    """Memory of each machine, such as 200G; default: the cluster's."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch as NAME=VALUE, such as exclude=n7 or exclusive=user."""
    srun: tuple[str, ...] = ()
    """Further options of srun as NAME=VALUE, such as container-image=IMAGE (Pyxis)."""
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

    @property
    def phases(self) -> tuple[Literal[1, 2, 3], ...]:
        """Of --chain."""
        known: dict[str, Literal[1, 2, 3]] = {"1": 1, "2": 2, "3": 3}
        found = [known.get(part) for part in self.chain.split(",")] if self.chain else []
        phases = tuple(phase for phase in found if phase is not None)
        if self.chain and (len(phases) < 2 or len(phases) != len(found) or list(phases) != sorted(set(phases))):
            raise JobError(f"--chain {self.chain!r}: give two or three phases in their order, such as 1,2 or 1,2,3")
        return phases


def check_options(options: Options) -> None:
    """Refuse what no cluster can do, and flags without effect; JobError says what to do."""
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
        raise JobError("--precision fp16 needs a GPU: take fp32 or bf16 with --gpus_per_node 0")
    if options.accelerate_config and not options.accelerate_config.is_file():
        raise JobError(f"--accelerate_config {options.accelerate_config} is no file")
    _check_kind(options)
    _check_cluster(options)


def _check_kind(options: Options) -> None:
    """One training, a chain, an ablation or a benchmark, and no flag of another."""
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
            raise JobError("--job benchmark is one process: take --nodes 1 and --gpus_per_node 1 or 0")


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
    """A flag that is given and would do nothing."""
    default = Options()
    if given := ["--" + name for name in names.split() if getattr(options, name) != getattr(default, name)]:
        raise JobError(f"{', '.join(given)} {when} has no effect: drop it")
