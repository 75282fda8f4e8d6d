"""Find the largest batch size whose training step fits into GPU memory, by trial steps before training starts.

    smaller = find_batch_size(config, accelerator, sharding="none")     # None: keep --batch_size

A trial takes two steps of a separate network, on frames of the run's largest crop, with everything that a run holds in memory
alongside; nothing of it remains. So the run equals, from its first step on, one started with the smaller --batch_size: the
global batch is the same, and so are the samples of every step (vfi/data/sampler.py).
"""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator

from vfi.config.configs import Config, accumulation
from vfi.errors import JobError
from vfi.runtime import memory
from vfi.runtime.logging import logger
from vfi.runtime.memory import is_out_of_memory
from vfi.runtime.numerics import explain_determinism_errors
from vfi.runtime.stop_signals import Agreement
from vfi.training.synthetic_step import PRECISIONS, TrainingStep

_HEADROOM = 256 * 2**20  # bytes that stay free in addition to a step: prefetched batches, metrics, fragmentation


def find_batch_size(config: Config, accelerator: Accelerator, sharding: str) -> Config | None:
    """Return the same experiment with a smaller --batch_size where a process's GPU can't hold it; None where all of them can.

    To be called by all processes together. JobError when not even one sample fits. Nothing is tried on a CPU, nor with sharded
    weights, where a process that has run out of memory would leave the others waiting for it.
    """
    if not supports_oom_trial(accelerator.device):
        return None
    if sharding != "none":
        logger.info(
            f"with {sharding} it is not tried beforehand whether --batch_size {config.data.batch_size} fits into memory"
        )
        return None
    agreement, fitting = Agreement(accelerator.device), config
    agreement.any(False, at_once=True)  # allocates what the processes need to communicate, before memory is measured
    precision = PRECISIONS[accelerator.mixed_precision]
    while agreement.any(not fits(fitting, accelerator.device, precision, accelerator.num_processes), at_once=True):
        if fitting.data.batch_size == 1:
            raise JobError(_nothing_fits(fitting, accelerator.device))
        fitting = with_smaller_batch(fitting, accelerator.num_processes)
    if fitting is config:
        return None
    logger.info(
        f"--batch_size {config.data.batch_size} does not fit into the memory of a GPU at crop {config.data.largest_crop}: this "
        f"run takes {fitting.data.batch_size} and accumulates {accumulation(fitting, accelerator.num_processes)}; the global "
        f"batch stays {fitting.data.global_batch}, and so does what every step sees"
    )
    return fitting


def supports_oom_trial(device: torch.device) -> bool:
    """Return whether this device reports that its memory is full; a CPU's process is killed instead."""
    return device.type == "cuda"


def with_smaller_batch(config: Config, processes: int) -> Config:
    """Return `config` with the largest divisor of --batch_size up to its half; the global batch stays the same."""
    batch = config.data.batch_size
    smaller = max(divisor for divisor in range(1, batch // 2 + 1) if batch % divisor == 0)
    total = batch * processes * accumulation(config, processes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=smaller, global_batch=total))


def fits(config: Config, device: torch.device, precision: torch.dtype, processes: int) -> bool:
    """Return whether a training step fits into this process's GPU; the memory is released afterwards."""
    try:
        with explain_determinism_errors():
            trial_step(config, device, precision, processes)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        done = False
    else:
        done = True
    memory.free_memory()  # only now: the error referenced its stack frames, and they their tensors
    if config.compute.compile:
        torch.compiler.reset()  # or the next step would be compiled for a dynamic batch size
    return done


def trial_step(config: Config, device: torch.device, precision: torch.dtype, processes: int) -> None:
    """Take two training steps, the second of which has AdamW's moments in memory; raises when memory is full."""
    step = TrainingStep(config, device, precision, accumulating=accumulation(config, processes) > 1)
    copies = (processes > 1) + (config.optim.ema > 0)  # DDP's gradient buckets, the EMA weights
    spare = torch.empty(_HEADROOM + copies * step.weights, dtype=torch.uint8, device=device)
    step.compile_ahead()
    for _ in range(2):
        step(step.make_frames())
    del spare


def _nothing_fits(config: Config, device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"not even one sample fits into the memory of {torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of "
        f"{total / 2**30:.1f} GiB of which are free, at crop {config.data.largest_crop}: use a smaller --crop, "
        f"--checkpointing, mixed precision (bf16, or fp16), or a GPU with more memory"
    )
