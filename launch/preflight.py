"""Check before queueing that a training run can start, and write its config as a command line.

config = command_line.from_command_line(argv)
check(config, processes=16)      # missing shards or an impossible batch fail now, not after hours in the queue
flags(config)                    # the command line that reproduces this Config, starting from its preset
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from shards.schema import ShardError, read_index
from vfi import shipped
from vfi.config import command_line, presets
from vfi.config.configs import Config, ConfigError, accumulation

_CHECKPOINT = re.compile(r"step_(\d+)")


def flags(config: Config) -> list[str]:
    """Return flags of vfi.train that reproduce `config`; raise ConfigError when no flags do."""
    argv = differences(config)
    if command_line.from_command_line(argv) != config:
        raise ConfigError(f"no command line gives these settings: {' '.join(argv)} gives others")
    return argv


def differences(config: Config) -> list[str]:
    """Return --preset and a flag for each setting that differs from the preset."""
    default = presets.get(config.run.preset)
    argv = ["--preset", config.run.preset]
    for group in dataclasses.fields(config):
        ours, theirs = getattr(config, group.name), getattr(default, group.name)
        for field in dataclasses.fields(ours):
            value = getattr(ours, field.name)
            if value != getattr(theirs, field.name):
                argv += _flag(field.name, value)
    return argv


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, values)]


def run_folder(config: Config) -> Path:
    """Return the folder that holds everything of the run."""
    return Path(config.run.output_dir) / config.run.exp_name


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a run folder; 0 when there is none."""
    names = (_CHECKPOINT.fullmatch(path.name) for path in (folder / "checkpoints").glob("step_*"))
    return max((int(name[1]) for name in names if name), default=0)


def check(config: Config, processes: int, later: str = "") -> list[str]:
    """Raise ConfigError or ShardError, which say what to do, when `config` can't train; return notes on unchecked items.

    `later` names a run that will exist by the time the training starts (--start_from in a chain).
    """
    if config.run.dry_run:
        raise ConfigError("--dry_run after the -- would be a job that leaves nothing: give it before, to see the script")
    accumulation(config, processes)
    if not config.data.data_path:
        raise ConfigError("--data_path is missing: give a shard folder after the --, as to vfi.train")
    paths = [path for path in (*config.data.data_path, config.data.val_path) if path]
    for path in paths:
        if "://" not in path:
            check_shards(path)
    _check_size(config, processes)
    refuse_other_run(config)
    _check_first_weights(config, later)
    return [f"{path} is remote: it is not checked before the job starts" for path in paths if "://" in path]


def check_shards(path: str) -> None:
    """Raise ShardError unless all shards of a local folder exist with the sizes that its index states."""
    for shard in read_index(path).shards:
        file = Path(path) / shard.name
        size = file.stat().st_size if file.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes, its index says {shard.bytes}"
            raise ShardError(f"{file} {found}: run `python -m shards.verify {path}`, then copy or make the folder again")


def _check_size(config: Config, processes: int) -> None:
    """Raise ConfigError when an epoch would not have a single step."""
    data = config.data
    total = data.global_batch or data.batch_size * processes
    local = [path for path in data.data_path if "://" not in path]
    samples = sum(read_index(path).samples for path in local)
    if len(local) == len(data.data_path) and samples < total and data.remainder == "drop":
        raise ConfigError(
            f"--data_path has {samples} samples, a global batch {total} (--global_batch, or --batch_size {data.batch_size} * "
            f"{processes} processes): an epoch would have no step. Use a smaller batch, fewer GPUs, or --remainder pad"
        )


def refuse_other_run(config: Config) -> None:
    """Raise ConfigError when the folder already holds a run that this one does not resume."""
    folder = run_folder(config)
    if (step := newest_step(folder)) and config.run.resume != "auto":
        raise ConfigError(f"{folder} already holds a run at step {step}: resume it by --resume auto, or use another name")


def _check_first_weights(config: Config, later: str) -> None:
    """Raise ConfigError when the weights that the run starts from do not exist."""
    run = config.run
    first = run.start_from or (run.resume if run.resume != "auto" else "")
    if not first or first == later:
        return
    places = (shipped.FOLDER,) if shipped.is_shipped(first) else (Path(first), Path(run.output_dir) / first)
    if not any(place.is_file() or newest_step(place) or (place / "model.safetensors").is_file() for place in places):
        raise ConfigError(f"no run or checkpoint {first!r} to start from: looked at {' and '.join(map(str, places))}")


def make_resumable(config: Config) -> Config:
    """Return a config whose command can be repeated: it resumes where the run stopped, whatever its initial weights were."""
    run = config.run
    if run.resume in ("", "auto"):
        return presets.override(config, resume="auto")
    return presets.override(config, resume="auto", start_from=run.resume)
