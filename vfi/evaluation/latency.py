"""Measure the latency and memory of one or more models, on photographs, at any frame size.

    vfi benchmark --speed --model runs/base --out speed.json
    vfi benchmark --speed --model runs/base runs/small --out speed.json --compare_to docs/speed/h100.json
    vfi benchmark --speed --model runs/base vfimamba_adapter:vfimamba --sizes 736x1280 2176x4096 --scale 0.25 --out speed.json

A call predicts all in-between frames of a pair: one for twice the frame rate (×2), and seven for ×8, where models of this
project compute their features once. Each call is timed from an idle device to its last frame. Several models alternate, one
call of each per round, so that heat and clock rates affect them alike. Writes a speed file (vfi/evaluation/latency_results.py)
and prints its table.
"""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shards.codecs import read_image
from shards.factories import is_factory
from shards.synthetic_scene import photograph_paths
from vfi.errors import JobError
from vfi.evaluation.external_models import Adapter, Model, distinct_names, load_any
from vfi.evaluation.latency_results import OWN_PRECISION, Speed, SpeedRow, write_speed
from vfi.evaluation.results import check_output
from vfi.evaluation.settings import parse_size
from vfi.inference.loading import LoadedModel, check_scale
from vfi.io.writer_lock import writer_lock
from vfi.model.compile import compile_modules
from vfi.model.interpolator import FrameInterpolator
from vfi.profiling.timing import WARMUP
from vfi.runtime.cuda_graphs import Graphs
from vfi.runtime.device import DeviceName, PrecisionName, describe_precision, pick_device, pick_precision
from vfi.runtime.memory import free_memory, if_it_fits
from vfi.runtime.numerics import set_numerics
from vfi.tracking.environment import environment

_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "motorcycle_left.png")  # a pair of each: no input stays in a cache
_MOTION = (1 / 90, 1 / 45)  # of height and width: 8 and 28 pixels at 736x1280

Pair = tuple[Tensor, Tensor]
"""img0, img1: `[1, 3, H, W]` in [0, 1]."""
PairPredictor = Callable[[Tensor, Tensor], object]
"""One call: img0, img1 -> all in-between frames."""


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """What is timed, and how; each field is a flag of `vfi benchmark --speed`."""

    model: tuple[str, ...]
    """Run folders, checkpoint folders, .safetensors files, `shipped` (the model that comes with the package), or MODULE:FACTORY
    for a model of another repository (see vfi/evaluation/external_models.py); the first one is the baseline of the others."""
    out: Path
    """Speed file to write, a .json."""
    device: DeviceName = "auto"
    """auto selects a GPU if there is one."""
    precision: PrecisionName = "auto"
    """auto is bf16 autocast on a GPU that supports it, otherwise fp32. Models of other repositories choose their own."""
    sizes: tuple[str, ...] = ("256x448", "736x1280", "1088x1920")
    """Frame sizes, HEIGHTxWIDTH."""
    factors: tuple[int, ...] = (2, 8)
    """Factors by which the frame rate grows: factor - 1 frames are predicted from each pair."""
    compile: bool = False
    """Compile the models with torch.compile, in the same parts as in training."""
    repeats: int = 20
    """Timed calls of each model, after warm-up."""
    scale: float | None = None
    """Estimate flow at this fraction of the frame size: 1, 0.5 or 0.25; default: each model's own setting."""
    tf32: bool = False
    """As in vfi.train."""


class BenchmarkedModel(NamedTuple):
    """One of the models that are measured together."""

    name: str
    model: LoadedModel | Adapter
    held: int = 0
    """Bytes on the GPU that loading it allocated."""


def speed(settings: SpeedSettings, command: str = "") -> Speed:
    """Measure every model at every size and factor, write the speed file, and return its content.

    Raises JobError or CheckpointError for unusable settings, before anything is measured.
    """
    _check(settings)
    with writer_lock(settings.out, "give another --out"):
        return _speed(settings, command)


def _speed(settings: SpeedSettings, command: str) -> Speed:
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    if device.type == "cuda":
        set_numerics(settings.tf32)
    contenders = _load(settings, device)
    check_scale(settings.scale, [one.model for one in contenders if isinstance(one.model, LoadedModel)])
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    rows = measure_speed(contenders, settings, device, precision)
    facts = environment(device) | {  # read after the measurement: an adapter may have set global flags
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "choices": {one.name: _choices(one.model) for one in contenders},
    }
    found = Speed(facts, _settings(settings, device, precision), rows)
    write_speed(settings.out, found)
    return found


def _check(settings: SpeedSettings) -> None:
    """Reject what would otherwise fail only after the measurement."""
    if not settings.model:
        raise JobError("--model needs at least one run folder, such as --model runs/tiny_phase1, or shipped")
    check_output(settings.out, "speed.json")
    if not settings.sizes:
        raise JobError("--sizes needs at least one size, such as 736x1280")
    for size in settings.sizes:
        parse_size(size)
    if not settings.factors:
        raise JobError("--factors needs at least one factor, such as 2")
    for factor in settings.factors:
        if factor < 2:
            raise JobError(f"--factors {factor} must be at least 2, for one frame between two")
    if settings.repeats < 1:
        raise JobError(f"--repeats {settings.repeats} must be at least 1")
    if settings.compile and (adapters := [model for model in settings.model if is_factory(model)]):
        raise JobError(f"--compile does not reach into --model {', '.join(adapters)}: compile it in the adapter yourself")


def _load(settings: SpeedSettings, device: torch.device) -> list[BenchmarkedModel]:
    loaded: list[tuple[Model, int]] = []
    for given in settings.model:
        before = _allocated(device)
        model = load_any(given, device)
        if settings.compile:
            assert isinstance(model, LoadedModel)  # adapters have been rejected
            compile_modules(cast(FrameInterpolator, model.model), without_gradients=True)
        loaded.append((model, _allocated(device) - before))
    names = distinct_names([model for model, _ in loaded])
    return [BenchmarkedModel(name, *one) for name, one in zip(names, loaded, strict=True)]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _choices(model: LoadedModel | Adapter) -> list[str]:
    """Return the fast paths that a model of this project takes, and why."""
    return [] if isinstance(model, Adapter) else cast(FrameInterpolator, model.model).choices()


def _settings(settings: SpeedSettings, device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Describe the measurement, for readers."""
    graphs = "for this project's models, where they pay (vfi/runtime/cuda_graphs.py)" if device.type == "cuda" else "none"
    return {
        "precision": describe_precision(precision),
        "TF32": settings.tf32,
        "torch.compile": settings.compile,
        "CUDA graphs": graphs,
        "flow scale": "each model's own" if settings.scale is None else settings.scale,
        "frames": f"parts of photographs that move, one pair a call, {len(_PHOTOGRAPHS)} pairs in rotation",
        "timed calls": settings.repeats,
        "warm-up calls": WARMUP,
        "order": "one call of each model in turn",
    }


def measure_speed(
    contenders: Sequence[BenchmarkedModel], settings: SpeedSettings, device: torch.device, precision: torch.dtype
) -> tuple[SpeedRow, ...]:
    """Measure rows by size, then factor, then model. A model that does not fit into memory at a size gets a row, too."""
    sizes, factors = dict.fromkeys(settings.sizes), dict.fromkeys(settings.factors)
    rows: list[SpeedRow] = []
    with tqdm(total=len(sizes) * len(factors), unit="table", desc="speed", disable=None) as progress:
        for size in sizes:
            pairs = real_pairs(*parse_size(size))
            for factor in factors:
                rows += _measure(contenders, pairs, factor, settings, device, precision)
                progress.update()
            if settings.compile:
                torch.compiler.reset()  # compiled code of this size would only slow down the next one
    return tuple(rows)


def real_pairs(height: int, width: int) -> list[Pair]:
    """Return pairs of frames on the CPU: a photograph, mirrored at its edges to the size, and the same one shifted."""
    dy, dx = (max(1, round(side * part)) for side, part in zip((height, width), _MOTION, strict=True))
    pairs = []
    for path in photograph_paths("train"):
        if path.name in _PHOTOGRAPHS:
            image = read_image(path)
            missing = [(0, max(0, side - has)) for side, has in zip((height + dy, width + dx), image.shape[:2], strict=True)]
            canvas = torch.from_numpy(np.pad(image, (*missing, (0, 0)), mode="symmetric")).permute(2, 0, 1)[None]
            img0, img1 = canvas[..., :height, :width], canvas[..., dy : dy + height, dx : dx + width]
            pairs.append((img0.contiguous().float() / 255, img1.contiguous().float() / 255))
    return pairs


def _measure(
    contenders: Sequence[BenchmarkedModel],
    pairs: Sequence[Pair],
    factor: int,
    settings: SpeedSettings,
    device: torch.device,
    precision: torch.dtype,
) -> list[SpeedRow]:
    """Measure a row for each model: first its memory, alone, then the time of all of them in turn."""
    predictors, memory = {}, {}
    for one in contenders:
        make = partial(make_predictor, one.model, factor, device, precision, settings.scale)
        others = sum(other.held for other in contenders) - one.held
        found = if_it_fits(partial(_memory, make(), pairs[0], others, device))
        if found is not None:
            predictors[one.name], memory[one.name] = make(), found
    times = _alternate(predictors, [(img0.to(device), img1.to(device)) for img0, img1 in pairs], settings.repeats, device)
    predictors.clear()  # and their graphs
    free_memory()
    size = "{}x{}".format(*pairs[0][0].shape[2:])
    rows = [_row(one, size, factor, precision, settings.compile, times.get(one.name)) for one in contenders]
    for number, row in enumerate(rows):
        if row.ms is not None:
            allocated, reserved = memory[row.model]
            ratio = row.ms / rows[0].ms if rows[0].ms else None
            rows[number] = dataclasses.replace(row, allocated=allocated, reserved=reserved, ratio=ratio)
    return rows


def _row(
    one: BenchmarkedModel, size: str, factor: int, precision: torch.dtype, compiled: bool, times: Sequence[float] | None
) -> SpeedRow:
    """Build a row from the milliseconds of a model's calls; None: not enough memory."""
    ours = one.model if isinstance(one.model, LoadedModel) else None
    row = SpeedRow(
        model=one.name,
        path=str(ours.path) if ours else None,
        parameters=one.model.parameters,
        size=size,
        factor=factor,
        precision=describe_precision(precision) if ours else OWN_PRECISION,
        compiled=compiled,
        out_of_memory=times is None,
    )
    if times is None:
        return row
    ms = statistics.median(times)
    per_second = 1e3 * (factor - 1) / ms
    return dataclasses.replace(row, ms=ms, ms_p90=float(np.percentile(times, 90)), frames_per_s=per_second)


def make_predictor(
    model: LoadedModel | Adapter, factor: int, device: torch.device, precision: torch.dtype, scale: float | None
) -> PairPredictor:
    """Return a function that predicts all in-between frames of a pair; it owns its CUDA graphs."""
    timesteps = [number / factor for number in range(1, factor)]
    if isinstance(model, Adapter):
        return lambda img0, img1: [model.ask(img0, img1, timestep, scale) for timestep in timesteps]
    moments, fresh = torch.tensor(timesteps, device=device), dataclasses.replace(model, graphs=Graphs())
    if factor == 2:
        return lambda img0, img1: fresh.predict(img0, img1, moments, precision, scale)
    return lambda img0, img1: fresh.predict_several(img0, img1, moments, precision, scale)


def _memory(predictor: PairPredictor, pair: Pair, others: int, device: torch.device) -> tuple[int | None, int | None]:
    """Return (allocated, reserved), the peak bytes of a timed call as if the model were alone; None on a CPU.

    This includes its weights, its frames and the libraries' workspaces. The weights of the other models are in memory, too: the
    `others` bytes that loading them allocated are subtracted. Memory that the first call uses to choose algorithms and to tune
    kernels is released first; otherwise it would stay in `reserved` of whichever model and factor come first.
    """
    if device.type != "cuda":
        return None, None
    free_memory()
    img0, img1 = (frame.to(device) for frame in pair)
    predictor(img0, img1)
    free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP):  # with CUDA graphs: eager, captured, and replayed
        predictor(img0, img1)
    return torch.cuda.max_memory_allocated(device) - others, torch.cuda.max_memory_reserved(device) - others


def _alternate(
    predictors: dict[str, PairPredictor], pairs: Sequence[Pair], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time every call of each model in milliseconds; a model that runs out of memory is removed, from `predictors`, too."""
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for number in range(WARMUP + repeats):
        for place, name in enumerate(list(times)):
            pair = pairs[(number + place) % len(pairs)]  # not the one that the model before has just read
            milliseconds = if_it_fits(partial(_timed, predictors[name], pair, device))
            if milliseconds is None:
                del times[name], predictors[name]
            elif number >= WARMUP:
                times[name].append(milliseconds)
    return times


def _timed(predictor: PairPredictor, pair: Pair, device: torch.device) -> float:
    """Time one call in milliseconds on an idle device: kernels that queue behind others would hide the time of their launch."""
    if device.type != "cuda":
        begun = time.perf_counter()
        predictor(*pair)
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    predictor(*pair)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
