"""Plan the runs of a submission: one training, a chain of phases, an ablation with its seeds, or a benchmark.

    runs, notes = plan(options, [["--data_path", "SHARDS"]], config_file)

Each run is checked as its own command would check it: a bad flag, missing shards or an impossible batch is an error here,
before anything is queued. The command of a planned training can be repeated: it resumes where the run stopped.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from launch import preflight
from launch.memory.batch_size import choose_batch
from launch.options import Options
from shards.cli import split_flags
from vfi.config import command_line, presets
from vfi.config.configs import Config, ConfigError
from vfi.errors import JobError

_NO_BF16 = ("v100", "t4", "p100")
_OLD = ("v100", "p100")  # of compute capability 7.0 and 6.0
_WHEELS_FOR_OLD = (
    "gpu: V100 and P100 need a torch up to 2.14 from https://download.pytorch.org/whl/cu126; PyPI's wheels, for CUDA 13, start "
    "at compute capability 7.5"
)
_SHARDED = re.compile(r"^distributed_type:\s*'?(FSDP|DEEPSPEED)", re.MULTILINE)
_MIXED_PRECISION = re.compile(r"^mixed_precision:\s*'?(\w+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run to be queued."""

    name: str
    job: Literal["train", "benchmark"]
    arguments: tuple[str, ...]
    """Command-line arguments of vfi.train or vfi.benchmark."""
    folder: Path
    """Absolute path of the folder with its results, logs and state."""
    workers: int
    """Loader processes of each training process."""
    after: str = ""
    """Folder of the run that must finish first; empty when there is none."""


def plan(options: Options, groups: Sequence[Sequence[str]], config_file: Path) -> tuple[list[Run], list[str]]:
    """Return the runs in order, and notes for the user; `groups` holds the arguments after each --.

    Raises JobError, ConfigError or ShardError when a run could not start.
    """
    common = list(groups[0]) if groups else []
    if len(groups) > 1 and len(groups) != 1 + len(options.phases):
        phases = f"one for each phase of --chain {options.chain}" if options.chain else "only with --chain"
        raise JobError(f"there are {len(groups)} times --: one before flags for all, and further ones {phases}")
    for argument in (argument for group in groups for argument in group):
        if argument.partition("=")[0].replace("-", "_") in ("__preset", "__phase") and options.job == "train":
            raise JobError(f"{argument} stands after the --: give it before")
    if options.job == "benchmark":
        return [_benchmark(common)], []
    precision = mixed_precision(options, config_file)
    if options.ablation:
        return _ablation(options, common, precision)
    if options.chain:
        return _chain(options, common, groups[1:], precision)
    phase = [] if options.phase is None else ["--phase", str(options.phase)]
    config, notes = _checked(options, ["--preset", options.preset, *phase, *common], precision)
    return [_training(config)], notes


def mixed_precision(options: Options, config_file: Path) -> str:
    """Return the mixed precision of the training: bf16, fp16 or fp32.

    Raises JobError for fp16 with a config that shards over the processes.
    """
    text = config_file.read_text()
    precision: str = options.precision
    if precision == "auto":
        found = _MIXED_PRECISION.search(text)
        precision = {"no": "fp32"}.get(found[1], found[1]) if found and options.gpus_per_node else "fp32"
        precision = "fp16" if precision == "bf16" and _is_one_of(options.gpu, _NO_BF16) else precision
    if precision == "fp16" and _SHARDED.search(text):
        raise JobError(f"{config_file} shards over the processes, which is not supported in fp16: use bf16 or fp32, or DDP")
    return precision


def _is_one_of(gpu: str, kinds: Sequence[str]) -> bool:
    """Return whether the name of a card, in Slurm's or torch's spelling, has one of these words."""
    return any(word in kinds for word in re.findall(r"[a-z0-9]+", gpu.lower()))


def _checked(options: Options, flags: Sequence[str], precision: str, later: str = "") -> tuple[Config, list[str]]:
    """Return the config of a training that can start, with the batch that fits its GPUs, and notes.

    `later` names a run that does not exist yet but will by the time the training starts.
    """
    config, notes = command_line.from_command_line(flags, prog="vfi.train"), []
    processes = options.nodes * options.processes
    if options.gpu and not _given(flags, "batch_size"):
        card = f"{options.gpu}-{options.gpu_gb}gb" if options.gpu_gb else options.gpu
        choice = choose_batch(config, card, processes, precision)
        config, notes = choice.applied_to(config), [f"batch: {choice.why}"]
    elif options.gpu_gb:
        raise JobError(f"--gpu_gb {options.gpu_gb} has no effect with --batch_size: drop one of them")
    notes += [_WHEELS_FOR_OLD] if _is_one_of(options.gpu, _OLD) else []
    notes += preflight.check(config, processes, later)
    return config, notes


def _training(config: Config, after: str = "") -> Run:
    arguments = tuple(preflight.flags(preflight.make_resumable(config)))
    return Run(config.run.exp_name, "train", arguments, preflight.run_folder(config).absolute(), config.data.num_workers, after)


def _chain(options: Options, common: list[str], own: Sequence[Sequence[str]], precision: str) -> tuple[list[Run], list[str]]:
    """Plan one run per phase, each of which starts from the weights of the previous one."""
    runs, notes, before = list[Run](), list[str](), ""
    prefix = _value(common, "exp_name") or options.preset
    for number, phase in enumerate(options.phases):
        name = f"{prefix}_phase{phase}"
        further = own[number] if own else ()
        given = {flag for flag, _ in split_flags(further)}  # those with several values would be joined
        kept = (word for flag, words in split_flags(common) if flag not in given for word in words)
        flags = ["--preset", options.preset, "--phase", str(phase), *kept, *further]
        flags += ["--exp_name", name, *(["--start_from", before, "--resume", "auto"] if before else [])]
        config, more = _checked(options, flags, precision, later=before)
        runs.append(_training(config, after=str(runs[-1].folder) if runs else ""))
        notes += [f"phase {phase}: {note}" for note in more]
        before = name
    return runs, notes


def _ablation(options: Options, common: list[str], precision: str) -> tuple[list[Run], list[str]]:
    """Plan one run per experiment and seed."""
    assert options.ablation
    if _given(common, "seed"):
        raise JobError("--seed after the -- with --ablation: give --seeds before it, the number of runs of each experiment")
    rows = presets.experiments(options.ablation)
    if unknown := [row for row in options.only if row not in rows]:
        raise JobError(f"--only {' '.join(unknown)}: --ablation {options.ablation} has {', '.join(rows)}")
    runs, notes, prefix = list[Run](), dict[str, None](), _value(common, "exp_name") or options.ablation
    for row in options.only or rows:
        try:
            config, more = _checked(options, ["--preset", row, *common, "--exp_name", f"{prefix}_{row}_seed0"], precision)
            first = _training(config)
            for seed in range(options.seeds):
                name = f"{prefix}_{row}_seed{seed}"
                other = presets.override(config, seed=seed, exp_name=name)
                preflight.refuse_other_run(other)
                arguments = tuple(preflight.differences(preflight.make_resumable(other)))
                runs.append(dataclasses.replace(first, name=name, arguments=arguments, folder=first.folder.with_name(name)))
        except ConfigError as error:
            raise ConfigError(f"{row}: {error}") from error
        notes |= dict.fromkeys(more if options.gpu == "" else [f"{row}: {note}" for note in more])
    return runs, list(notes)


def _benchmark(arguments: list[str]) -> Run:
    """Plan one benchmark, whose logs lie next to its results."""
    job = importlib.import_module("vfi.benchmark")  # not at the top: it imports torch, which no other submission needs
    options = job.parse(arguments)
    settings = options.settings
    if settings.out.suffix != ".json" and getattr(settings, "protocol", "") != job.ALL:
        raise JobError(f"--out {settings.out} must end in .json")
    if missing := [model for model in settings.model if not (Path(model).exists() or job.names_a_model(model))]:
        raise JobError(f"--model {' '.join(missing)} is not there")
    folder = settings.out.absolute().with_name(f"{settings.out.stem}_job")
    if isinstance(options, job.SpeedOptions) or settings.protocol == job.ALL:
        return Run(settings.out.stem, "benchmark", tuple(arguments), folder, 0)
    if settings.protocol and not (Path(settings.data).is_dir() or "://" in settings.data):
        raise JobError(f"--data {settings.data} is not a folder: give the set's own, or shards of it")
    if "://" not in settings.data and not settings.protocol:
        preflight.check_shards(settings.data)
    return Run(settings.out.stem, "benchmark", tuple(arguments), folder, settings.workers)


def _given(arguments: Sequence[str], name: str) -> bool:
    return any(flag == name for flag, _ in split_flags(arguments))


def _value(arguments: list[str], name: str) -> str:
    """Return the value of a flag, its last one, and remove the flag from `arguments`; return "" when it is absent."""
    value, kept = "", list[str]()
    for flag, words in split_flags(arguments):
        if flag == name:
            _, equals, attached = words[0].partition("=")
            given = [attached, *words[1:]] if equals else words[1:]
            if len(given) != 1:
                raise JobError(f"--{name} stands {f'with {given}' if given else 'without a value'}: it takes one")
            value = given[0]
        else:
            kept += words
    arguments[:] = kept
    return value
