"""Run a benchmark: all models on one data set, from options to results."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vfi.config.configs import ModelConfig
from vfi.errors import JobError
from vfi.evaluation.evaluator import EvalOptions, Predictor, Scores, mean_of, measure, predict, summarise
from vfi.evaluation.external_models import Adapter, Model, distinct_names, load_any
from vfi.evaluation.partial_scores import ScoreCache
from vfi.evaluation.results import BASELINES, Results, Row, check_output, write_results
from vfi.evaluation.sample_images import check_folder, draw_pictures
from vfi.evaluation.settings import BenchmarkSettings
from vfi.evaluation.task import EvaluationTask, task_from_protocol, task_from_shards
from vfi.inference.loading import LoadedModel, check_scale
from vfi.io.writer_lock import writer_lock
from vfi.metrics.lpips import load_lpips
from vfi.model.interpolator import FrameInterpolator
from vfi.profiling import costs
from vfi.runtime.device import DeviceName, pick_device, pick_precision
from vfi.runtime.logging import show_messages
from vfi.runtime.numerics import set_numerics
from vfi.tracking.environment import benchmark_environment


def benchmark(settings: BenchmarkSettings, command: str = "") -> Results | None:
    """Measure every model and the baselines, write the results, and return those of results.json on rank 0, None on the others.

    Raises JobError, ShardError or CheckpointError for unusable options, before anything is measured.
    """
    _check(settings)
    with writer_lock(settings.out, "give another --out"):
        return _benchmark(settings, command)


def _benchmark(settings: BenchmarkSettings, command: str) -> Results | None:
    rank, world = this_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    show_messages(is_main=rank == 0)
    device = _own_device(settings.device)
    set_numerics()  # by default cuDNN rounds the factors of fp32 convolutions, also in models from elsewhere
    precision = pick_precision(settings.precision, device)
    task = task_from_protocol(settings, device) if settings.protocol else task_from_shards(settings, device)
    if not task.samples:
        raise JobError(f"--data {settings.data} holds no samples: nothing was measured")
    models = [load_any(model, device) for model in settings.model]
    named = dict(zip(distinct_names(models, taken=BASELINES), models, strict=True))
    ours = [model for model in models if isinstance(model, LoadedModel)]
    check_scale(task.rules.scale, [model for model in ours if not settings.protocol or model.has_flow])
    lpips = load_lpips(settings.lpips, device) if settings.lpips else None

    predictors = {name: _predictor(model, precision, task.rules.scale) for name, model in named.items()}
    facts = task.facts | {"LPIPS": "AlexNet, v0.1" if lpips else "not measured: --lpips FILE names its weights"}
    environment = benchmark_environment(device, precision, world, command)
    depends_on = {"data": task.sha256, "samples": task.samples, "protocol": facts, "motion": settings.motion} | {
        "models": {name: model.fingerprint() for name, model in named.items()},
        "hardware": [environment[name] for name in ("device", "precision", "torch")],
    }
    options = EvalOptions(settings.tta, settings.motion, lpips, settings.workers)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with ScoreCache(_unfinished(settings.out), depends_on, rank, world) as cache:
        measure(task, predictors, cache, options, show=rank == 0)
        found = cache.finish(task.samples)
        if found is None:
            return None
        scores, motion = summarise(found)
        rows = [_row(name, named.get(name), scores[name], settings.out) for name in (*BASELINES, *named)]
        rows = [dataclasses.replace(row, macs=_macs(named.get(row.model), task, precision)) for row in rows]
        pictures = draw_pictures(
            settings.out, settings.pictures, task, rows[0], rows[len(BASELINES)],
            {name: partial(predict, predictor=one, task=task, tta=settings.tta) for name, one in predictors.items()},
            {name: _flow(model, precision, task.rules.scale) for name, model in named.items() if _has_flow(model)},
        )  # fmt: skip
        results = Results(
            data=str(settings.data), index_sha256=task.sha256, samples=len(rows[0].images), available=task.available,
            protocol=facts, environment=environment, rows=tuple(rows), pictures=tuple(pictures), motion=motion,
        )  # fmt: skip
        write_results(settings.out, results)
        cache.forget()
    return results


def this_rank() -> int:
    """Return the rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def _own_device(name: DeviceName) -> torch.device:
    """Select the device of this rank; ranks of one machine each have a GPU of their own."""
    if name != "cpu" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= gpus:
            raise JobError(f"process {rank} of this machine has no GPU: start at most {gpus}, or use --device cpu")
        torch.cuda.set_device(rank)
    return pick_device(name)


def _unfinished(out: Path) -> Path:
    """Return the folder of scores until all of them are there."""
    return out.with_name(f"{out.stem}_unfinished")


def _check(settings: BenchmarkSettings) -> None:
    """Reject what would otherwise fail only after the measurement."""
    if not settings.model:
        raise JobError("--model needs at least one run folder, such as --model runs/tiny_phase1, or shipped")
    if not settings.data:
        raise JobError("--data is missing: give a shard folder, or with --protocol a published one")
    check_output(settings.out, "results.json")
    if settings.limit is not None and settings.limit < 1:
        raise JobError(f"--limit {settings.limit} must be at least 1")
    if settings.scale is not None and settings.protocol:
        raise JobError(f"--scale {settings.scale} does not go with --protocol {settings.protocol}: its profile fixes the scale")
    if settings.pictures < 0 or settings.workers < 0:
        raise JobError(f"--pictures {settings.pictures} and --workers {settings.workers} must not be negative")
    check_folder(settings.out)


def _predictor(model: Model, precision: torch.dtype, scale: float | None) -> Predictor:
    """Return the predictor of a model; one without flow ignores the scale."""
    if isinstance(model, Adapter):
        return lambda img0, img1, timestep: model.ask(img0, img1, timestep.item(), scale)
    own = scale if model.has_flow else None
    return lambda img0, img1, timestep: model.predict(img0, img1, timestep, precision, own)


def _has_flow(model: Model) -> bool:
    return isinstance(model, LoadedModel) and model.has_flow


def _flow(model: Model, precision: torch.dtype, scale: float | None) -> Any:
    """Return a function that predicts the flow of a model of this project that has flow."""
    assert isinstance(model, LoadedModel)

    def flow(sample: Any, target: Any) -> torch.Tensor:
        time = torch.full((1,), target.timestep, device=sample.img0.device)
        return model.flow(sample.img0, sample.img1, time, precision, scale)

    return flow


def _row(name: str, model: Model | None, scores: Scores, out: Path) -> Row:
    ours = model if isinstance(model, LoadedModel) else None
    means: Mapping[str, Any] = {
        measure: mean_of(getattr(image, measure) for image in scores.images)
        for measure in ("psnr", "ssim", "ie", "psnr_moving", "lpips")
    }
    return Row(
        model=name,
        path=str(ours.path) if ours else model.name if model else None,
        run=os.path.relpath(ours.run_folder, out.parent) if ours else None,
        step=ours.step if ours else None,
        parameters=model.parameters if model else None,
        preset=ours.config.run.preset if ours else None,
        phase=ours.config.model.phase if ours else None,
        images=scores.images,
        psnr_of_changes=scores.changes,
        **means,
    )


def _macs(model: Model | None, task: EvaluationTask, precision: torch.dtype) -> int | None:
    """Count the MACs for one frame of the first sample's size; None for Mamba-1, whose reference scan takes minutes."""
    if not isinstance(model, LoadedModel) or model.config.model.ssm == "mamba1":
        return None
    config = model.config.model
    if task.rules.scale is not None and model.has_flow:
        config = dataclasses.replace(config, scale=task.rules.scale)
    first = next(iter(task.read([0])))
    height, width = first.img0.shape[-2:]
    return _macs_of(config, height, width, precision)


@functools.cache  # takes a second, and the models of a table often have the same size
def _macs_of(config: ModelConfig, height: int, width: int, precision: torch.dtype) -> int:
    return sum(costs.count(FrameInterpolator(config, "cpu").eval(), 1, (height, width), precision).macs.values())
