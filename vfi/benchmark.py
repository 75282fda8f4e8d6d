"""How good is a model? PSNR and SSIM on a shard folder, beside the average of the two frames.

    vfi benchmark --model runs/tiny_phase1 --data shards/synthetic/val --out results.json
    vfi benchmark --model runs/a runs/b --data shards/vimeo/test --out results.json --device cuda

Whole frames, one at a time, in the order of the index; the prediction is clamped to [0, 1] and not rounded. Writes
results.json (see vfi/results.py) and a folder of pictures beside it, from the worst to the best gain over the average.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from shards.schema import Index, ShardError
from vfi.checkpoint import CheckpointError
from vfi.data.loader import FrameBatch, evaluation_batches
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
from vfi.metrics import psnr, ssim_matlab
from vfi.model.interpolator import MIN_SIZE
from vfi.results import ERROR_WHITE, FRAME_AVERAGE, ImageScore, Picture, Results, Row, write_results
from vfi.tracking import git_state

_ERROR_COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 224]], dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job."""

    model: tuple[Path, ...]
    """Run folders, checkpoint folders or .safetensors files; one or more."""
    data: str
    """Shard folder to measure on, or its URL: http(s)://, s3://, gs:// …"""
    out: Path
    """Results file to write, a .json."""
    device: DeviceName = "auto"
    """auto takes a GPU if there is one."""
    precision: PrecisionName = "auto"
    """auto is bf16 autocast on a GPU that has it, fp32 on the CPU. Metrics are fp32 at least, always."""
    scale: float | None = None
    """Flow is estimated at this fraction of the frames' size: 1, 0.5 or 0.25; by default each model's own setting."""
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
    index = options.folder.read_index()
    if min(index.min_size) < MIN_SIZE:
        height, width = index.min_size
        raise JobError(f"--data {options.data} has frames as small as {height}x{width}: each side must be at least {MIN_SIZE}")
    samples = min(options.limit or index.samples, index.samples)
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    models = [load(path, device) for path in options.model]
    check_scale(options.scale, models)
    names = _distinct_names(models)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    scores = _measure(options, dict(zip(names, models, strict=True)), samples, device, precision)
    rows = [_row(FRAME_AVERAGE, None, scores[FRAME_AVERAGE], options.out)]
    rows += [_row(name, model, scores[name], options.out) for name, model in zip(names, models, strict=True)]
    pictures = _draw_pictures(options, dict(zip(names, models, strict=True)), rows, device, precision)
    results = Results(
        data=str(options.data),
        index_sha256=hashlib.sha256(options.folder.index_bytes()).hexdigest(),
        samples=len(rows[0].images),
        available=index.samples,
        protocol=_protocol(index, len(rows[0].images), options.scale),
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
    lines = [f"{'model':<{width}}  {'PSNR dB':>8}  {'SSIM':>7}  {'gain dB':>8}"]
    for row in results.rows:
        gain = f"{row.psnr - average:+8.3f}" if row.path else f"{'':>8}"
        lines.append(f"{row.model:<{width}}  {row.psnr:8.3f}  {row.ssim:7.4f}  {gain}")
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
    if options.pictures < 0 or options.workers < 0:
        raise JobError(f"--pictures {options.pictures} and --workers {options.workers} must not be negative")
    folder = _pictures_folder(options.out)
    if folder.exists() and (not folder.is_dir() or any(file.suffix != ".png" for file in folder.iterdir())):
        raise JobError(f"{folder} is where the pictures go, but holds something else: move it or take another --out")


def _distinct_names(models: Sequence[LoadedModel]) -> list[str]:
    """Names for the rows: the run's, with the step or the path where that is not enough."""
    for name in (lambda m: m.name, lambda m: f"{m.name}@{m.step}", lambda m: str(m.path)):
        names = [name(model) for model in models]
        if len(set(names)) == len(names) and FRAME_AVERAGE not in names:
            return names
    raise JobError(f"--model was given the same model twice: {', '.join(str(model.path) for model in models)}")


def _measure(
    options: Options, models: dict[str, LoadedModel], samples: int, device: torch.device, precision: torch.dtype
) -> dict[str, list[ImageScore]]:
    """Scores of the frame average and of every model, image by image in the order of the index."""
    scores: dict[str, list[ImageScore]] = {name: [] for name in (FRAME_AVERAGE, *models)}
    batches = evaluation_batches(options.folder, device, workers=options.workers, numbers=range(samples))
    for batch in tqdm(batches, total=samples, unit="image", desc="benchmark", disable=None):
        for name in scores:
            image = _frame_average(batch) if name == FRAME_AVERAGE else _predict(models[name], batch, precision, options.scale)
            value, similarity = psnr(image, batch.imgt).item(), ssim_matlab(image, batch.imgt).item()
            if not np.isfinite([value, similarity]).all():
                raise JobError(f"{name} predicts values that are not finite for sample {batch.keys[0]!r}: it cannot be scored")
            scores[name].append(ImageScore(batch.keys[0], value, similarity))
    if not scores[FRAME_AVERAGE]:
        raise JobError(f"--data {options.data} holds no samples: nothing was measured")
    return scores


def _predict(model: LoadedModel, batch: FrameBatch, precision: torch.dtype, scale: float | None) -> Tensor:
    return model.predict(batch.img0, batch.img1, batch.timestep, precision, scale)


def _frame_average(batch: FrameBatch) -> Tensor:
    return (batch.img0 + batch.img1) / 2


def _row(name: str, loaded: LoadedModel | None, images: Sequence[ImageScore], out: Path) -> Row:
    run = loaded.run_folder if loaded else None
    return Row(
        model=name,
        path=str(loaded.path) if loaded else None,
        run=os.path.relpath(run, out.parent) if run else None,
        step=loaded.step if loaded else None,
        parameters=loaded.parameters if loaded else None,
        preset=loaded.config.run.preset if loaded else None,
        phase=loaded.config.model.phase if loaded else None,
        psnr=float(np.mean([image.psnr for image in images])),
        ssim=float(np.mean([image.ssim for image in images])),
        images=tuple(images),
    )


def _pictures_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}_pictures")


def _draw_pictures(
    options: Options, models: dict[str, LoadedModel], rows: Sequence[Row], device: torch.device, precision: torch.dtype
) -> list[Picture]:
    """Predict the chosen samples again and save their frames: which ones is known only after all were measured."""
    gains = np.array([b.psnr - a.psnr for a, b in zip(rows[0].images, rows[1].images, strict=True)])
    order = np.argsort(gains, kind="stable")
    ranks = sorted({round(rank) for rank in np.linspace(0, len(order) - 1, min(options.pictures, len(order)))})
    rank_of = {int(order[rank]): rank + 1 for rank in ranks}
    folder = _pictures_folder(options.out)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        pictures = []
        for number, batch in _chosen(options, set(rank_of), device):
            images = {name: _predict(model, batch, precision, options.scale) for name, model in models.items()}
            pictures.append(_save_picture(temporary, folder.name, rank_of[number], len(order), batch, images))
        shutil.rmtree(folder, ignore_errors=True)
        if pictures:
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(pictures, key=lambda picture: picture.rank)


def _chosen(options: Options, numbers: set[int], device: torch.device) -> Iterator[tuple[int, FrameBatch]]:
    """The samples with these numbers, read again."""
    chosen = sorted(numbers)
    yield from zip(chosen, evaluation_batches(options.folder, device, workers=options.workers, numbers=chosen), strict=True)


def _save_picture(
    folder: Path, shown_as: str, rank: int, of: int, batch: FrameBatch, predictions: dict[str, Tensor]
) -> Picture:
    def save(kind: str, image: np.ndarray) -> str:
        name = f"{rank:06d}_{kind}.png"
        Image.fromarray(image).save(folder / name)
        return f"{shown_as}/{name}"

    frames = {"img0": batch.img0, "img1": batch.img1, "truth": batch.imgt, "average": _frame_average(batch)}
    return Picture(
        key=batch.keys[0],
        rank=rank,
        of=of,
        **{kind: save(kind, _to_bytes(image)) for kind, image in frames.items()},
        average_error=save("average_error", error_map(frames["average"], batch.imgt)),
        predictions={name: save(f"model{i}", _to_bytes(image)) for i, (name, image) in enumerate(predictions.items())},
        errors={name: save(f"error{i}", error_map(image, batch.imgt)) for i, (name, image) in enumerate(predictions.items())},
    )


def _to_bytes(image: Tensor) -> np.ndarray:
    """`[1, 3, H, W]` in [0, 1] -> RGB uint8 [H, W, 3], for people to look at."""
    return (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def error_map(prediction: Tensor, truth: Tensor) -> np.ndarray:
    """Mean absolute error over the colours, black (0) over red to white (ERROR_WHITE and more): RGB uint8 [H, W, 3]."""
    error = (prediction - truth).abs().mean(1)[0].cpu().numpy() / ERROR_WHITE
    stops = np.linspace(0, 1, len(_ERROR_COLOURS))
    return np.stack([np.interp(error, stops, channel) for channel in _ERROR_COLOURS.T], axis=-1).round().astype(np.uint8)


def _protocol(index: Index, samples: int, scale: float | None) -> dict[str, str]:
    """What the numbers mean, for people; see the field names."""
    return {
        "protocol": "shards",
        "frames": f"first and last of the {index.frames} frames of a sample in, its middle frame is the truth",
        "frame set": "all samples" if samples == index.samples else f"the first {samples} of {index.samples} samples",
        "split": index.split,
        "codec": index.codec,
        "sizes": f"{index.min_size[0]}x{index.min_size[1]} to {index.max_size[0]}x{index.max_size[1]}",
        "PSNR": "-10 log10 of the mean squared error over RGB in 0..1, per image, then the mean over images",
        "SSIM": "ssim_matlab: 3-D Gaussian 11x11x11, sigma 1.5, over the colour x H x W volume, borders replicated",
        "rounding": "none",
        "padding": "replicate, centred, to the model's multiple",
        "TTA": "none",
        "flow scale": "each model's own setting" if scale is None else str(scale),
        "source": json.dumps(index.source, ensure_ascii=False),
    }


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
