"""Benchmark models: PSNR, SSIM and interpolation error, compared with the average of the two frames and with the nearest one.

    vfi benchmark --model runs/tiny_phase1 --data shards/synthetic/val --out results.json
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

import shlex
import sys
from collections.abc import Sequence

import tyro

from shards.schema import ShardError
from vfi.config.renamed_flags import with_new_names
from vfi.errors import CheckpointError, clear_errors
from vfi.evaluation import latency, latency_results
from vfi.evaluation.latency import SpeedOptions
from vfi.evaluation.options import ALL, SPEED, Options
from vfi.evaluation.results import ResultError, table
from vfi.evaluation.runner import benchmark, benchmark_all


@clear_errors(ShardError, CheckpointError, ResultError)
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write results.json and the pictures, and print the table."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["vfi", "benchmark", *arguments])
    options = parse(arguments)
    if isinstance(options, SpeedOptions):
        then = latency_results.read_speed(options.compare_to) if options.compare_to else None
        now = latency.speed(options, command)
        print(latency_results.table(now))
        if then is not None:
            print(f"\ncompared to {options.compare_to}:\n{latency_results.against(now, then)}")
        print(f"speed: {options.out}")
    elif options.protocol == ALL:
        if not benchmark_all(options, command):
            sys.exit(1)
    elif results := benchmark(options, command):
        print(table(results))
        print(f"results: {options.out}")


def parse(arguments: Sequence[str]) -> Options | SpeedOptions:
    """Parse the flags of a benchmark, or with --speed those of vfi/evaluation/latency.py."""
    if SPEED not in arguments:
        return tyro.cli(Options, prog="vfi benchmark", description=__doc__, args=arguments)
    rest = with_new_names([argument for argument in arguments if argument != SPEED], {"against": "compare_to"})
    return tyro.cli(SpeedOptions, prog=f"vfi benchmark {SPEED}", description=latency.__doc__, args=rest)


if __name__ == "__main__":
    main()
