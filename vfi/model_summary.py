"""Report what a model costs at each frame size and in each part: parameters, MACs, memory and time.

    vfi profile --preset base --phase 1 --sizes 736x1280 2176x4096
    vfi profile --preset base --phase 1 --device cuda --training --json base.json

With a GPU (or --measure) time and memory are measured; without, they are estimated from shapes alone. Every flag of the model
works as in training. MACs are multiply-accumulates of convolutions, matrix products and attention with the scan in plain
PyTorch: in chunks of Q = 64 tokens it takes Q(S + P) + 2SP for each token and head of width P and state S.

Next to the time of every part is its roofline bound ("floor"): its inputs, outputs and weights once at the rate of a copy, or
its products at the rate of large ones, whichever takes longer. Both rates are measured on the same device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch import Tensor, nn

from shards.cli import parse_flags
from vfi.config import command_line, presets
from vfi.config.configs import Config, ConfigError, ModelConfig
from vfi.config.renamed_flags import with_new_names
from vfi.config.validation import validate
from vfi.errors import JobError, clear_errors
from vfi.evaluation.settings import parse_size
from vfi.inference.loading import predict
from vfi.io.dataclass_json import write_text
from vfi.model.backbone import STRIDE, level_widths
from vfi.model.interpolator import FrameInterpolator
from vfi.ops.ssm.ssd import REFERENCE_CHUNK, kernel_obstacle
from vfi.profiling import costs, timing
from vfi.profiling.costs import FIRST_STAGE_LEVEL
from vfi.profiling.summary_schema import Level, SizeSummary, Summary, TrainingSummary
from vfi.profiling.summary_text import markdown, text
from vfi.profiling.timing import Measured, Rates
from vfi.runtime import memory
from vfi.runtime.cuda_graphs import Graphs
from vfi.runtime.device import DeviceName, PrecisionName, describe_precision, pick_device, pick_precision
from vfi.runtime.numerics import set_numerics
from vfi.tracking.environment import environment
from vfi.training.synthetic_step import TrainingStep

SCHEMA, VERSION = "vfi-model-summary", 3
_SCAN_ORDERS = 4
_SEED = 0
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi profile`; each field is a flag, in addition to those of the model."""

    preset: str = "small"
    """Named set of defaults, see vfi/config/presets.py."""
    sizes: tuple[str, ...] = ("256x448", "736x1280", "1088x1920")
    """Frame sizes, HEIGHTxWIDTH."""
    batch: int = 1
    """Pairs of frames per call at these sizes."""
    device: DeviceName = "auto"
    """Device; auto uses a GPU if there is one."""
    precision: PrecisionName = "auto"
    """Precision; auto is bf16 autocast on a GPU that supports it, otherwise fp32."""
    tf32: bool = False
    """Allow TF32 in fp32 products, as in vfi.train."""
    count: bool = True
    """Count MACs and estimate memory. This takes minutes for the many operators of --ssm mamba1 in plain PyTorch."""
    measure: bool = False
    """Run the model and measure it; default: on a GPU only. Otherwise memory is estimated."""
    repeats: int = 10
    """Number of timed calls after warm-up; the median counts."""
    training: bool = False
    """Also measure training steps: forward, loss, backward, AdamW."""
    train_batch: int | None = None
    """Samples per training step; default: the preset's --batch_size."""
    crop: int = 256
    """Side of the square crops of a training step."""
    reference: bool = False
    """Also measure the parts of the same network with PyTorch's operators, and with mamba-ssm's scan where it can run."""
    assume_tflops: float | None = None
    """Arithmetic rate (TFLOP/s) to estimate the time without a measurement; together with --assume_gbs."""
    assume_gbs: float | None = None
    """Memory rate (GB/s) for the same estimate."""
    json: Path | None = None
    """Also write all results to this .json file."""
    markdown: bool = False
    """Print only time and memory, as a Markdown table with one row for this model."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)


@clear_errors(ConfigError)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: count, measure or estimate, print, and write the JSON."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options, config = from_command_line(arguments)
    summary = summarise(options, config, command=shlex.join(["vfi", "profile", *arguments]))
    print(markdown(summary) if options.markdown else text(summary))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "version": VERSION} | dataclasses.asdict(summary)
        write_text(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")


def from_command_line(argv: Sequence[str]) -> tuple[Options, Config]:
    """Parse flags to checked options and the config of the model. The preset provides the model's defaults."""
    argv = with_new_names(command_line.expand_aliases(argv), {"plain": "reference"})
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default=Options.preset)
    finder.add_argument("--device", default=Options.device)
    found = finder.parse_known_args(argv)[0]
    preset = presets.get(found.preset)
    on_gpu = found.device != "cpu" and torch.cuda.is_available()
    options = parse_flags(
        Options,
        "vfi profile",
        __doc__,
        argv,
        default=Options(preset=found.preset, measure=on_gpu, model=preset.model),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    train_batch = preset.data.batch_size if options.train_batch is None else options.train_batch
    data = dataclasses.replace(preset.data, crop=options.crop, batch_size=train_batch, curriculum=False)
    config = dataclasses.replace(preset, model=options.model, data=data)
    validate(config)
    _check(options)
    return options, config


def _check(options: Options) -> None:
    """Raise JobError for what can't be measured, before anything is built."""
    for flag in ("batch", "repeats"):
        if getattr(options, flag) < 1:
            raise JobError(f"--{flag} {getattr(options, flag)} must be at least 1")
    if not options.sizes:
        raise JobError("--sizes needs at least one size, such as 736x1280")
    for size in options.sizes:
        parse_size(size)
    if not (options.count or options.measure):
        raise JobError("--no-count leaves nothing to do without --measure")
    rates = (options.assume_tflops, options.assume_gbs)
    if (None in rates and rates != (None, None)) or any(rate is not None and rate <= 0 for rate in rates):
        raise JobError("--assume_tflops and --assume_gbs belong together and must be positive, such as 400 and 2980")
    if options.reference and not options.measure:
        raise JobError("--reference measures, and without a GPU that needs --measure")
    if options.training and not options.measure:
        raise JobError("--training measures, and without a GPU that needs --measure")
    if options.json and (options.json.suffix != ".json" or options.json.is_dir()):
        raise JobError(f"--json {options.json} must be a file name that ends in .json")


def summarise(options: Options, config: Config, command: str = "") -> Summary:
    """Count at every size, then run the requested measurements."""
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    if options.measure and device.type == "cuda":
        set_numerics(options.tf32)
    torch.manual_seed(_SEED)
    # fast paths depend on the device: on the CPU, `auto` is PyTorch, whose operators can be counted; of the scan it is the
    # reference that the formula in the summary describes
    names = [field.name for field in dataclasses.fields(config.model) if field.name.endswith("_backend")]
    plain: dict[str, Any] = dict.fromkeys(names, "auto") | {"ssd_backend": "reference"}
    reference = FrameInterpolator(dataclasses.replace(config.model, **plain), "cpu").eval()
    rates = _rates(options, device, precision)
    sizes = [_count(reference, options, size, precision, rates) for size in dict.fromkeys(options.sizes)]
    told = environment(device) | {
        "command": command,
        "precision": describe_precision(precision),
        "threads": torch.get_num_threads(),
        "measured": options.measure,
        "assumed_tflops": options.assume_tflops,
        "assumed_gbs": options.assume_gbs,
        "rates": rates and rates._asdict(),
    }
    training = None
    if options.measure:
        model = FrameInterpolator(config.model, device).eval()
        told |= {"choices": model.choices()}
        sizes = [_measure(model, options, size, device, precision) for size in sizes]
        del model
        memory.free_memory()
        training = _measure_training(config, options, device, precision) if options.training else None
        if options.reference:
            sizes, training = _with_plain(config, options, sizes, training, device, precision)
        if training and rates:
            cost = costs.count(reference, training.batch, (training.crop, training.crop), precision)
            training = dataclasses.replace(training, floors_ms=timing.floors_ms(cost, rates, training=True))
    name = f"{options.preset}, phase {config.model.phase}"
    parameters = costs.parameters_by_part(reference)
    return Summary(name, told, config.model, options.batch, parameters, sizes, training)


def _with_plain(
    config: Config, options: Options, sizes: list[SizeSummary], training: TrainingSummary | None, device: torch.device,
    precision: torch.dtype,
) -> tuple[list[SizeSummary], TrainingSummary | None]:  # fmt: skip
    """Add the times of the parts with PyTorch's operators."""
    plain = dataclasses.replace(config.model, attention_backend="sdpa", pointwise_backend="torch")
    if plain.ssm == "mamba2":  # only this one has a fused implementation
        plain = dataclasses.replace(plain, ssd_backend="reference" if kernel_obstacle(device) else "mamba_ssm")
    model = FrameInterpolator(plain, device).eval()
    found = [memory.if_it_fits(partial(_parts, model, options, size, device, precision)) for size in sizes]
    del model
    memory.free_memory()
    sizes = [
        dataclasses.replace(size, plain_parts_ms=parts, plain_out_of_memory=parts is None)
        for size, parts in zip(sizes, found, strict=True)
    ]
    if training:
        config = dataclasses.replace(config, model=plain)
        of_step = memory.if_it_fits(lambda: _training_parts(TrainingStep(config, device, precision), options))
        training = dataclasses.replace(training, plain_parts=of_step, plain_out_of_memory=of_step is None)
    return sizes, training


def _rates(options: Options, device: torch.device, precision: torch.dtype) -> Rates | None:
    """Return the rates for roofline bounds, as assumed or measured on the model's device; None if nothing is counted."""
    if not options.count:
        return None
    if options.assume_tflops and options.assume_gbs:
        return Rates(options.assume_tflops, options.assume_gbs)
    return timing.measure_rates(device, precision) if options.measure else None


def _count(model: FrameInterpolator, options: Options, size: str, precision: torch.dtype, rates: Rates | None) -> SizeSummary:
    found = levels(model, options.batch, parse_size(size))
    if not options.count:
        return SizeSummary(size, found)
    cost = costs.count(model, options.batch, parse_size(size), precision)
    milliseconds = None
    if options.assume_tflops and options.assume_gbs:
        milliseconds = timing.roofline_ms(cost.operations, options.assume_tflops, options.assume_gbs)
    floors = timing.floors_ms(cost, rates) if rates else None
    return SizeSummary(size, found, cost.macs, cost.by_kind, cost.peak_bytes, milliseconds, floors_ms=floors)


def levels(model: FrameInterpolator, batch: int, size: tuple[int, int]) -> list[Level]:
    """Return the pyramid levels of a batch of frames of (H, W)."""
    config, backbone = model.config, model.backbone
    multiple = round(STRIDE / config.scale)
    H, W = (side + -side % multiple for side in size)
    fields = costs.receptive_fields([*backbone.stem, *backbone.down])
    found = []
    for index, (channels, field) in enumerate(zip(level_widths(config), fields, strict=True)):
        level = Level(index, 2**index, channels, (H >> index) * (W >> index), field)
        found.append(_with_blocks(level, config, batch) if index >= FIRST_STAGE_LEVEL else level)
    return found


def _with_blocks(level: Level, config: ModelConfig, batch: int) -> Level:
    """Add the windows and scans of a level that has LGS blocks."""
    blocks = config.depths[level.level - FIRST_STAGE_LEVEL]
    level = dataclasses.replace(level, blocks=blocks)
    if config.backbone_mode != "mamba2_only":
        level = dataclasses.replace(level, window=config.window_size * level.stride)
    if config.backbone_mode == "gated_attn_only":
        return level
    interleaved = config.scan == "interleaved"
    L, sequences = (2 * level.tokens, batch) if interleaved else (level.tokens, 2 * batch)
    level = dataclasses.replace(level, scan_tokens=L)
    if config.ssm != "mamba2":
        return level
    Q, S, P = min(REFERENCE_CHUNK, L), config.d_state, config.head_dim
    tokens = _SCAN_ORDERS * sequences * (L + -L % Q)
    heads = config.expand * level.channels // P
    return dataclasses.replace(level, scan_macs=blocks * tokens * heads * (Q * (S + P) + 2 * S * P))


def _measure(
    model: nn.Module, options: Options, summary: SizeSummary, device: torch.device, precision: torch.dtype
) -> SizeSummary:
    """Measure time, memory and time by part at one size. Insufficient memory is a result, not an error."""
    step, make = _calls(model, options, summary.size, device, precision)

    def measure() -> SizeSummary:
        measured = timing.measure(step, make, device, options.repeats)
        parts = _parts(model, options, summary, device, precision)
        graphs = Graphs()
        again = timing.measure(lambda frames: step(frames, graphs), make, device, options.repeats).ms
        return dataclasses.replace(summary, measured=measured, parts_ms=parts, graph_ms=again if graphs.captured else None)

    return memory.if_it_fits(measure) or dataclasses.replace(summary, out_of_memory=True)


def _parts(
    model: nn.Module, options: Options, summary: SizeSummary, device: torch.device, precision: torch.dtype
) -> dict[str, float]:
    """Measure the time by part at one size."""
    step, make = _calls(model, options, summary.size, device, precision)
    return timing.measure_parts(model, step, make, device, options.repeats)


def _calls(
    model: nn.Module, options: Options, size: str, device: torch.device, precision: torch.dtype
) -> tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]:
    """Return a forward pass, and a function that creates frames for it."""
    H, W = parse_size(size)

    def step(frames: tuple[Tensor, ...], graphs: Graphs | None = None) -> Tensor:
        return predict(model, frames[0], frames[1], frames[2], precision, graphs=graphs)

    def make() -> tuple[Tensor, ...]:
        frames = torch.rand(2, options.batch, 3, H, W, device=device)
        return (*frames, torch.rand(options.batch, device=device) * 0.8 + 0.1)

    return step, make


def _measure_training(config: Config, options: Options, device: torch.device, precision: torch.dtype) -> TrainingSummary:
    """Measure forward, loss, backward and AdamW on random frames."""
    batch, crop = config.data.batch_size, config.data.crop

    def measure() -> TrainingSummary:
        step = TrainingStep(config, device, precision)
        measured = timing.measure(step, step.make_frames, device, options.repeats)
        return TrainingSummary(batch, crop, measured, 1e3 * batch / measured.ms, _training_parts(step, options))

    return memory.if_it_fits(measure) or TrainingSummary(batch, crop, None, None)


def _training_parts(step: TrainingStep, options: Options) -> dict[str, Measured]:
    """Measure the forward and backward pass of each part alone."""
    frames = step.make_frames()
    return timing.measure_training_parts(step.model, step.loss, frames, step.device, step.precision, options.repeats)


if __name__ == "__main__":
    main()
