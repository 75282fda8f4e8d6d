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

from shards.schema import ShardError
from vfi.config.configs import ModelConfig
from vfi.errors import JobError
from vfi.evaluation.datasets import find_sets
from vfi.evaluation.evaluator import EvalOptions, Predictor, Scores, mean_of, measure, predict, summarise
from vfi.evaluation.external_models import Adapter, Model, distinct_names, load_any
from vfi.evaluation.options import Options
from vfi.evaluation.partial_scores import ScoreCache
from vfi.evaluation.protocols import PROTOCOLS
from vfi.evaluation.results import BASELINES, Results, Row, check_output, table, write_results
from vfi.evaluation.sample_images import check_folder, draw_pictures
from vfi.evaluation.task import EvaluationTask, protocol_bench, task_from_shards
from vfi.inference.loading import LoadedModel, check_scale
from vfi.metrics.lpips import load_lpips
from vfi.model.interpolator import FrameInterpolator
from vfi.profiling import costs
from vfi.runtime.device import DeviceName, pick_device, pick_precision
from vfi.runtime.logging import logger, show_messages
from vfi.runtime.numerics import set_numerics
from vfi.tracking.environment import benchmark_environment


def benchmark_all(options: Options, command: str = "") -> bool:
    """Measure on every published set below --data_root -> False if one that was found could not be measured."""
    if options.data_root is None or options.data:
        raise JobError("--protocol all takes --data_root, the folder with the sets, in place of --data")
    if options.out.suffix or options.out.is_file():
        raise JobError(f"--out {options.out}: with --protocol all give a folder, for a file of each set")
    found = find_sets(options.data_root)
    if not found:
        raise JobError(f"--data_root {options.data_root} and two levels below it hold none of {', '.join(PROTOCOLS)}")
    lines, usable = list[str](), True
    show_messages(is_main=_rank() == 0)
    for name, protocol in PROTOCOLS.items():
        if name not in found:
            lines.append(f"{name}: not there")
        elif options.profile not in protocol.profiles:
            lines.append(f"{name}: no profile {options.profile}")
        else:
            one = dataclasses.replace(options, protocol=name, data=str(found[name]), data_root=None)
            one = dataclasses.replace(one, out=options.out / f"{name}.json")
            logger.info(f"{name}: {found[name]}")
            try:
                results = benchmark(one, command)
            except (JobError, ShardError) as error:
                usable = False
                lines.append(f"{name}: NOT MEASURED: {error}")
            else:
                lines.append(f"{name}: {one.out}")
                logger.info(table(results) if results else "")
    logger.info("\n".join(lines))
    return usable


def benchmark(options: Options, command: str = "") -> Results | None:
    """Measure every model and the baselines, write the results, and return those of results.json on rank 0, None on the others.

    Raises JobError, ShardError or CheckpointError for unusable options, before anything is measured.
    """
    _check(options)
    rank, world = _rank(), int(os.environ.get("WORLD_SIZE", "1"))
    show_messages(is_main=rank == 0)
    device = _own_device(options.device)
    set_numerics()  # by default cuDNN rounds the factors of fp32 convolutions, also in models from elsewhere
    precision = pick_precision(options.precision, device)
    bench = protocol_bench(options, device) if options.protocol else task_from_shards(options, device)
    if not bench.samples:
        raise JobError(f"--data {options.data} holds no samples: nothing was measured")
    models = [load_any(model, device) for model in options.model]
    named = dict(zip(distinct_names(models, taken=BASELINES), models, strict=True))
    ours = [model for model in models if isinstance(model, LoadedModel)]
    check_scale(bench.rules.scale, [model for model in ours if not options.protocol or model.has_flow])
    lpips = load_lpips(options.lpips, device) if options.lpips else None

    asks = {name: _ask(model, precision, bench.rules.scale) for name, model in named.items()}
    facts = bench.facts | {"LPIPS": "AlexNet, v0.1" if lpips else "not measured: --lpips FILE names its weights"}
    environment = benchmark_environment(device, precision, world, command)
    settings = {"data": bench.sha256, "samples": bench.samples, "protocol": facts, "motion": options.motion} | {
        "models": {name: model.fingerprint() for name, model in named.items()},
        "hardware": [environment[name] for name in ("device", "precision", "torch")],
    }
    way = EvalOptions(options.tta, options.motion, lpips, options.workers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with ScoreCache(_unfinished(options.out), settings, rank, world) as ledger:
        measure(bench, asks, ledger, way, show=rank == 0)
        found = ledger.finish(bench.samples)
        if found is None:
            return None
        scores, motion = summarise(found)
        rows = [_row(name, named.get(name), scores[name], options.out) for name in (*BASELINES, *named)]
        rows = [dataclasses.replace(row, macs=_macs(named.get(row.model), bench, precision)) for row in rows]
        pictures = draw_pictures(
            options.out, options.pictures, bench, rows[0], rows[len(BASELINES)],
            {name: partial(predict, ask=ask, bench=bench, tta=options.tta) for name, ask in asks.items()},
            {name: _flow(model, precision, bench.rules.scale) for name, model in named.items() if _has_flow(model)},
        )  # fmt: skip
        results = Results(
            data=str(options.data), index_sha256=bench.sha256, samples=len(rows[0].images), available=bench.available,
            protocol=facts, environment=environment, rows=tuple(rows), pictures=tuple(pictures), motion=motion,
        )  # fmt: skip
        write_results(options.out, results)
        ledger.forget()
    return results


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _own_device(name: DeviceName) -> torch.device:
    """Select the device of this rank; ranks of one machine each have a GPU of their own."""
    if name != "cpu" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= gpus:
            raise JobError(f"process {rank} of this machine has no GPU: start at most {gpus}, or take --device cpu")
        torch.cuda.set_device(rank)
    return pick_device(name)


def _unfinished(out: Path) -> Path:
    """Return the folder of scores until all of them are there."""
    return out.with_name(f"{out.stem}_unfinished")


def _check(options: Options) -> None:
    """Reject what would otherwise fail only after the measurement."""
    if not options.model:
        raise JobError("--model needs at least one run folder, such as --model runs/tiny_phase1, or shipped")
    if options.data_root is not None:
        raise JobError(f"--data_root {options.data_root} is for --protocol all: a single set is given by --data")
    if not options.data:
        raise JobError("--data is missing: give a shard folder, or with --protocol a published one")
    check_output(options.out, "results.json")
    if options.limit is not None and options.limit < 1:
        raise JobError(f"--limit {options.limit} must be at least 1")
    if options.scale is not None and options.protocol:
        raise JobError(f"--scale {options.scale} does not go with --protocol {options.protocol}: its profile fixes the scale")
    if options.pictures < 0 or options.workers < 0:
        raise JobError(f"--pictures {options.pictures} and --workers {options.workers} must not be negative")
    check_folder(options.out)


def _ask(model: Model, precision: torch.dtype, scale: float | None) -> Predictor:
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


def _macs(model: Model | None, bench: EvaluationTask, precision: torch.dtype) -> int | None:
    """Count the MACs for one frame of the first sample's size; None for Mamba-1, whose reference scan takes minutes."""
    if not isinstance(model, LoadedModel) or model.config.model.ssm == "mamba1":
        return None
    config = model.config.model
    if bench.rules.scale is not None and model.has_flow:
        config = dataclasses.replace(config, scale=bench.rules.scale)
    first = next(iter(bench.read([0])))
    height, width = first.img0.shape[-2:]
    return _macs_of(config, height, width, precision)


@functools.cache  # takes a second, and the models of a table often have the same size
def _macs_of(config: ModelConfig, height: int, width: int, precision: torch.dtype) -> int:
    return sum(costs.count(FrameInterpolator(config, "cpu").eval(), 1, (height, width), precision).macs.values())
