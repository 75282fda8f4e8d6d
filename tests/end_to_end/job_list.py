"""Several trainings one after another in the same processes: a launch of its own would cost each of them many seconds.

    accelerate launch --config_file CONFIG --num_processes 2 tests/end_to_end/job_list.py JOBS.json

Each entry of JOBS.json is a Job. What became of them goes into JOBS.json.rank0, .rank1 …, a list of [exit code, last line on
stderr]; exit code 0 is a training that was done.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment

from vfi import train
from vfi.checkpoint.store import list_checkpoints
from vfi.model import flow
from vfi.training import trainer as trainer_module

RANK = int(os.environ["RANK"])


class Job(NamedTuple):
    """One training."""

    flags: list[str]
    copied: tuple[str, str, int] | None = None
    """Beforehand: the folder of a run is copied there, as it was after that step."""
    faults: tuple[int, ...] = ()
    """Steps in which the gradient of the last process is non-finite; its loss is as it was. Each only the first time."""
    environment: dict[str, str] | None = None
    """What differs from what the launcher has set."""


def main(path: Path) -> None:
    """All jobs of a file."""
    gc.freeze()  # as in tests/conftest.py
    torch.set_num_threads(1)
    flow._BLOCKS = 1  # of three: what wraps layers takes most of the time
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        compile_nothing()
    results = []
    for job in json.loads(path.read_text()):
        results.append(run(Job(**job)))
        path.with_suffix(f".json.rank{RANK}").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def compile_nothing() -> None:
    """DeepSpeed compiles C++ on a CPU, for more than a minute: an all-reduce of inference, which no training calls."""
    import deepspeed.ops  # seconds, which the other jobs do not need

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run(job: Job) -> tuple[int, str]:
    """Exit code and last line on stderr; what else goes wrong ends the process."""
    if job.copied and RANK == 0:
        copy_run(Path(job.copied[0]), Path(job.copied[1]), job.copied[2])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    gc.collect()
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # nothing of the job before is left to go on with
        seed(99 + RANK)
    said = io.StringIO()
    try:
        with patch_environment(**job.environment or {}), faults(set(job.faults)), contextlib.redirect_stderr(said):
            train.main(job.flags)
    except SystemExit as stop:
        return int(stop.code or 0), said.getvalue().rstrip().rpartition("\n")[2]
    finally:
        sys.stderr.write(said.getvalue())
    return 0, ""


def copy_run(source: Path, target: Path, step: int) -> None:
    """A run as if it had been killed after its checkpoint of `step`."""
    shutil.copytree(source, target)
    for found in list_checkpoints(target):
        if found.step > step:
            shutil.rmtree(found.path)


@contextlib.contextmanager
def faults(steps: set[int]):
    """In these steps, the first time that they come, the gradient of the last process is made no number."""
    optimise, losses = trainer_module.Trainer.optimise, trainer_module.training_losses

    def faulty_losses(*arguments):
        found = losses(*arguments)
        found["loss"].register_hook(lambda gradient: gradient * torch.nan)
        return found

    def faulty_optimise(trainer, meter):
        due = trainer.live.step + 1 in steps
        steps.discard(trainer.live.step + 1)
        if due and int(os.environ["WORLD_SIZE"]) - 1 == RANK:
            trainer_module.training_losses = faulty_losses
        try:
            return optimise(trainer, meter)
        finally:
            trainer_module.training_losses = losses

    trainer_module.Trainer.optimise = faulty_optimise
    try:
        yield
    finally:
        trainer_module.Trainer.optimise = optimise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
