"""List the gates of all phases: thresholds on published benchmarks, on latency and on the ablation.

    vfi gates                                     which there are, and the command that measures each
    vfi gates results/*.json --output_dir runs    with what was measured, in files of `vfi benchmark` and in runs

A gate takes the best model of this project in the files; vfi/reporting/acceptance.py has the rules. `vfi report --gate` puts
the gates of one phase into a report, and its exit code says whether all of them are passed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from shards.cli import parse_flags
from vfi.errors import clear_errors
from vfi.evaluation.results import ResultError
from vfi.io.text_table import aligned
from vfi.reporting import acceptance
from vfi.reporting.files import read_files


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi gates`; each field is a command-line flag."""

    results: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files that `vfi benchmark` wrote, with or without --speed."""
    output_dir: Path = Path("runs")
    """Folder of the runs of the ablation."""


@clear_errors(ResultError)
def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each phase."""
    options = parse_flags(Options, "vfi gates", __doc__, argv)
    print(listing(options.results, options.output_dir))


def listing(files: Sequence[Path], output_dir: Path) -> str:
    """Return the tables of all phases, as text."""
    results, speeds = read_files(files) if files else ({}, {})
    sections = []
    for name in acceptance.GATES:
        verdicts = acceptance.check(name, list(results.values()), list(speeds.values()), output_dir)
        rows = [("", "gate", "why"), *((verdict.state, str(verdict.gate), verdict.why) for verdict in verdicts)]
        sections.append(f"{name}: {acceptance.summary(verdicts)}\n{aligned(rows, left=(0, 1, 2))}")
    return "\n\n".join(sections)


if __name__ == "__main__":
    main()
