"""Benchmark models: PSNR, SSIM and interpolation error, compared with the average of the two frames and with the nearest one.

    vfi benchmark --model runs/tiny_phase1 --data data/synthetic/val --out results.json
    vfi benchmark --model runs/a runs/b --data SNU-FILM --protocol snu_film_hard --out hard.json --device cuda
    vfi benchmark --model runs/a --protocol all --data_root SETS --out results/       all published sets in that folder
    torchrun --nproc_per_node 8 -m vfi.benchmark …                                    the samples are split among ranks
    vfi benchmark --speed --model runs/a --out speed.json                             latency and memory: see --speed --help

Without a protocol: the whole frames of a shard folder, one at a time, in the order of the index; the prediction is clamped to
[0, 1] and not rounded. With one: what vfi/evaluation/protocols.py says of it, on shards or on the published folder. Writes
results.json (see vfi/evaluation/results.py) and, next to it, a folder of pictures from the worst to the best gain over the
average. A benchmark that was stopped resumes when it is started again.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from shards.cli import parse_flags
from shards.factories import is_factory
from shards.schema import ShardError
from vfi.checkpoint.pretrained_folder import is_hub_id
from vfi.config.renamed_flags import with_new_names
from vfi.credentials import hide
from vfi.errors import CheckpointError, JobError, clear_errors
from vfi.evaluation import latency, latency_results
from vfi.evaluation.datasets import find_sets
from vfi.evaluation.latency import SpeedSettings
from vfi.evaluation.protocols import PROTOCOLS
from vfi.evaluation.results import ResultError, table
from vfi.evaluation.runner import benchmark, this_rank
from vfi.evaluation.settings import BenchmarkSettings
from vfi.runtime.logging import logger, show_messages
from vfi.shipped import is_shipped

ALL, SPEED = "all", "--speed"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi benchmark`; each field is a command-line flag."""

    settings: tyro.conf.OmitArgPrefixes[BenchmarkSettings]
    data_root: Path | None = None
    """Folder with the sets of --protocol all: published folders or shards, up to two levels below it."""


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """Options of `vfi benchmark --speed`; each field is a command-line flag."""

    settings: tyro.conf.OmitArgPrefixes[SpeedSettings]
    compare_to: Path | None = None
    """Speed file of an earlier run, such as docs/speed/h100.json, to compare with: also print the ratios."""


@clear_errors(ShardError, CheckpointError, ResultError)
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write results.json and the pictures, and print the table."""
    arguments = hide(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["vfi", "benchmark", *arguments])
    options = parse(arguments)
    if isinstance(options, SpeedOptions):
        then = latency_results.read_speed(options.compare_to) if options.compare_to else None
        now = latency.speed(options.settings, command)
        print(latency_results.table(now))
        if then is not None:
            print(f"\ncompared to {options.compare_to}:\n{latency_results.against(now, then)}")
        print(f"speed: {options.settings.out}")
    elif options.settings.protocol == ALL:
        if not _benchmark_all(options.settings, options.data_root, command):
            sys.exit(1)
    elif options.data_root is not None:
        raise JobError(f"--data_root {options.data_root} is for --protocol all: a single set is given by --data")
    elif results := benchmark(options.settings, command):
        print(table(results))
        print(f"results: {options.settings.out}")


def names_a_model(model: str) -> bool:
    """Return whether --model names a model that is no path: the shipped one, one of the hub, or a MODULE:FACTORY."""
    return is_shipped(model) or is_hub_id(model) or is_factory(model)


def _benchmark_all(settings: BenchmarkSettings, data_root: Path | None, command: str) -> bool:
    """Measure on every published set below --data_root -> False if one that was found could not be measured."""
    if data_root is None or settings.data:
        raise JobError("--protocol all takes --data_root, the folder with the sets, in place of --data")
    if settings.out.suffix or settings.out.is_file():
        raise JobError(f"--out {settings.out}: with --protocol all give a folder, for a file of each set")
    found = find_sets(data_root)
    if not found:
        raise JobError(f"--data_root {data_root} and two levels below it hold none of {', '.join(PROTOCOLS)}")
    lines, usable = list[str](), True
    show_messages(is_main=this_rank() == 0)
    for name, protocol in PROTOCOLS.items():
        if name not in found:
            lines.append(f"{name}: not there")
        elif settings.profile not in protocol.profiles:
            lines.append(f"{name}: no profile {settings.profile}")
        else:
            one = dataclasses.replace(settings, protocol=name, data=str(found[name]), out=settings.out / f"{name}.json")
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


def parse(arguments: Sequence[str]) -> Options | SpeedOptions:
    """Parse the flags of a benchmark, or with --speed those of vfi/evaluation/latency.py."""
    if SPEED not in arguments:
        return parse_flags(Options, "vfi benchmark", __doc__, arguments)
    rest = with_new_names([argument for argument in arguments if argument != SPEED], {"against": "compare_to"})
    return parse_flags(SpeedOptions, f"vfi benchmark {SPEED}", latency.__doc__, rest)


if __name__ == "__main__":
    main()
