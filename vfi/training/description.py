"""Describe a training run: on the screen, and in its config.json and environment.json."""

from __future__ import annotations

import math
from pathlib import Path

from vfi.checkpoint import store
from vfi.distributed.launcher_checks import asked_precision, idle_gpus
from vfi.io.dataclass_json import to_json, write_text
from vfi.runtime.logging import logger
from vfi.tracking.environment import environment, write_environment
from vfi.tracking.tracker import Tracker
from vfi.training.run import Run


def describe(run: Run, folder: Path) -> None:
    """Log a summary of the run, and write config.json and environment.json into its folder on the main process.

    A run that is finished leaves them as they are.
    """
    config, accelerator, plan, sharding = run.config, run.accelerator, run.loader.plan, run.strategy.name
    device, world, accumulation = accelerator.device, accelerator.num_processes, accelerator.gradient_accumulation_steps
    size = f"{run.parameters / 1e6:.2f} M parameters"
    logger.info(f"run {folder}: preset {config.run.preset}, phase {config.model.phase}, {size}")
    where = device.type if sharding == "none" else f"{device.type} in shards ({sharding})"
    logger.info(
        f"{world} process{'es' * (world > 1)} on {where}, precision {asked_precision()}, "
        f"global batch {plan.global_batch} = {config.data.batch_size} * {world} * {accumulation} accumulated"
    )
    epochs = run.epoch + (run.total - run.step) / plan.steps_per_epoch
    mixed = " of a mixture" if len(config.data.data_path) > 1 else ""
    logger.info(f"{plan.samples} samples{mixed}, {plan.steps_per_epoch} steps an epoch, {epochs:.1f} epochs")
    for note in _remarks(run):
        logger.info(note)
    for choice in run.choices:
        logger.info(choice)
    if run.monitor and sharding != "none":
        logger.info("weights are in shards: no state is kept in memory, and a roll-back returns to a checkpoint (--save_every)")
    if idle_gpus():
        logger.info(f"{idle_gpus()} more GPUs are visible and not used: accelerate_configs/ddp.yaml uses several")
    if accelerator.is_main_process and run.step < run.total:
        write_text(folder / store.CONFIG, to_json(config))
        content = environment(device) | {"processes": world, "precision": asked_precision(), "sharding": sharding}
        write_environment(folder, content | {"choices": run.choices, "from_step": run.step})


def log_start(run: Run, tracker: Tracker, asked: int) -> None:
    """Log as metrics a batch size that is smaller than the one that was asked for, and the settings that have changed."""
    if (size := run.config.data.batch_size) != asked:
        accumulation = run.accelerator.gradient_accumulation_steps
        tracker.log(run.step, "batch", asked=asked, batch_size=size, accumulation=accumulation)
    if run.changed and run.step < run.total:
        tracker.log(run.step, "settings", changed=run.changed)


def _remarks(run: Run) -> list[str]:
    """Return what is unusual about the length of the run."""
    optim, epochs = run.config.optim, math.ceil(run.total / run.loader.plan.steps_per_epoch)
    if run.step >= run.total:
        return [
            f"finished: step {run.step} of {run.total} is saved; to train on, give more --steps or --epochs, and --schedule"
        ]
    remarks = []
    if optim.warmup_steps >= run.total:
        remarks.append(
            f"--warmup_steps {optim.warmup_steps} is not less than the {run.total} steps of the run: the learning rate never "
            f"reaches --lr {optim.lr:g}"
        )
    if optim.freeze_backbone >= epochs:
        remarks.append(
            f"--freeze_backbone {optim.freeze_backbone} is not less than the run, {epochs} epochs: the backbone never trains"
        )
    return remarks
