"""Compare the sample rates of the training loader on shards of each codec with those of loose PNG files in a plain Dataset.

    python -m vfi.benchmark_data --data data/mine/train --out data_benchmark.json

The same frames are written as loose PNG files and as shards of every codec into a temporary folder; all are then read with
the same crop and augmentation, batched and scaled to floats, for a few seconds each, with each number of worker processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from shards import codecs, writer
from shards.cli import parse_flags
from shards.schema import SampleMeta, ShardError, read_index
from vfi.config.configs import DataConfig
from vfi.data.augment import FrameTooSmallError, apply_change, copy_pixels, draw_change
from vfi.data.evaluation_loader import evaluation_batches, evenly_spaced
from vfi.data.loader import TrainingLoader
from vfi.errors import JobError, clear_errors
from vfi.io.dataclass_json import write_text
from vfi.io.text_table import aligned
from vfi.runtime.numerics import set_numerics
from vfi.tracking.environment import environment

SCHEMA, VERSION = "vfi-data-benchmark", 1
LOOSE = "loose png"
_CPU = torch.device("cpu")
_WARM_UP = 2  # batches that start the workers
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark; each field is a flag."""

    data: Path
    """Shard folder that provides the frames."""
    out: Path | None = None
    """Also write the results to this .json file."""
    samples: int = 128
    """Number of samples, which are read repeatedly."""
    codecs: tuple[str, ...] = ("png", "qoi", "jpeg")
    """Codecs to compare."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes to compare; 0 reads in the main process."""
    batch_size: int = 16
    """Samples per batch."""
    crop: int = 256
    """Side of the crop in pixels."""
    seconds: float = 3.0
    """Seconds for which each case is measured in a round, after its start."""
    rounds: int = 3
    """Rounds over all cases; the median of a case counts, so that other load on the machine affects all cases alike."""
    folder: Path | None = None
    """Folder for the temporary files, whose disk is part of the measurement; default: the system's temporary folder."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    source: str
    workers: int
    samples_per_s: float
    megabytes: float
    """Total size of its files."""


class LooseFiles(Dataset):
    """Common baseline: a folder of PNG files for each sample, opened one by one."""

    def __init__(self, folder: Path, samples: int, config: DataConfig) -> None:
        self.folder, self.samples, self.config = folder, samples, config

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        frames = [np.asarray(Image.open(path).convert("RGB")) for path in _loose_frames(self.folder, number)]
        rng = np.random.default_rng()
        height, width = frames[0].shape[:2]
        change = draw_change(rng, height, width, self.config.crop, self.config)
        changed, _ = apply_change(change, frames, 0.5)
        return tuple(torch.from_numpy(copy_pixels(frame)).permute(2, 0, 1) for frame in changed)


def loose_batches(folder: Path, samples: int, config: DataConfig) -> Iterator[tuple[Tensor, ...]]:
    """Yield endless batches of `LooseFiles`, as floats."""
    dataset = LooseFiles(folder, samples, config)
    workers = config.num_workers
    loader = DataLoader(dataset, config.batch_size, shuffle=True, num_workers=workers, drop_last=True,
                        persistent_workers=workers > 0, prefetch_factor=4 if workers else None)  # fmt: skip
    while True:
        for frames in loader:
            yield tuple(frame.float() / 255 for frame in frames)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: rates are per process, and torch's own threads would share the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rate(batches: Iterator[object], batch_size: int, seconds: float) -> float:
    """Return the samples per second."""
    for _ in range(_WARM_UP):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * batch_size / (time.perf_counter() - start)


def measure(options: Options) -> list[Case]:
    """Write the files, then measure every case."""
    _check(options)
    config = DataConfig(batch_size=options.batch_size, crop=options.crop)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="data_benchmark_") as name, _one_thread():
        folder = Path(name)
        count = _write_loose(options, folder / "loose")
        sizes = {LOOSE: _megabytes(folder / "loose")}
        for codec in options.codecs:
            _write_shards(folder / "loose", folder / codec, count, codec)
            sizes[codec] = _megabytes(folder / codec)
        rates: dict[tuple[str, int], list[float]] = {}
        order = [(source, workers) for workers in options.workers for source in sizes]
        for source, workers in tqdm(order * options.rounds, desc="cases", disable=None):
            own = dataclasses.replace(config, num_workers=workers)
            batches: Iterator[Any]
            if source == LOOSE:
                batches = loose_batches(folder / "loose", count, own)
            else:
                shards = dataclasses.replace(own, data_path=(str(folder / source),))
                batches = TrainingLoader(shards, _SEED, _CPU, accumulation=1).batches()
            rates.setdefault((source, workers), []).append(rate(batches, options.batch_size, options.seconds))
            del batches  # ends its workers
    return [Case(source, workers, statistics.median(rates[source, workers]), sizes[source]) for source, workers in order]


def table(cases: Sequence[Case]) -> str:
    """Format one row per source and one column per number of workers: samples/s, and the ratio to the loose files' rate."""
    counts = sorted({case.workers for case in cases})
    found = {(case.source, case.workers): case.samples_per_s for case in cases}
    lines = [("samples/s", *(f"{count} workers" for count in counts), "MB")]
    for case in (case for case in cases if case.workers == counts[0]):
        rates = ((found[case.source, count], found[LOOSE, count]) for count in counts)
        lines.append((case.source, *(f"{own:.0f} ({own / loose:.1f}x)" for own, loose in rates), f"{case.megabytes:.1f}"))
    return aligned(lines)


@clear_errors(ShardError, FrameTooSmallError)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: measure, print the table, and write the results."""
    options = parse_flags(Options, "python -m vfi.benchmark_data", __doc__, argv)
    set_numerics()  # as in training; it also affects the memory allocation of CPU tensors
    cases = measure(options)
    print(table(cases))
    if options.out is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
        content = {"schema": SCHEMA, "version": VERSION, "options": settings, "cores": os.cpu_count()}
        content |= {"environment": environment(_CPU), "cases": [dataclasses.asdict(case) for case in cases]}
        write_text(options.out, json.dumps(content, indent=1) + "\n")
        print(f"numbers: {options.out}")


def _check(options: Options) -> None:
    for codec in options.codecs:
        codecs.check_codec(codec)
    if options.samples < options.batch_size or options.batch_size < 1:
        raise JobError(f"--samples {options.samples} must be at least --batch_size {options.batch_size}, and that at least 1")
    if not options.codecs or not options.workers or min(options.workers) < 0:
        raise JobError("--codecs and --workers need at least one value each, and a number of workers is not negative")
    if options.seconds <= 0 or options.rounds < 1:
        raise JobError(f"--seconds {options.seconds} must be above 0, and --rounds {options.rounds} at least 1")
    available = read_index(options.data).samples
    if available < options.samples:
        raise JobError(f"{options.data} has {available} samples, fewer than --samples {options.samples}: use a smaller number")


def _loose_frames(folder: Path, number: int) -> list[Path]:
    return [folder / f"{number:06d}" / f"im{frame}.png" for frame in (1, 2, 3)]


def _write_loose(options: Options, folder: Path) -> int:
    """Write the first, middle and last frame of some samples as PNG files, and return the number of samples."""
    numbers = evenly_spaced(read_index(options.data).samples, options.samples)
    batches = evaluation_batches(options.data, _CPU, numbers=numbers)
    for number, batch in enumerate(tqdm(batches, total=len(numbers), desc="loose files", disable=None)):
        paths = _loose_frames(folder, number)
        paths[0].parent.mkdir(parents=True)
        for path, frame in zip(paths, (batch.img0, batch.imgt, batch.img1), strict=True):
            pixels = (frame[0] * 255).round().byte().permute(1, 2, 0).numpy()
            path.write_bytes(codecs.encode(pixels, "png"))
    return len(numbers)


def _write_shards(loose: Path, out: Path, count: int, codec: str) -> None:
    """Write the loose files as shards."""
    tasks = [
        writer.ShardTask(f"samples {part.start} to {part.stop - 1}", len(part), functools.partial(_samples, loose, part, codec))
        for part in writer.chunks(count, writer.SAMPLES_PER_SHARD)
    ]
    source = writer.source_of("vfi.benchmark_data", {"codec": codec})
    plan = writer.Plan("train", codec, 3, False, source, tuple(f"{number:06d}" for number in range(count)), tuple(tasks))
    writer.write(out, plan, writer.fingerprint(source), workers=1)


def _samples(loose: Path, numbers: range, codec: str) -> Iterator[writer.Sample]:
    for number in numbers:
        frames = [codecs.read_image(path) for path in _loose_frames(loose, number)]
        key = f"{number:06d}"
        meta = SampleMeta(key, ("im1", "im2", "im3"), *frames[0].shape[:2])
        yield writer.Sample(key, meta, tuple(codecs.encode(frame, codec) for frame in frames))


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
