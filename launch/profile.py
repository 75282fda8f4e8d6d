"""Measure how much memory training takes on this GPU, and add the result to memory_profiles.json.

    python -m launch.profile --preset small --phase 2                     # srun --gres=gpu:1 … on a cluster
    python -m launch.profile --preset base --phase 1 --crops 256 512 --batches 2 8 24 --check_batches 12 --precision fp32

Measurements run in a separate process, which is replaced after a batch that runs out of memory, so that nothing is left over
for the next one. A formula (launch/memory/model.py) is fitted to --batches and validated on --check_batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from launch.memory.batch_size import GpuSpec, identify
from launch.memory.model import GIB, PROFILES, Entry, Fit, Point, Precision, add, fit_points, read_profiles
from shards.cli import parse_flags
from vfi.config import presets
from vfi.config.configs import Config, ConfigError
from vfi.config.validation import validate
from vfi.errors import JobError, clear_errors
from vfi.profiling import timing
from vfi.runtime import memory
from vfi.runtime.memory import is_out_of_memory
from vfi.runtime.numerics import numerics, set_numerics
from vfi.tracking.environment import environment
from vfi.training.cuda_graphs import enable_expandable_segments
from vfi.training.synthetic_step import PRECISIONS, TrainingStep

TOLERANCE = 0.05
"""Relative error above which a note says that the formula does not describe the measurements."""
_FOREIGN_GIB = 2.0  # more than CUDA and its libraries take
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command, one per field."""

    preset: str = "small"
    """Preset of vfi.train, or an experiment of an ablation."""
    phase: Literal[1, 2, 3] | None = None
    """Training phase; default: the preset's."""
    crops: tuple[int, ...] = (256, 384, 512)
    """Side lengths of the crops in pixels."""
    batches: tuple[int, ...] = (2, 8, 24)
    """Device batch sizes that are measured at each crop; none above the first one that runs out of memory is tried."""
    check_batches: tuple[int, ...] = (12,)
    """Device batch sizes that are held out to validate the formula."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; auto is bf16 where the GPU supports it, and fp16 elsewhere."""
    checkpointing: bool = False
    """As in vfi.train."""
    compile: bool = False
    """As in vfi.train."""
    cuda_graphs: bool = False
    """As in vfi.train."""
    out: Path = PROFILES
    """File to which the entry is added."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The GPU that is measured, and the environment of the measurements."""

    name: str
    memory_gib: float
    has_bf16: bool
    environment: dict[str, Any]


Measure = Callable[[Config, Precision], Point | None]
"""Run one training step and return its memory, or None when it runs out of memory."""


@clear_errors(ConfigError)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: measure, fit, print, and add the entry to the file."""
    options = parse_flags(Options, "python -m launch.profile", __doc__, argv)
    check_options(options)
    if not torch.cuda.is_available():
        raise JobError(
            "no GPU here: launch.profile measures the one that it runs on. Start it on a machine that has one, such as by "
            "srun --gres=gpu:1 python -m launch.profile …"
        )
    if options.cuda_graphs:
        enable_expandable_segments()  # as training does
    with contextlib.closing(OwnProcess()) as process:
        entry = profile(options, process.do(look), lambda config, precision: process.do(measure, config, precision))
    add(entry, options.out)
    print(f"added to {options.out}")


def check_options(options: Options) -> None:
    """Raise JobError or ConfigError, before measuring, for what can't be measured or written."""
    read_profiles(options.out)
    if not options.crops or not options.batches:
        raise JobError("--crops and --batches need at least one number each")
    if shared := set(options.batches) & set(options.check_batches):
        raise JobError(f"--check_batches {sorted(shared)} are among --batches: a check needs batches that were not fitted")
    for crop in options.crops:
        for batch in (*options.batches, *options.check_batches):
            validate(step_config(options, crop, batch))


def step_config(options: Options, crop: int, batch: int) -> Config:
    """Return the config of one measured step."""
    phase = {} if options.phase is None else {"phase": options.phase}
    changed = {name: getattr(options, name) for name in ("checkpointing", "compile", "cuda_graphs")}
    return presets.override(presets.get(options.preset), crop=crop, batch_size=batch, curriculum=False, **phase, **changed)


def profile(options: Options, gpu: Gpu, measure: Measure) -> Entry:
    """Measure every batch at every crop, fit the formula, print the findings and return the entry.

    Raises JobError when the GPU lacks bf16 that was asked for, or when nothing could be measured.
    """
    precision: Precision = options.precision if options.precision != "auto" else "bf16" if gpu.has_bf16 else "fp16"
    if precision == "bf16" and not gpu.has_bf16:
        raise JobError(f"{gpu.name} has no bf16: use --precision fp16")
    card = identify(gpu.name, gpu.memory_gib, read_profiles(options.out).cards)
    config = step_config(options, options.crops[0], options.batches[0])
    print(f"{config.run.preset}, phase {config.model.phase}, {precision} on {gpu.name}, {gpu.memory_gib:.1f} GiB")
    points = measure_points(options, precision, measure)
    fitted = tuple(point for point in points if point.batch in options.batches)
    held_out = tuple(point for point in points if point.batch in options.check_batches)
    if not fitted:
        raise JobError(
            f"{gpu.name} ran out of memory at each of --crops {options.crops} with the smallest of --batches "
            f"{options.batches}: use smaller ones, or --checkpointing"
        )
    fit = fit_points(fitted, held_out)
    for line in findings(fit, fitted, held_out, card, options.crops):
        print(line)
    compute = config.compute
    return Entry(
        config.run.preset, card.kind, gpu.memory_gib, config.model, precision, compute.checkpointing, compute.compile,
        fitted, fit, held_out, gpu.environment, compute.cuda_graphs,
    )  # fmt: skip


def measure_points(options: Options, precision: Precision, measure: Measure) -> list[Point]:
    """Return the points of all batches that fit into memory, smallest first within each crop."""
    points = []
    for crop in sorted(set(options.crops)):
        for batch in sorted({*options.batches, *options.check_batches}):
            point = measure(step_config(options, crop, batch), precision)
            if point is None:
                print(f"crop {crop}, batch {batch}: out of memory", flush=True)
                break
            print(f"crop {crop}, batch {batch}: {point.allocated / GIB:.2f} GiB", flush=True)
            points.append(point)
    return points


def findings(
    fit: Fit | None, fitted: Sequence[Point], held_out: Sequence[Point], card: GpuSpec, crops: Iterable[int]
) -> list[str]:
    """Return lines with the formula, its errors, and the batch sizes that follow from it."""
    lines = []
    outside = max((point.outside or 0 for point in (*fitted, *held_out)), default=0)
    if outside > _FOREIGN_GIB * GIB:
        lines.append(f"note: {outside / GIB:.1f} GiB of this GPU are taken outside of torch: is there another process on it?")
    if fit is None:
        return [*lines, "no formula: it takes three points of different batch * crop^2. The points are kept as they are"]
    lines.append(f"peak = {fit.fixed / GIB:.2f} GiB + {fit.per_pixel:,.0f} bytes * batch * crop^2")
    for name, points in (("fitted", fitted), ("not fitted", held_out)):
        if points:
            worst = max(map(abs, fit.errors(points)))
            lines.append(f"largest error at the {len(points)} points {name}: {worst:.1%}")
    if fit.residual > TOLERANCE:
        lines.append(
            f"note: the formula errs by more than {TOLERANCE:.0%}, and batches are chosen the smaller by that. It holds for "
            f"crops whose sixteenth is a multiple of --window_size"
        )
    for crop in sorted(set(crops)):
        lines.append(f"largest batch at crop {crop}: {fit.largest_batch(crop, card.budget)} in {card}")
    return lines


class OwnProcess:
    """A separate worker process, replaced after work that raised an error or returned None (out of memory)."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return or raise what `work` returns or raises in the process; raise JobError when the process dies."""
        self.pool = self.pool or ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        result = None
        try:
            result = self.pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise JobError("the process that measured died: was it killed, for want of the machine's own memory?") from error
        finally:
            if result is None:
                self.close()
        return result

    def close(self) -> None:
        """End the process."""
        if self.pool:
            self.pool.shutdown()
        self.pool = None


def look() -> Gpu:
    """Return the GPU and everything in its environment that affects memory."""
    device = torch.device("cuda")
    set_numerics()
    properties = torch.cuda.get_device_properties(device)
    told = environment(device) | numerics() | {
        "cudnn": torch.backends.cudnn.version(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", "")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip
    return Gpu(properties.name, properties.total_memory / GIB, torch.cuda.is_bf16_supported(False), told)


def measure(config: Config, precision: Precision) -> Point | None:
    """Return the memory of a training step that accumulates into existing gradients; None when it runs out of memory."""
    device = torch.device("cuda")
    set_numerics(config.compute.tf32, config.compute.deterministic)
    try:
        return _measure(TrainingStep(config, device, PRECISIONS[precision], accumulating=True), config, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        memory.free_memory()
        torch.compiler.reset()  # or the second batch would be compiled with dynamic shapes
    return None


def _measure(step: TrainingStep, config: Config, device: torch.device) -> Point:
    first = timing.measure(step, step.make_frames, device, repeats=1)
    assert first.allocated is not None
    frames = step.make_frames()
    memory.free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    step(frames)
    reserved = torch.cuda.max_memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    allocated = first.allocated + (step.recorder.pool_bytes_free if step.recorder else 0)
    return Point(config.data.batch_size, config.data.crop, allocated, reserved, first.reserved, outside)


if __name__ == "__main__":
    main()
