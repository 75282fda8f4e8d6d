"""Train a model on shards (`vfi train`).

    accelerate launch --config_file accelerate_configs/single_gpu.yaml -m vfi.train --data_path SHARDS --val_path SHARDS \\
        --phase 1 --preset small --exp_name NAME
    torchrun --nproc_per_node 2 -m vfi.train …          python -m vfi.train …          vfi train …

One run folder holds everything: config.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from shards.schema import ShardError
from vfi.config import command_line
from vfi.config.configs import Config, ConfigError
from vfi.data.augment import FrameTooSmallError
from vfi.errors import CheckpointError, JobError, clear_errors
from vfi.io.writer_lock import writer_lock
from vfi.runtime.logging import logger
from vfi.runtime.numerics import explain_determinism_errors
from vfi.tracking.run_status import recorded
from vfi.training.divergence import TrainingError
from vfi.training.trainer import FlowTeacher, Trainer

_DRY_RUN_STEPS = 3


@explain_determinism_errors()
def train(config: Config, flow_teacher: FlowTeacher | None = None) -> None:
    """Train as `config` says; a dry run takes a few steps, validates and saves, and leaves nothing behind.

    `flow_teacher` supplies the flow to distil with --distill_weight, in place of flow stored alongside the samples.
    """
    if flow_teacher is not None and not config.optim.distill_weight:
        raise ConfigError("a flow_teacher was given, but --distill_weight is 0: it would have no effect")
    if config.optim.flow_teacher and flow_teacher is not None:
        raise ConfigError(f"a flow_teacher was given, and --flow_teacher {config.optim.flow_teacher}: remove one")
    if not config.run.dry_run:
        with writer_lock(Path(config.run.output_dir) / config.run.exp_name, _other_ways()):
            trainer = Trainer(config, flow_teacher)
            status = recorded(trainer.folder, trainer.live.total, lambda: trainer.live.step)
            with status if trainer.accelerator.is_main_process else contextlib.nullcontext():
                trainer.fit()
        return
    run = dataclasses.replace(
        config.run, steps=_DRY_RUN_STEPS, epochs=None, log_every=1, val_every=_DRY_RUN_STEPS, save_every=_DRY_RUN_STEPS,
        exp_name=f"dry_run_{config.run.exp_name}", resume="" if config.run.resume == "auto" else config.run.resume,
    )  # fmt: skip
    data = dataclasses.replace(config.data, val_samples=min(8, config.data.val_samples or 8))
    trainer = Trainer(dataclasses.replace(config, run=run, data=data), flow_teacher)
    try:
        trainer.fit()
        works = "training, validation and saving work" if data.val_path else "training and saving work (without a --val_path)"
        logger.info(f"dry run: {works}")
    finally:
        if trainer.accelerator.is_main_process:
            shutil.rmtree(trainer.folder, ignore_errors=True)


def _other_ways() -> str:
    """Return what to do where another process already writes the run folder."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "RANK" in os.environ:
        return "give another --exp_name"
    return f"give another --exp_name. srun started {tasks} tasks without a launcher, each a run of its own: use srun -n 1"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with clear_errors(ConfigError, ShardError, CheckpointError, FrameTooSmallError, TrainingError, JobError):
        train(command_line.from_command_line(argv))


if __name__ == "__main__":
    main()
