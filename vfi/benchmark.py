"""How good is a model? PSNR, SSIM and interpolation error, beside the average of the two frames.

    vfi benchmark --model runs/tiny_phase1 --data shards/synthetic/val --out results.json
    vfi benchmark --model runs/a runs/b --data SNU-FILM --protocol snu_film_hard --out hard.json --device cuda

Without a protocol: the whole frames of a shard folder, one at a time, in the order of the index; the prediction is clamped to
[0, 1] and not rounded. With one, what vfi/protocols.py says of it, on shards or on the published folder. Writes results.json
(see vfi/results.py) and a folder of pictures beside it, from the worst to the best gain over the average.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from shards.schema import ShardError
from vfi.adapters import Adapter, is_adapter, load_adapter
from vfi.bench import Bench, Sample, Target, protocol_bench, shard_bench
from vfi.checkpoint import CheckpointError
from vfi.data.storage import ShardFolder, cache_at, shard_folder
from vfi.errors import JobError, clear_errors
from vfi.inference import (
    DeviceName,
    LoadedModel,
    PrecisionName,
    check_scale,
    describe_precision,
    load,
    pick_device,
    pick_precision,
)
from vfi.protocols import ProfileName, Rules
from vfi.results import ERROR_WHITE, FRAME_AVERAGE, ImageScore, Picture, Results, Row, write_results
from vfi.scoring import Ask, predict_between, score
from vfi.tracking import git_state

Model = LoadedModel | Adapter
_ERROR_COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 224]], dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job."""

    model: tuple[str, ...]
    """Run folders, checkpoint folders, .safetensors files, or MODULE:FACTORY for a model of another repository (see
    vfi/adapters.py); one or more."""
    data: str
    """Shard folder to measure on, or its URL: http(s)://, s3://, gs:// …; with --protocol also the set's published folder."""
    out: Path
    """Results file to write, a .json."""
    device: DeviceName = "auto"
    """auto takes a GPU if there is one."""
    precision: PrecisionName = "auto"
    """auto is bf16 autocast on a GPU that has it, fp32 on the CPU. Metrics are fp32 at least, always."""
    protocol: str = ""
    """Published benchmark: a name of vfi/protocols.py, such as vimeo90k or snu_film_hard."""
    profile: ProfileName = "vfimamba"
    """Whose way of measuring it: padding, flow scale, rounding, kind of SSIM."""
    tta: bool = False
    """Take the mean with the prediction of the frames turned by 180 degrees; twice the time. Published numbers of full-size
    EMA-VFI and VFIMamba are with it."""
    allow_partial: bool = False
    """Measure a protocol on another number or size of frames than published; the results say so."""
    scale: float | None = None
    """Flow is estimated at this fraction of the frames' size: 1, 0.5 or 0.25; by default each model's own setting, and with
    --protocol what that says."""
    limit: int | None = None
    """Only the first this many samples."""
    pictures: int = 6
    """Samples that are kept as pictures, spread evenly from the worst to the best gain."""
    workers: int = 2
    """Loader processes; 0 loads in this one."""
    cache_dir: str = ""
    """Folder in which shards behind a URL are kept, on a local disk; default: ~/.cache/vfi/shards."""
    cache_gb: float = 50.0
    """Largest size of that folder in GB (10^9 bytes)."""

    @property
    def folder(self) -> ShardFolder:
        """What `data` names."""
        return shard_folder(self.data, cache_at(self.cache_dir, self.cache_gb))


@clear_errors(ShardError, CheckpointError)
def main(argv: Sequence[str] | None = None) -> None:
    """The job: measure, write results.json and the pictures, print the table."""
    options = tyro.cli(Options, prog="vfi benchmark", description=__doc__, args=argv)
    arguments = sys.argv[1:] if argv is None else list(argv)
    results = benchmark(options, command=shlex.join(["vfi", "benchmark", *arguments]))
    print(table(results))
    print(f"results: {options.out}")


def benchmark(options: Options, command: str = "") -> Results:
    """Measure every model and the frame average, write everything, return what results.json holds.

    Raises JobError, ShardError or CheckpointError for options that are not usable, before anything is measured.
    """
    _check(options)
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    bench = protocol_bench(options, device) if options.protocol else shard_bench(options, device)
    models = [load_adapter(model, device) if is_adapter(model) else load(model, device) for model in options.model]
    names = _distinct_names(models)
    ours = [model for model in models if isinstance(model, LoadedModel)]
    check_scale(bench.rules.scale, [model for model in ours if not (options.protocol and model.config.model.phase == 1)])
    options.out.parent.mkdir(parents=True, exist_ok=True)

    asks = {name: _ask(model, precision, bench.rules.scale) for name, model in zip(names, models, strict=True)}
    scores = _measure(options, bench, asks)
    rows = [_row(FRAME_AVERAGE, None, scores[FRAME_AVERAGE], options.out)]
    rows += [_row(name, model, scores[name], options.out) for name, model in zip(names, models, strict=True)]
    pictures = _draw_pictures(options, bench, asks, rows)
    results = Results(
        data=str(options.data),
        index_sha256=bench.sha256,
        samples=len(rows[0].images),
        available=bench.available,
        protocol=bench.facts,
        environment=_environment(device, precision, command),
        rows=tuple(rows),
        pictures=tuple(pictures),
    )
    write_results(options.out, results)
    return results


def table(results: Results) -> str:
    """The rows as aligned text."""
    average = results.rows[0].psnr
    width = max(len(row.model) for row in results.rows)
    lines = [f"{'model':<{width}}  {'PSNR dB':>8}  {'SSIM':>7}  {'IE':>6}  {'gain dB':>8}"]
    for row in results.rows:
        gain = f"{row.psnr - average:+8.3f}" if row.path else f"{'':>8}"
        lines.append(f"{row.model:<{width}}  {row.psnr:8.3f}  {row.ssim:7.4f}  {row.ie:6.3f}  {gain}")
    return "\n".join([*lines, f"{results.samples} samples of {results.data}"])


def _check(options: Options) -> None:
    """Refuse what would fail only after the measurement."""
    if not options.model:
        raise JobError("--model needs at least one run folder, such as --model runs/tiny_phase1")
    if options.out.is_dir():
        raise JobError(f"--out {options.out} is a folder: give a file name, such as --out {options.out / 'results.json'}")
    if options.out.suffix != ".json":
        raise JobError(f"--out {options.out} must end in .json")
    for parent in options.out.parents:
        if parent.exists() and not parent.is_dir():
            raise JobError(f"--out {options.out}: {parent} is not a folder")
    if options.limit is not None and options.limit < 1:
        raise JobError(f"--limit {options.limit} must be at least 1")
    if options.scale is not None and options.protocol:
        raise JobError(f"--scale {options.scale} does not go with --protocol {options.protocol}: its profile fixes the scale")
    if options.pictures < 0 or options.workers < 0:
        raise JobError(f"--pictures {options.pictures} and --workers {options.workers} must not be negative")
    folder = _pictures_folder(options.out)
    if folder.exists() and (not folder.is_dir() or any(file.suffix != ".png" for file in folder.iterdir())):
        raise JobError(f"{folder} is where the pictures go, but holds something else: move it or take another --out")


def _distinct_names(models: Sequence[Model]) -> list[str]:
    """Names for the rows: the run's, with the step or the path where that is not enough."""
    for name in (lambda m: m.name, lambda m: f"{m.name}@{m.step}", lambda m: str(m.path)):
        names = [model.name if isinstance(model, Adapter) else name(model) for model in models]
        if len(set(names)) == len(names) and FRAME_AVERAGE not in names:
            return names
    raise JobError(f"--model was given the same model twice: {', '.join(names)}")


def _measure(options: Options, bench: Bench, asks: dict[str, Ask]) -> dict[str, list[ImageScore]]:
    """Scores of the frame average and of every model, image by image in the order of the set."""
    scores: dict[str, list[ImageScore]] = {name: [] for name in (FRAME_AVERAGE, *asks)}
    numbers = range(bench.samples)
    for sample in tqdm(bench.read(numbers), total=len(numbers), unit="sample", desc="benchmark", disable=None):
        for name, found in scores.items():
            images = _predict(sample, asks.get(name), bench.rules, options.tta)
            for target, image in zip(sample.targets, images, strict=True):
                values = score(image, target.truth, bench.rules)
                if not np.isfinite(values).all():
                    raise JobError(f"{name} predicts values that are not finite for {target.key!r}: it cannot be scored")
                found.append(ImageScore(target.key, *values))
    if not scores[FRAME_AVERAGE]:
        raise JobError(f"--data {options.data} holds no samples: nothing was measured")
    return scores


def _ask(model: Model, precision: torch.dtype, scale: float | None) -> Ask:
    """How a model is asked for a frame; one without flow has no scale to be told."""
    if isinstance(model, Adapter):
        return lambda img0, img1, timestep: model.ask(img0, img1, timestep.item(), scale)
    own = None if model.config.model.phase == 1 else scale
    return lambda img0, img1, timestep: model.predict(img0, img1, timestep, precision, own)


def _predict(sample: Sample, ask: Ask | None, rules: Rules, tta: bool) -> list[Tensor]:
    """A frame for each target; the frame average where there is no model to be asked."""
    if ask is None:
        return [_frame_average(sample)] * len(sample.targets)
    return predict_between(ask, sample.img0, sample.img1, [target.timestep for target in sample.targets], rules, tta)


def _frame_average(sample: Sample) -> Tensor:
    return (sample.img0 + sample.img1) / 2


def _row(name: str, model: Model | None, images: Sequence[ImageScore], out: Path) -> Row:
    ours = model if isinstance(model, LoadedModel) else None
    return Row(
        model=name,
        path=str(ours.path) if ours else model.name if model else None,
        run=os.path.relpath(ours.run_folder, out.parent) if ours else None,
        step=ours.step if ours else None,
        parameters=model.parameters if model else None,
        preset=ours.config.run.preset if ours else None,
        phase=ours.config.model.phase if ours else None,
        psnr=float(np.mean([image.psnr for image in images])),
        ssim=float(np.mean([image.ssim for image in images])),
        ie=float(np.mean([image.ie for image in images])),
        images=tuple(images),
    )


def _pictures_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}_pictures")


def _draw_pictures(options: Options, bench: Bench, asks: dict[str, Ask], rows: Sequence[Row]) -> list[Picture]:
    """Predict the chosen images again and save their frames: which ones is known only after all were measured."""
    gains = np.array([b.psnr - a.psnr for a, b in zip(rows[0].images, rows[1].images, strict=True)])
    order = np.argsort(gains, kind="stable")
    ranks = sorted({round(rank) for rank in np.linspace(0, len(order) - 1, min(options.pictures, len(order)))})
    rank_of = {int(order[rank]): rank + 1 for rank in ranks}
    folder = _pictures_folder(options.out)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        pictures = []
        numbers = sorted({image // bench.targets for image in rank_of})
        for number, sample in zip(numbers, bench.read(numbers), strict=True):
            images = {name: _predict(sample, ask, bench.rules, options.tta) for name, ask in asks.items()}
            for which, target in enumerate(sample.targets):
                if rank := rank_of.get(number * bench.targets + which):
                    chosen = {name: found[which] for name, found in images.items()}
                    pictures.append(_save_picture(temporary, folder.name, rank, len(order), sample, target, chosen))
        shutil.rmtree(folder, ignore_errors=True)
        if pictures:
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(pictures, key=lambda picture: picture.rank)


def _save_picture(
    folder: Path, shown_as: str, rank: int, of: int, sample: Sample, target: Target, predictions: dict[str, Tensor]
) -> Picture:
    def save(kind: str, image: np.ndarray) -> str:
        name = f"{rank:06d}_{kind}.png"
        Image.fromarray(image).save(folder / name)
        return f"{shown_as}/{name}"

    frames = {"img0": sample.img0, "img1": sample.img1, "truth": target.truth, "average": _frame_average(sample)}
    return Picture(
        key=target.key,
        rank=rank,
        of=of,
        **{kind: save(kind, _to_bytes(image)) for kind, image in frames.items()},
        average_error=save("average_error", error_map(frames["average"], target.truth)),
        predictions={name: save(f"model{i}", _to_bytes(image)) for i, (name, image) in enumerate(predictions.items())},
        errors={name: save(f"error{i}", error_map(image, target.truth)) for i, (name, image) in enumerate(predictions.items())},
    )


def _to_bytes(image: Tensor) -> np.ndarray:
    """`[1, 3, H, W]` in [0, 1] -> RGB uint8 [H, W, 3], for people to look at."""
    return (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def error_map(prediction: Tensor, truth: Tensor) -> np.ndarray:
    """Mean absolute error over the colours, black (0) over red to white (ERROR_WHITE and more): RGB uint8 [H, W, 3]."""
    error = (prediction - truth).abs().mean(1)[0].cpu().numpy() / ERROR_WHITE
    stops = np.linspace(0, 1, len(_ERROR_COLOURS))
    return np.stack([np.interp(error, stops, channel) for channel in _ERROR_COLOURS.T], axis=-1).round().astype(np.uint8)


def _environment(device: torch.device, precision: torch.dtype, command: str) -> dict[str, str]:
    """What the numbers were made with, for people."""
    return {
        "device": _hardware(device),
        "precision": describe_precision(precision),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": git_state(),
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    names = [line.partition(":")[2].strip() for line in _cpu_facts() if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_facts() -> list[str]:
    facts = Path("/proc/cpuinfo")
    return facts.read_text().splitlines() if facts.is_file() else []


if __name__ == "__main__":
    main()
